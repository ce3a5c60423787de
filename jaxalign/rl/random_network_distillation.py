"""Random network distillation: what a network has not yet learned to predict about another is new.

What is found just before an episode ends is as new as anything else, so the scale of the bonus is that of returns which
run on through the ends of episodes (the paper's non-episodic returns). Only the scale can follow the paper in this: a
learner with one value function, such as `ppo`, takes a terminal state to be worth 0, in the bonus too, where the
paper's second value function does not. So it shuns terminal states more than the paper does.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Network, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Space, flat_size
from jaxalign.environments.running_moments import EPSILON, RunningMoments, init_moments, normalize, update_moments
from jaxalign.networks import MLP
from jaxalign.rl.actor_critic import encode
from jaxalign.rl.intrinsic import IntrinsicReward, intrinsic_reward
from jaxalign.rl.ppo import epochs, flatten
from jaxalign.rl.return_scale import ReturnScale, init_return_scale, scale_rewards
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


@flax.struct.dataclass
class DistillationState:
    """target: params that never change
    predictor: a TrainState, trained to say what the target says
    moments: RunningMoments [F] of the encoded observations
    scale: the ReturnScale of the prediction error
    """

    target: Params
    predictor: TrainState
    moments: RunningMoments
    scale: ReturnScale


def random_network_distillation(
    observation_space: Space,
    optimizer: optax.GradientTransformation,
    *,
    num_envs: int,
    coefficient: ArrayLike,
    discount: ArrayLike = 0.99,
    features: int = 32,
    hidden: Sequence[int] = (64,),
    clip: ArrayLike = 5.0,
    update_proportion: ArrayLike = 1.0,
    num_epochs: int = 1,
    num_minibatches: int = 1,
) -> IntrinsicReward:
    """What a trained network cannot yet tell of a fixed random one about where a step led.

    x = clip((next_observation - mean) / deviation)
    error = mean_k (predictor_k(x) - target_k(x))^2
    bonus = error / deviation of G, G_t = error_t + discount G_(t-1)

    G runs on through the ends of episodes. The moments take in a rollout before its bonus is paid, so the first one
    stands for the paper's random steps; the predictor learns from it after.

    Args:
        observation_space: Discrete observations enter as one-hot rows, others flattened, as [F].
        num_envs: N, as the learner's.
        discount: of the scale's G.
        features: outputs of both networks.
        hidden: the target's hidden layers; the predictor has one more, of the last size.
        clip: in deviations of the observations.
        update_proportion: the share of the steps that the predictor learns from, drawn anew for each gradient step.
            Lower it with more environments, or the bonus fades sooner.
        num_epochs, num_minibatches: gradient steps of the predictor on a rollout, as in `ppo_parts`.

    `bonus(state, next_observations [..., *observation])` -> [...]. State: DistillationState. Metrics
    "intrinsic/rnd_bonus" and "intrinsic/rnd_loss".
    Raises ValueError at trace time if the steps are not of N environments, or do not split into the minibatches.
    Burda et al., arXiv:1810.12894, sections 2.2 to 2.4.
    """
    size, sizes = flat_size(observation_space), tuple(hidden)
    example = jnp.zeros((1, size))
    target = Network.from_linen(MLP((*sizes, features)), example)
    predictor = Network.from_linen(MLP((*sizes, *sizes[-1:], features)), example)

    def objective(params: Params, batch: tuple[Array, Array], key: Key) -> tuple[Array, Metrics]:
        rows, wanted = batch
        errors = jnp.mean(jnp.square(predictor.apply(params, rows) - wanted), axis=-1)
        kept = jax.random.bernoulli(key, update_proportion, errors.shape)
        return jnp.sum(jnp.where(kept, errors, 0.0)) / jnp.maximum(jnp.sum(kept, dtype=errors.dtype), 1.0), {}

    learner = gradient_algorithm(predictor, objective, optimizer)
    passes = {"num_epochs": num_epochs, "num_minibatches": num_minibatches}

    def init(key: Key) -> DistillationState:
        target_key, predictor_key = jax.random.split(key)
        return DistillationState(
            target.init(target_key), learner.init(predictor_key), init_moments((size,)), init_return_scale(num_envs)
        )

    def compare(state: DistillationState, moments: RunningMoments, rows: Array) -> tuple[Array, Array, Array]:
        """Normalised rows [..., F], the target's outputs [..., features], error [...]."""
        rows = normalize(moments, rows, clip=clip)
        wanted = target.apply(state.target, rows)
        return rows, wanted, jnp.mean(jnp.square(predictor.apply(state.predictor.params, rows) - wanted), axis=-1)

    def bonus(state: DistillationState, next_observations: Array) -> Array:
        _, _, error = compare(state, state.moments, encode(observation_space, next_observations))
        return error / jnp.sqrt(state.scale.moments.variance + EPSILON)

    def learn(state: DistillationState, steps: Steps, key: Key) -> tuple[DistillationState, Array, Metrics]:
        if steps.rewards.shape[1] != num_envs:
            raise ValueError(f"random_network_distillation: num_envs={num_envs}, the steps are {steps.rewards.shape}")
        rows = encode(observation_space, steps.next_observations)
        moments = update_moments(state.moments, rows)
        rows, wanted, error = compare(state, moments, rows)
        scale, new = scale_rewards(state.scale, error, jnp.zeros_like(steps.done), discount=discount, clip=jnp.inf)
        trained, metrics = epochs(learner, state.predictor, flatten((rows, wanted)), key, **passes)
        return DistillationState(state.target, trained, moments, scale), new, {"intrinsic/rnd_loss": metrics["loss"]}

    return intrinsic_reward(init, bonus, learn, coefficient=coefficient, name="rnd")
