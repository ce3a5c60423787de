"""A policy and a value function, together: what policy gradient methods learn."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import Network
from jaxalign.environments.protocol import Discrete, Environment, Space, flat_size
from jaxalign.networks import MLP
from jaxalign.types import Array, Key, Params


class ActorCritic(NamedTuple):
    """Any policy with any value function.

    init: key -> params
    policy: (params, observations [..., *observation]) -> a distrax distribution over actions, batch shape [...]
    value: (params, observations) -> [...]
    """

    init: Callable[[Key], Params]
    policy: Callable[[Params, Array], Any]
    value: Callable[[Params, Array], Array]


def actor_critic(
    environment: Environment,
    *,
    hidden: Sequence[int] = (64, 64),
    activation: Callable[[Array], Array] = jnp.tanh,
    shared: bool = False,
    initial_scale: float = 1.0,
) -> ActorCritic:
    """Multilayer perceptrons for an environment's spaces; params {"actor", "critic"[, "torso", "log_scale"]}.

    Discrete actions get a categorical policy; Box actions with limits a tanh-normal one (`TanhNormal`), without limits
    a normal one, both with a scale of their own for each action, `initial_scale` (of the unsquashed action) at first,
    independent of the state. Discrete observations enter as one-hot rows, others flattened. Kernels are
    orthogonal: scaled by sqrt(2), 0.01 at the policy's output, 1 at the value's. With `shared`, the hidden layers serve
    both.

    Raises ValueError for a Box action space that is neither limited nor unlimited in all places, or not of rank 1.
    """
    seen = environment.observation_space
    head = policy_head(environment.action_space, environment.name, initial_scale=initial_scale)
    example = jnp.zeros((1, flat_size(seen)))
    middle = jnp.zeros((1, hidden[-1])) if shared else example
    layers = () if shared else tuple(hidden)
    networks = {
        "actor": Network.from_linen(MLP((*layers, head.outputs), activation, final_scale=0.01), middle),
        "critic": Network.from_linen(MLP((*layers, 1), activation, final_scale=1.0), middle),
    }
    if shared:
        # The last layer of an MLP is linear, so its activation is applied below.
        networks["torso"] = Network.from_linen(MLP(tuple(hidden), activation, final_scale=np.sqrt(2.0)), example)

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(networks))
        return head.start | {name: net.init(k) for (name, net), k in zip(networks.items(), keys, strict=True)}

    def features(params: Params, observations: Array) -> Array:
        rows = encode(seen, observations)
        return activation(networks["torso"].apply(params["torso"], rows)) if shared else rows

    def policy(params: Params, observations: Array) -> Any:
        return head.distribution(params, networks["actor"].apply(params["actor"], features(params, observations)))

    def value(params: Params, observations: Array) -> Array:
        return networks["critic"].apply(params["critic"], features(params, observations))[..., 0]

    return ActorCritic(init, policy, value)


def encode(space: Space, observations: Array) -> Array:
    """Observations [..., *shape] as rows of floats [..., F] for a network: Discrete ones one-hot, others flattened."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(observations, space.size)
    batch = observations.shape[: observations.ndim - len(space.shape)]
    return observations.reshape(*batch, -1).astype(jnp.result_type(observations.dtype, jnp.float32))


def draw(key: Key, distribution: Any) -> tuple[Array, Array]:
    """An action of each row and its log-probability: ([..., *action], [...]), of a distrax distribution [...].

    distrax draws a batch of one and broadcasts against it, which JAX's strict rank promotion would refuse.
    """
    with jax.numpy_rank_promotion("allow"):
        actions = distribution.sample(seed=key)
    return actions, distribution.log_prob(actions)


def act_with(model: ActorCritic, params: Params, *, greedy: bool = False) -> Callable[[Key, Array], Array]:
    """(key, observation [...]) -> action, for `evaluate`: drawn from the policy, or its mode."""

    def act(key: Key, observation: Array) -> Array:
        distribution = model.policy(params, observation)
        return distribution.mode() if greedy else draw(key, distribution)[0]

    return act


class PolicyHead(NamedTuple):
    """How a network's output becomes a distribution over actions.

    outputs: numbers the network gives for an observation
    start: parameters beside the network's, at first: {} or {"log_scale": [D]}
    distribution: (params, output [..., outputs]) -> a distrax distribution [...]
    """

    outputs: int
    start: Params
    distribution: Callable[[Params, Array], Any]


def policy_head(space: Space, name: str, *, initial_scale: float = 1.0) -> PolicyHead:
    """Categorical for Discrete actions; tanh-normal for a Box [D] with limits, normal for one without.

    Raises ValueError, naming the environment `name`, for a Box that limits some actions only or is not of rank 1.
    """
    from jaxalign.rl import policies

    if isinstance(space, Discrete):
        return PolicyHead(space.size, {}, lambda params, output: policies.categorical(output))
    if len(space.shape) != 1:
        raise ValueError(f"actor_critic: {name} has actions of shape {space.shape}; they must be [D]")
    ends = [end for end in (space.low, space.high) if not isinstance(end, jax.core.Tracer)]
    limited = {bool(x) for end in ends for x in np.isfinite(np.atleast_1d(np.asarray(end)))} or {True}
    if len(limited) != 1:
        raise ValueError(f"actor_critic: {name} limits some actions only: {space.low} .. {space.high}")

    def distribution(params: Params, output: Array) -> Any:
        scale = jnp.expand_dims(jnp.exp(params["log_scale"]), tuple(range(output.ndim - 1)))
        scale = jnp.broadcast_to(scale, output.shape)
        if limited == {False}:
            return policies.diagonal_normal(output, scale)
        return policies.TanhNormal(output, scale, low=space.low, high=space.high)

    start = {"log_scale": jnp.full(space.shape, np.log(initial_scale), jnp.float32)}
    return PolicyHead(space.shape[0], start, distribution)
