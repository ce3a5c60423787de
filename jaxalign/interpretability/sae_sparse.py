"""Products with k entries to a row, for a CPU, where a dense product spends its time on zeros.

Decoding gathers k rows of W for each row of the batch. Its transpose, which gradients need, would be a scatter, which
runs one entry after another; entries sorted by feature make it a gather as well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array

UNROLLED = 32  # gathers that XLA fuses into one loop over the output
LANES = 64  # partial sums that vector units keep apart


class Plan(NamedTuple):
    """Entries (b, j) of indices [B, k] sorted by feature.

    rows [N], slots [N]: where each sorted entry stands in the batch, slots = b k + j; N = B k
    start [F], count [F]: a feature's entries are slots[start : start + count]
    """

    rows: Array
    slots: Array
    start: Array
    count: Array


def plan_of(indices: Array, features: int) -> Plan:
    """Sort the entries of indices [B, k], each in 0..features-1."""
    k, flat = indices.shape[1], indices.reshape(-1)
    entries = jnp.arange(flat.size, dtype=jnp.int32)
    if features * flat.size < 2**31:
        # One array of keys sorts several times faster than keys with values beside them.
        keys = jnp.sort(flat * flat.size + entries)
        feature, slots = keys // flat.size, keys % flat.size
    else:
        feature, slots = jax.lax.sort((flat, entries), num_keys=1)
    bounds = jnp.searchsorted(feature, jnp.arange(features + 1, dtype=feature.dtype), method="scan")
    return Plan(slots // k, slots, bounds[:-1], bounds[1:] - bounds[:-1])


def gather_rows(values: Array, indices: Array, w: Array) -> Array:
    """out[b] = sum_j values[b, j] w[indices[b, j]], [B, D], of values and indices [B, k] and w [F, D]."""

    def some(values: Array, indices: Array) -> Array:
        return sum(value[:, None] * w[index] for value, index in zip(values, indices, strict=True))

    return sum(_by_groups(some, values.T, indices.T, lambda parts: parts.sum(axis=0)))


def gather_dots(indices: Array, w: Array, g: Array) -> Array:
    """out[b, j] = w[indices[b, j]] . g[b], [B, k], of indices [B, k], w [F, D] and g [B, D]."""
    whole = w.shape[1] // LANES * LANES

    def lanes(index: Array) -> Array:
        # Sums along an array are taken one number after another; sums of slices are not.
        parts = [w[index, i : i + LANES] * g[:, i : i + LANES] for i in range(0, whole, LANES)]
        if whole < w.shape[1]:
            tail = w[index, whole:] * g[:, whole:]
            parts.append(jnp.pad(tail, ((0, 0), (0, LANES - tail.shape[1]))))
        return sum(parts)

    def some(indices: Array) -> Array:
        return jnp.stack([lanes(index) for index in indices]).sum(axis=-1)

    return jnp.concatenate(_by_groups(some, indices.T, lambda parts: parts.reshape(-1, parts.shape[-1]))).T


def _by_groups(function: Any, *arrays_and_join: Any) -> list[Array]:
    """`function` of UNROLLED rows of the arrays at a time, its outputs joined, and of the rows that are left."""
    *arrays, join = arrays_and_join
    whole = len(arrays[0]) // UNROLLED * UNROLLED
    out = [] if whole == len(arrays[0]) else [function(*(x[whole:] for x in arrays))]
    if whole == UNROLLED:
        return [function(*(x[:whole] for x in arrays)), *out]
    if whole:
        parts = tuple(x[:whole].reshape(-1, UNROLLED, *x.shape[1:]) for x in arrays)
        out.insert(0, join(jax.lax.map(lambda part: function(*part), parts)))
    return out


def scatter_rows(plan: Plan, values: Array, x: Array) -> Array:
    """out[f] = sum of values[b, j] x[b] over the entries (b, j) of feature f, [F, D]: the transpose of `gather_rows`.

    Each feature takes its first `size` entries by gathers; what is left over is gathered in further groups of `size`,
    of which there are at most N / size however the entries are spread, and only these are scattered.
    """
    features, entries = plan.start.shape[0], plan.rows.shape[0]
    size = min(32, max(4, 1 << (entries // features).bit_length()))
    values = values.reshape(-1)[plan.slots]

    def groups(begin: Array, left: Array) -> Array:
        out = jnp.zeros((begin.shape[0], x.shape[1]), x.dtype)
        for i in range(size):
            at = jnp.minimum(begin + i, entries - 1)
            out = out + jnp.where(i < left, values[at], 0.0)[:, None] * x[plan.rows[at]]
        return out

    further = jnp.maximum(-(-plan.count // size) - 1, 0)
    ends = jnp.cumsum(further)
    group = jnp.arange(entries // size, dtype=ends.dtype)
    feature = jnp.searchsorted(ends, group, side="right")
    known = jnp.minimum(feature, features - 1)
    skip = size * (1 + group - (ends - further)[known])
    left = jnp.where(group < ends[-1], plan.count[known] - skip, 0)
    rest = groups(plan.start[known] + skip, left)
    return groups(plan.start, plan.count).at[feature].add(rest, mode="drop", indices_are_sorted=True)


@jax.custom_vjp
def pick(x: Array, w: Array, bias: Array, z: Array, indices: Array, plan: Plan) -> Array:
    """The entries [B, k] at indices [B, k] of z = x w + bias [B, F], which is given; w [D, F], bias [F].

    Gradients go to x, w and bias as they would through z.
    """
    return jnp.take_along_axis(z, indices, axis=1)


def _pick_forward(x: Array, w: Array, bias: Array, z: Array, indices: Array, plan: Plan) -> tuple[Array, Any]:
    return pick(x, w, bias, z, indices, plan), (x, w, indices, plan)


def _pick_backward(saved: Any, g: Array) -> tuple[Array | None, ...]:
    x, w, indices, plan = saved
    bias = jnp.zeros(w.shape[1], g.dtype).at[indices].add(g)
    return gather_rows(g, indices, w.T), scatter_rows(plan, g, x).T, bias, None, None, None


pick.defvjp(_pick_forward, _pick_backward)


@jax.custom_vjp
def combine(values: Array, indices: Array, plan: Plan, w: Array) -> Array:
    """`gather_rows(values, indices, w)` [B, D], with gradients to values and w."""
    return gather_rows(values, indices, w)


def _combine_forward(values: Array, indices: Array, plan: Plan, w: Array) -> tuple[Array, Any]:
    return combine(values, indices, plan, w), (values, indices, plan, w)


def _combine_backward(saved: Any, g: Array) -> tuple[Array | None, ...]:
    values, indices, plan, w = saved
    return gather_dots(indices, w, g), None, None, scatter_rows(plan, values, g)


combine.defvjp(_combine_forward, _combine_backward)
