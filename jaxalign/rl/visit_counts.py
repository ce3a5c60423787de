"""Bonuses that fall with the square root of how often something was seen: exact counts, and hashes of real vectors."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.rl.intrinsic import IntrinsicReward, intrinsic_reward
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics

MOST_BITS = 24  # a table of 2^24 int32 counts is 64 MiB


def visit_counts(count_of: Callable[[Steps], Array], *, num_keys: int, coefficient: ArrayLike) -> IntrinsicReward:
    """bonus = 1 / sqrt(counts[k] + 1), counts the visits to k before this one: 1 at the first, then 0.707, 0.577, ...

    The visits of one rollout are counted one after another in the order of [T, N], all environments' at one time before
    the next time's, into one table for all environments.

    Args:
        count_of: Steps [T, N, ...] -> int [T, N], what each step is counted as, in 0..num_keys-1: for example
            `lambda steps: steps.next_observations` of Discrete observations, `state_actions(A)`, or `simhash(...)` of
            `steps.next_observations`. A number outside is paid NaN and not counted.
        num_keys: K, static.

    `bonus(state, keys [...])` is what one more visit would earn. State: counts int32 [K]. Metrics
    "intrinsic/count_bonus" and "intrinsic/visited", the share of the table ever visited.
    Raises ValueError at trace time if count_of gives another shape, or no integers.
    Strehl & Littman 2008 (MBIE-EB) with state-actions; Tang et al., arXiv:1611.04717, section 2.2 with states.
    """

    def bonus(counts: Array, keys: Array) -> Array:
        return _bonus(counts, keys, jnp.zeros_like(keys))

    def learn(counts: Array, steps: Steps, key: Key) -> tuple[Array, Array, Metrics]:
        keys = count_of(steps)
        if keys.shape != steps.rewards.shape or not jnp.issubdtype(keys.dtype, jnp.integer):
            raise ValueError(
                f"visit_counts: count_of must give int {steps.rewards.shape}, got {keys.dtype} {keys.shape}"
            )
        flat = keys.reshape(-1)
        new = _bonus(counts, flat, earlier_equals(flat)).reshape(keys.shape)
        # A negative index would wrap round; out of range it is dropped.
        counts = counts.at[jnp.where(flat < 0, num_keys, flat)].add(1, mode="drop")
        return counts, new, {"intrinsic/visited": jnp.mean(counts > 0, dtype=jnp.float32)}

    def _bonus(counts: Array, keys: Array, before: Array) -> Array:
        visits = counts[jnp.clip(keys, 0, num_keys - 1)] + before + 1
        return jnp.where((keys >= 0) & (keys < num_keys), visits.astype(jnp.float32) ** -0.5, jnp.nan)

    def init(key: Key) -> Array:
        return jnp.zeros(num_keys, jnp.int32)

    return intrinsic_reward(init, bonus, learn, coefficient=coefficient, name="count")


def earlier_equals(keys: Array) -> Array:
    """How many of the keys [M] before each equal it, int32 [M], in O(M log M).

    >>> earlier_equals(jnp.array([7, 3, 7, 7])).tolist()
    [0, 0, 1, 2]
    """
    order = jnp.argsort(keys, stable=True)
    grouped, place = keys[order], jnp.arange(keys.size, dtype=jnp.int32)
    begins = jnp.where(grouped != jnp.roll(grouped, 1), place, 0)
    rank = place - jax.lax.cummax(begins)
    return jnp.zeros_like(place).at[order].set(rank)


def state_actions(num_actions: int) -> Callable[[Steps], Array]:
    """count_of for Discrete observations with A = num_actions: observation * A + action, [T, N] in 0..S A - 1."""
    return lambda steps: steps.observations * num_actions + steps.actions


def simhash(key: Key, shape: tuple[int, ...], *, bits: int) -> Callable[[Array], Array]:
    """A hash of real observations in which near ones (in angle) often agree.

    code = sum_b 2^b [projection_b . x > 0], projection ~ N(0, 1) of [bits, *shape]

    Two vectors at the angle w agree in each bit with probability 1 - w / pi; more bits tell more apart. Only directions
    are told apart, so subtract from x what is usual, or first take any features of it. Returns observations
    [..., *shape] -> int32 [...] in 0..2^bits - 1: give `visit_counts` num_keys=2**bits, and

        count_of = lambda steps: code(steps.next_observations)

    Raises ValueError unless bits is in 1..24. Tang et al., arXiv:1611.04717, eq. 3; with the table exact, no collisions
    are added to those of the hash.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"simhash: bits must be in 1..{MOST_BITS}, for a table of 2^bits counts, got {bits}")
    projection = jax.random.normal(key, (math.prod(shape), bits))
    weights = jnp.left_shift(1, jnp.arange(bits, dtype=jnp.int32))

    def code(observations: Array) -> Array:
        lead = observations.ndim - len(shape)
        if lead < 0 or observations.shape[lead:] != tuple(shape):
            raise ValueError(f"simhash: observations must be [..., *{tuple(shape)}], got {observations.shape}")
        rows = observations.reshape(*observations.shape[:lead], -1).astype(projection.dtype)
        return jnp.sum(jnp.where(rows @ projection > 0, jnp.expand_dims(weights, tuple(range(lead))), 0), axis=-1)

    return code
