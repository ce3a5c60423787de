"""Shapley values of a function's inputs: exact over all coalitions, or by antithetic permutations with intervals.

A coalition S is an input that keeps x on S and has the baseline elsewhere, `v(S) = fn(where(S, x, baseline))`. `fn` and
x are those of `jaxalign.interpretability.attribution`: a pytree of [...] to a scalar, or of [B, ...] to [B].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from jaxalign.interpretability.attribution import Explained, as_arrays, baseline_like, checked_output
from jaxalign.types import Array, Key

MOST_PLAYERS = 16  # 2^16 coalitions


class ShapleyEstimate(NamedTuple):
    """Sampled Shapley values of M players.

    value: [..., M], with [B, M] for a batch; they sum to fn(x) - fn(baseline) whatever the number of permutations
    standard_error: [..., M] of the mean over antithetic pairs
    low, high: [..., M] Student's interval over these pairs
    """

    value: Array
    standard_error: Array
    low: Array
    high: Array


def shapley_exact(fn: Explained, x: Any, baseline: Any, *, groups: Any = None, chunk: int = 64) -> Array:
    """Shapley values over all 2^M coalitions (Shapley 1953).

    `value[i] = sum over S without i of |S|! (M - |S| - 1)! / M! * (v(S + i) - v(S))`.

    Args:
        x, baseline: as in `integrated_gradients`.
        groups: which player each element of one example belongs to: whole numbers 0..M-1, in the structure of x and
            broadcast to one example's shapes. None: each element is a player, numbered in the order of `ravel`.
        chunk: coalitions tried at a time.

    Returns [M], or [B, M] for a batch. Raises ValueError beyond 16 players: sample then.
    """
    coalition_value, players = _game(fn, x, baseline, groups)
    if players > MOST_PLAYERS:
        raise ValueError(f"shapley_exact: {players} players have 2^{players} coalitions; use shapley_sampling")
    members = (np.arange(2**players)[:, None] >> np.arange(players)[None, :] & 1).astype(bool)
    sizes = members.sum(axis=1)
    factorial = scipy.special.factorial(np.arange(players + 1))
    # With i in S its term is v(S) as the larger coalition, without i as the smaller one.
    gained = factorial[np.maximum(sizes - 1, 0)] * factorial[players - sizes] / factorial[players]
    lost = factorial[sizes] * factorial[np.maximum(players - sizes - 1, 0)] / factorial[players]
    weights = np.where(members, gained[:, None], -lost[:, None])
    values = jax.lax.map(coalition_value, jnp.asarray(members), batch_size=min(chunk, len(members)))
    return jnp.tensordot(values, jnp.asarray(weights, values.dtype), axes=((0,), (0,)))


def shapley_sampling(
    key: Key,
    fn: Explained,
    x: Any,
    baseline: Any,
    *,
    permutations: int = 64,
    groups: Any = None,
    confidence: float = 0.95,
    chunk: int = 16,
) -> ShapleyEstimate:
    """Shapley values as the mean gain of each player when all join in a random order (Castro et al. 2009).

    Orders come in antithetic pairs, an order and its reverse, whose errors partly cancel (Mitchell et al. 2022,
    arXiv:2104.12199, section 4.1); the standard error is over pairs. Each order takes M - 1 new values of fn.

    Args:
        x, baseline, groups: as in `shapley_exact`; x is one example [...] or a batch [B, ...].
        permutations: an even number P >= 4; there are P / 2 pairs. The rows of a batch share them.
        confidence: of low and high.
        chunk: coalitions tried at a time.

    Raises ValueError on another number of permutations.
    """
    if permutations < 4 or permutations % 2:
        raise ValueError(f"shapley_sampling: permutations come in pairs, at least two; got {permutations}")
    coalition_value, players = _game(fn, x, baseline, groups)
    pairs = permutations // 2
    empty, full = coalition_value(jnp.zeros(players, bool)), coalition_value(jnp.ones(players, bool))

    def gains(order: Array) -> Array:
        """[..., M]: what each player adds when they join in this order [M]."""
        rank = jnp.zeros(players, jnp.int32).at[order].set(jnp.arange(players, dtype=jnp.int32))
        joined = jnp.arange(1, players, dtype=jnp.int32)
        values = jax.lax.map(lambda n: coalition_value(rank < n), joined, batch_size=min(chunk, max(1, players - 1)))
        values = jnp.concatenate([empty[None], values, full[None]])
        return jnp.moveaxis(jnp.diff(values, axis=0)[rank], 0, -1)

    def add(running: tuple[Array, Array, Array], pair_key: Key) -> tuple[tuple[Array, Array, Array], None]:
        count, mean, squares = running
        order = jax.random.permutation(pair_key, players)
        both = jax.lax.map(gains, jnp.stack([order, order[::-1]]))
        # Welford's running moments: a plain sum of squares would lose small spreads in float32.
        off = jnp.mean(both, axis=0) - mean
        mean = mean + off / (count + 1)
        squares = squares + off * (jnp.mean(both, axis=0) - mean)
        return (count + 1, mean, squares), None

    zeros = jnp.zeros((*empty.shape, players), empty.dtype)
    start = (jnp.zeros((), empty.dtype), zeros, zeros)
    (_, mean, squares), _ = jax.lax.scan(add, start, jax.random.split(key, pairs))
    standard_error = jnp.sqrt(squares / (pairs * (pairs - 1)))
    reach = float(scipy.special.stdtrit(pairs - 1, (1 + confidence) / 2)) * standard_error
    return ShapleyEstimate(mean, standard_error, mean - reach, mean + reach)


def _game(fn: Explained, x: Any, baseline: Any, groups: Any) -> tuple[Callable[[Array], Array], int]:
    """`members[M] -> v(members)`, a scalar or [B], and the number of players M."""
    x = as_arrays(x)
    baseline = baseline_like(baseline, x)
    rank = len(jax.eval_shape(lambda x: checked_output(fn(x), x), x).shape)
    leaves, treedef = jax.tree.flatten(x)
    shapes = [leaf.shape[rank:] for leaf in leaves]
    if groups is None:
        sizes = [int(np.prod(shape)) for shape in shapes]
        ends = np.cumsum(sizes)
        given = [np.arange(end - n, end).reshape(shape) for end, n, shape in zip(ends, sizes, shapes, strict=True)]
    else:
        given = [np.broadcast_to(g, shape) for g, shape in zip(treedef.flatten_up_to(groups), shapes, strict=True)]
    numbers = np.unique(np.concatenate([g.ravel() for g in given]))
    players = len(numbers)
    if not np.array_equal(numbers, np.arange(players)):
        raise ValueError(f"groups must number the players 0..M-1 without gaps, got {numbers[:10].tolist()}")
    of = treedef.unflatten([jnp.asarray(g) for g in given])

    def coalition_value(members: Array) -> Array:
        present = jax.tree.map(lambda g, leaf: jnp.broadcast_to(members[g], leaf.shape), of, x)
        return fn(jax.tree.map(jnp.where, present, x, baseline))

    return coalition_value, players
