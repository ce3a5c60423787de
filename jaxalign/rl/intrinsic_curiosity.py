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
    lambda in the learning rates). The features are asked for what tells the action and no more, so that noise which no
    action influences should earn little in the end; noise that an action switches on goes on earning.

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
    networks = curiosity_networks(observation_space, action_space, features, tuple(hidden))

    def objective(params: Params, batch: Transition, key: Key) -> tuple[Array, Metrics]:
        inverse, forward = (jnp.mean(x) for x in networks.apply(params, batch))
        metrics = {"intrinsic/inverse_loss": inverse, "intrinsic/forward_loss": forward}
        return (1.0 - beta) * inverse + beta * forward, metrics

    learner = gradient_algorithm(networks, objective, optimizer)

    def bonus(state: TrainState, transition: Transition) -> Array:
        return networks.apply(state.params, transition)[1]

    def learn(state: TrainState, steps: Steps, key: Key) -> tuple[TrainState, Array, Metrics]:
        transition = (steps.observations, steps.actions, steps.next_observations)
        new = bonus(state, transition)
        state, metrics = epochs(
            learner, state, flatten(transition), key, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        return state, new, {name: x for name, x in metrics.items() if name.startswith("intrinsic/")}

    return intrinsic_reward(learner.init, bonus, learn, coefficient=coefficient, name="curiosity")


def curiosity_networks(
    observation_space: Space, action_space: Space, features: int, hidden: tuple[int, ...]
) -> Network:
    """params {"features", "inverse", "forward"}; apply(params, transition [..., ...]) -> (L_I, L_F), [...] each."""
    seen, done = flat_size(observation_space), flat_size(action_space)
    sizes = {"features": (seen, features), "inverse": (2 * features, done), "forward": (features + done, features)}
    networks = {
        name: Network.from_linen(MLP((*hidden, outputs)), jnp.zeros((1, inputs)))
        for name, (inputs, outputs) in sizes.items()
    }

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(networks))
        return {name: network.init(k) for (name, network), k in zip(networks.items(), keys, strict=True)}

    def losses(params: Params, transition: Transition) -> tuple[Array, Array]:
        def output(name: str, *inputs: Array) -> Array:
            return networks[name].apply(params[name], jnp.concatenate(inputs, axis=-1))

        observations, actions, next_observations = transition
        before, after = (output("features", encode(observation_space, x)) for x in (observations, next_observations))
        taken = encode(action_space, actions).astype(before.dtype)
        told, foreseen = output("inverse", before, after), output("forward", before, taken)
        if isinstance(action_space, Discrete):
            inverse = optax.softmax_cross_entropy(told, taken)
        else:
            inverse = 0.5 * jnp.sum(jnp.square(told - taken), axis=-1)
        return inverse, 0.5 * jnp.sum(jnp.square(foreseen - after), axis=-1)

    return Network(init, losses)
