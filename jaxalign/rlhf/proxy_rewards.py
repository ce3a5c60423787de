"""Proxies: reward models of any size learned from any number of preferences, in one compiled program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Network
from jaxalign.preferences.comparisons import Comparisons
from jaxalign.preferences.reward_ensemble import reward_ensemble
from jaxalign.preferences.reward_model import comparison_loss, pair_rewards
from jaxalign.preferences.reward_networks import trajectory_reward
from jaxalign.types import Array, ArrayLike, Key, Params

HOLD_OUT = 5  # one preference in so many is kept from training, to choose when it ends


class Proxy(NamedTuple):
    """An ensemble of per-step reward networks and the standardisation of each: params leaves [M, ...], others [M].

    (r - shift) / scale has mean 0 over the steps and deviation 1 over the returns of the reference's trajectories,
    so that members can be compared: preferences leave a reward's origin and its unit open.
    """

    params: Params
    shift: Array
    scale: Array


def masked_mlp(num_features: int, width: ArrayLike, *, max_width: int) -> Network:
    """A per-step reward of two hidden layers, x [..., F] -> [...], with a traced width: one program for every size.

    Units from `width` on are 0 and get no gradient, so it is the network of that width; weights are drawn for it.
    SiLU, because a narrow layer of ReLUs may begin dead.
    """
    width = jnp.minimum(width, max_width)
    on = jnp.arange(max_width) < width

    def init(key: Key) -> Params:
        keys = jax.random.split(key, 3)
        fan_in = (num_features, width, width)
        shapes = ((num_features, max_width), (max_width, max_width), (max_width,))
        drawn = [jax.random.normal(k, s) / jnp.sqrt(n) for k, s, n in zip(keys, shapes, fan_in, strict=True)]
        return {"kernels": drawn, "biases": [jnp.zeros(max_width), jnp.zeros(max_width)]}

    def apply(params: Params, x: Array) -> Array:
        hidden = x.reshape(-1, num_features)
        for kernel, bias in zip(params["kernels"][:2], params["biases"], strict=True):
            hidden = jnp.where(on[None, :], jax.nn.silu(hidden @ kernel + bias[None, :]), 0.0)
        return (hidden @ params["kernels"][2]).reshape(x.shape[:-1])

    return Network(init, apply)


def fit_proxy(
    key: Key,
    network: Network,
    data: Comparisons,
    preferences: Array,
    *,
    members: int,
    steps: int,
    batch_size: int = 32,
    evaluations: int = 20,
) -> Params:
    """M = `members` reward models of the first `preferences` rows of data [P, T, F]; params leaves [M, ...].

    A fifth of those rows is held out; each member keeps its parameters at the best of `evaluations` looks at it.
    """
    preferences = jnp.minimum(preferences, len(data.chosen_mask))
    reward = trajectory_reward(network)
    algorithm = reward_ensemble(
        reward, optax.adamw(3e-3, weight_decay=1e-2), size=members, bootstrap=members > 1, mode="map"
    )
    held_out: Any = jax.tree.map(lambda x: x[::HOLD_OUT], data)
    counted = held_out.index < preferences

    def loss(params: Params) -> Array:
        def one(member: Params) -> Array:
            losses = comparison_loss(*pair_rewards(reward, member, held_out), outcome=held_out.outcome)
            return jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.sum(counted)

        return jax.vmap(one)(params)

    def step(state: Any, key: Key) -> tuple[Any, None]:
        row = jax.random.randint(key, (batch_size,), 0, preferences - (preferences - 1) // HOLD_OUT - 1)
        row = row + row // (HOLD_OUT - 1) + 1  # 1 2 3 4 6 7 8 9 11 ...: those not held out
        return algorithm.step(state, jax.tree.map(lambda x: x[row], data))[0], None

    def look(carry: tuple[Any, Params, Array], keys: Array) -> tuple[tuple[Any, Params, Array], None]:
        state, best, least = carry
        state, _ = jax.lax.scan(step, state, keys)
        found = loss(state.params)
        better = found < least

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(better.reshape(members, *(1,) * (new.ndim - 1)), new, old)

        return (state, jax.tree.map(choose, state.params, best), jnp.minimum(found, least)), None

    init_key, run_key = jax.random.split(key)
    state = algorithm.init(init_key)
    keys = jax.random.split(run_key, (evaluations, steps // evaluations))
    (_, best, _), _ = jax.lax.scan(look, (state, state.params, jnp.full(members, jnp.inf)), keys)
    return best


def standardized(network: Network, params: Params, reference_features: Array) -> Proxy:
    """The ensemble `params` [M, ...] in units of its own returns on the reference's trajectories [E, T, F]."""
    raw = member_rewards(network, Proxy(params, jnp.zeros(()), jnp.ones(())), reference_features)
    return Proxy(params, raw.mean(axis=(1, 2)), raw.sum(axis=-1).std(axis=1))


def member_rewards(network: Network, proxy: Proxy, x: Array) -> Array:
    """Each member's standardised reward of each step: features [..., F] -> [M, ...]."""
    raw = jax.lax.map(lambda params: network.apply(params, x), proxy.params)
    shift, scale = (jnp.reshape(y, (-1,) + (1,) * (x.ndim - 1)) for y in (proxy.shift, proxy.scale))
    return (raw - shift) / scale
