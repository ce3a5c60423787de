"""Several reward networks trained on the same comparisons, and what to make of their disagreement."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, merge
from jaxalign.preferences.bradley_terry import as_float
from jaxalign.preferences.comparisons import (
    AnyBatch,
    WeightedBatch,
    check_reward_batch,
    reward_batch,
    row_weights,
)
from jaxalign.preferences.reward_model import network_rewards, weighted_reward_model
from jaxalign.sweeps import replicate
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

# POISSON_CDF[k] = P(X <= k) for X ~ Poisson(1), k = 0..11; float32 tells no more of them from 1.
SHARED = tuple(field.name for field in dataclasses.fields(TrainState))
POISSON_CDF = tuple(math.exp(-1) * sum(1 / math.factorial(i) for i in range(k + 1)) for k in range(12))


@flax.struct.dataclass
class EnsembleState(TrainState):
    """A TrainState of E members, leaves [E, ...] (`frozen` is shared and has no such axis).

    bootstrap_key: [E] keys, never split: with a row's index each says how often that member has that row
    """

    bootstrap_key: Key | None = None


def bootstrap_weights(key: Key, index: ArrayLike) -> Array:
    """How often rows `index` [B] of a data set stand in one resample of it: Poisson(1) counts [B] float32.

    Each count depends on `key` and the row's index alone, so it is the same in every epoch and every batch. This is the
    bootstrap as it looks to one row of a large data set (Oza and Russell 2001).
    """

    def count(i: Array) -> Array:
        u = jax.random.uniform(jax.random.fold_in(key, i))
        return jnp.sum(u > jnp.asarray(POISSON_CDF, u.dtype), dtype=jnp.float32)

    return jax.vmap(count)(jnp.asarray(index).astype(jnp.uint32))


def reward_ensemble(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    size: int,
    bootstrap: bool = True,
    mode: str = "vmap",
    **options: Any,
) -> Algorithm:
    """`size` reward networks that see the same batches, and differ in how they begin and in how much each row counts.

    Args:
        size: E, how many members.
        bootstrap: member e counts row i as often as `bootstrap_weights(its key, index[i])` says, so batches need
            `index` (Comparisons or Rankings). False: all members weigh all rows alike.
        mode: "vmap" trains the members side by side, "map" one after another in the memory of one.
        **options: those of `reward_model`.

    `state.params` and the metrics have leaves [E, ...], `state.frozen` is one copy for all.
    Raises ValueError if `size` < 1, if a bootstrap finds no `index`, and as `reward_model` does.
    """
    if size < 1:
        raise ValueError(f"reward_ensemble: size must be at least 1, got {size}")
    single = weighted_reward_model(network, optimizer, **options)
    members = replicate(single, size, mode=mode)

    def init(key: Key) -> EnsembleState:
        members_key, bootstrap_key = jax.random.split(key)
        keys = jax.random.split(members_key, size)
        state = jax.vmap(lambda member_key: single.init(member_key).replace(frozen=None))(keys)
        fields = {name: getattr(state, name) for name in SHARED} | {"frozen": single.init(keys[0]).frozen}
        return EnsembleState(**fields, bootstrap_key=jax.random.split(bootstrap_key, size))

    def step(state: EnsembleState, batch: AnyBatch) -> tuple[EnsembleState, Metrics]:
        batch = reward_batch(batch)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, batch))):
            check_reward_batch(batch, tie_strength=options.get("tie_strength"))
        weight = jnp.tile(row_weights(batch)[None], (size, 1))
        if bootstrap:
            if batch.index is None:
                raise ValueError("reward_ensemble: a bootstrap needs the batch's `index` [B] (or give bootstrap=False)")
            weight = weight * jax.vmap(bootstrap_weights, (0, None))(state.bootstrap_key, batch.index)
        batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), batch)
        plain = TrainState(**{name: getattr(state, name) for name in SHARED})
        new, metrics = members.step(plain, WeightedBatch(batches, weight))
        return state.replace(**{name: getattr(new, name) for name in SHARED}), metrics

    return Algorithm(init, step)


def ensemble_rewards(
    network: Network, params: Params, inputs: Any, mask: Array, *, frozen: Params = None, mode: str = "vmap"
) -> Array:
    """Every member's rewards [E, B] of inputs [B, T, ...] and mask [B, T].

    Args:
        params: leaves [E, ...], as in an ensemble's `state.params`; None where a leaf is in `frozen`.
        frozen: the leaves all members share (`state.frozen`).
        mode: "vmap", or "map" for one member after another.
    """

    def one(member: Params) -> Array:
        return network_rewards(network, merge(member, frozen), inputs, mask)

    if jax.tree.leaves(params)[0].shape[0] == 1:  # a loop or a batch of one would only slow its products down
        return one(jax.tree.map(lambda x: x[0], params))[None]
    return jax.vmap(one)(params) if mode == "vmap" else jax.lax.map(one, params)


def ensemble_mean(rewards: ArrayLike) -> Array:
    """Mean over the members of rewards [E, ...] -> [...]."""
    return _members(rewards).mean(axis=0)


def lower_confidence_bound(rewards: ArrayLike, *, coefficient: ArrayLike) -> Array:
    """mean - coefficient * std over the members of rewards [E, ...] -> [...]; std = sqrt(mean (r - mean)^2).

    What the members do not agree on is worth less, so that a policy gains little by going where none was taught. Coste
    et al. (arXiv:2310.02743) take the variance where this takes the deviation, which has the rewards' own unit. Where
    all members agree the gradient of the deviation is taken as 0.
    """
    rewards = _members(rewards)
    mean = rewards.mean(axis=0)
    variance = jnp.square(rewards - mean[None]).mean(axis=0)
    # sqrt has no derivative at 0; the inner where keeps it from being taken there.
    deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return mean - coefficient * deviation


def worst_case(rewards: ArrayLike) -> Array:
    """The least reward any member gives, rewards [E, ...] -> [...] (Coste et al., arXiv:2310.02743)."""
    return _members(rewards).min(axis=0)


def _members(rewards: ArrayLike) -> Array:
    (rewards,) = as_float(rewards)
    if rewards.ndim == 0 or rewards.shape[0] == 0:
        raise ValueError(f"an ensemble's rewards must be [E, ...] with E >= 1, got {rewards.shape}")
    return rewards
