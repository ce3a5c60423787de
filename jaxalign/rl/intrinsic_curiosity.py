"""The intrinsic curiosity module: what cannot be predicted, among what one's own actions change, is new."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Network, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Discrete, Space, flat_size
from jaxalign.networks import MLP
from jaxalign.rl.actor_critic import encode
from jaxalign.rl.intrinsic import IntrinsicReward, intrinsic_reward
from jaxalign.rl.ppo import epochs, flatten
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

Transition = tuple[Array, Array, Array]  # observations, actions, next observations


def intrinsic_curiosity(
    observation_space: Space,
    action_space: Space,
    optimizer: optax.GradientTransformation,
    *,
    coefficient: ArrayLike,
    beta: ArrayLike = 0.2,
    features: int = 32,
    hidden: Sequence[int] = (64,),
    num_epochs: int = 1,
    num_minibatches: int = 1,
) -> IntrinsicReward:
    """How far off a forward model is about where a step led, in features that tell which action was taken.

    phi, phi' = features(observation), features(next_observation)
    L_I = -log softmax(inverse(phi, phi'))[action]      Discrete actions (nats)
        = ||inverse(phi, phi') - action||^2 / 2         Box actions
    L_F = ||forward(phi, action) - phi'||^2 / 2
    bonus = L_F,  loss = mean of (1 - beta) L_I + beta L_F

    The coefficient is the paper's eta. The gradient of both losses reaches the features, as in its eq. 7 (with its
    lambda in the learning rates). What no action influences and no action reveals leaves no trace in the features, so
    noise in it earns nothing; noise that an action switches on still does.

    Args:
        observation_space, action_space: Discrete ones enter as one-hot rows, others flattened, not normalised.
        beta: in [0, 1].
        features: the length of phi.
        hidden: hidden layers of each of the three networks.
        num_epochs, num_minibatches: gradient steps on a rollout, as in `ppo_parts`.

    `bonus(state, (observations, actions, next_observations))` -> [...]. State: a TrainState of {"features", "inverse",
    "forward"}. Metrics "intrinsic/curiosity_bonus", "intrinsic/inverse_loss" and "intrinsic/forward_loss", the last two
    while learning. Pathak et al., arXiv:1705.05363, eqs. 2 to 7.
    """
    choices = flat_size(action_space)
    sizes = {
        "features": (flat_size(observation_space), features),
        "inverse": (2 * features, choices),
        "forward": (features + choices, features),
    }
    networks = {
        name: Network.from_linen(MLP((*hidden, outputs)), jnp.zeros((1, inputs)))
        for name, (inputs, outputs) in sizes.items()
    }

    def init_networks(key: Key) -> Params:
        keys = jax.random.split(key, len(networks))
        return {name: network.init(k) for (name, network), k in zip(networks.items(), keys, strict=True)}

    def losses(params: Params, transition: Transition) -> tuple[Array, Array]:
        """(L_I, L_F), [...] each."""
        observations, actions, next_observations = transition
        rows, taken = encode(observation_space, observations), encode(action_space, actions)
        before = networks["features"].apply(params["features"], rows)
        after = networks["features"].apply(params["features"], encode(observation_space, next_observations))
        told = networks["inverse"].apply(params["inverse"], jnp.concatenate([before, after], axis=-1))
        foreseen = networks["forward"].apply(
            params["forward"], jnp.concatenate([before, taken.astype(before.dtype)], axis=-1)
        )
        if isinstance(action_space, Discrete):
            inverse = optax.softmax_cross_entropy(told, taken)
        else:
            inverse = 0.5 * jnp.sum(jnp.square(told - taken), axis=-1)
        return inverse, 0.5 * jnp.sum(jnp.square(foreseen - after), axis=-1)

    def objective(params: Params, batch: Transition, key: Key) -> tuple[Array, Metrics]:
        inverse, forward = (jnp.mean(x) for x in losses(params, batch))
        metrics = {"intrinsic/inverse_loss": inverse, "intrinsic/forward_loss": forward}
        return (1.0 - beta) * inverse + beta * forward, metrics

    learner = gradient_algorithm(Network(init_networks, losses), objective, optimizer)

    def bonus(state: TrainState, transition: Transition) -> Array:
        return losses(state.params, transition)[1]

    def learn(state: TrainState, steps: Steps, key: Key) -> tuple[TrainState, Array, Metrics]:
        transition = (steps.observations, steps.actions, steps.next_observations)
        new = bonus(state, transition)
        state, metrics = epochs(
            learner, state, flatten(transition), key, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        return state, new, {name: x for name, x in metrics.items() if name.startswith("intrinsic/")}

    return intrinsic_reward(learner.init, bonus, learn, coefficient=coefficient, name="curiosity")
