"""Balls and boxes: what an attacker may change, over an array [B, ...] or a pytree of them (pixels, embeddings).

A norm is taken over all leaves of a row together. A box is `bounds=(lower, upper)`, scalars or arrays that broadcast
to x, or a pair of pytrees in the shape of x, or None. Everything is in the units of x.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxalign.types import Array, ArrayLike, Key

NORMS = ("linf", "l2", "l1")
BISECTIONS = 30  # float32 tells apart no more


def norms(delta: Any, norm: str) -> Array:
    """The norm of each row: max |delta_i|, sqrt(sum delta_i^2) or sum |delta_i|.

    Args:
        delta: leaves [B, ...].
        norm: "linf", "l2" or "l1".

    Returns [B]. The gradient of the L2 norm at 0 is 0.
    """
    rows = flatten_rows(delta)
    match known(norm):
        case "linf":
            return jnp.max(jnp.abs(rows), axis=1)
        case "l2":
            # The inner where keeps sqrt's infinite slope at 0 out of the gradient.
            squares = jnp.sum(rows**2, axis=1)
            return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
        case _:
            return jnp.sum(jnp.abs(rows), axis=1)


def project(delta: Any, epsilon: ArrayLike, norm: str) -> Any:
    """The nearest point to each row of `delta`, in Euclidean distance, of the ball `norms(delta, norm) <= epsilon`.

    linf: clip(delta, -epsilon, epsilon). l2: delta min(1, epsilon / |delta|). l1: sign(delta) max(|delta| - theta, 0)
    with the theta that makes the norm epsilon, found by sorting (Duchi et al. 2008, "Efficient projections onto the
    l1-ball").

    Args:
        delta: leaves [B, ...].
        epsilon: scalar or [B], not negative.
        norm: "linf", "l2" or "l1".

    Returns leaves [B, ...]; a row inside the ball comes back as it is.
    """
    match known(norm):
        case "linf":
            return jax.tree.map(lambda d: jnp.clip(d, -_over(epsilon, d), _over(epsilon, d)), delta)
        case "l2":
            size = norms(delta, "l2")
            scale = jnp.where(size > epsilon, epsilon / jnp.where(size > 0, size, 1.0), 1.0)
            return jax.tree.map(lambda d: d * _over(scale, d).astype(d.dtype), delta)
        case _:
            theta = _l1_threshold(jnp.abs(flatten_rows(delta)), epsilon)
            return jax.tree.map(lambda d: jnp.sign(d) * jnp.maximum(jnp.abs(d) - _over(theta, d), 0), delta)


def clip_to_box(x: Any, bounds: Any) -> Any:
    """min(max(x, lower), upper) on leaves [B, ...]; x itself when `bounds` is None."""
    if bounds is None:
        return x
    lower, upper = bounds
    if jax.tree.structure(lower) == jax.tree.structure(x) and jax.tree.structure(upper) == jax.tree.structure(x):
        return jax.tree.map(_clip, x, lower, upper)
    return jax.tree.map(lambda leaf: _clip(leaf, lower, upper), x)


def project_onto(x: Any, delta: Any, epsilon: ArrayLike, norm: str, bounds: Any) -> Any:
    """A perturbation of `x` inside ball and box: `clip_to_box(x + project(delta, epsilon, norm), bounds) - x`.

    Clipping towards a box that holds x makes no coordinate of delta larger, so the result stays in the ball of every
    norm; for "linf" it is the nearest point of the intersection. For "l1", where clipping afterwards may leave much of
    the radius unused, `project_l1_in_box` takes its place, which is the nearest point.

    Args:
        x: leaves [B, ...], inside the box.
        delta: leaves [B, ...].

    Returns leaves [B, ...].
    """
    if norm == "l1" and bounds is not None:
        least, most = (
            flatten_rows(jax.tree.map(jnp.subtract, clip_to_box(_filled(x, value), bounds), x))
            for value in (-jnp.inf, jnp.inf)
        )
        delta = unflatten_rows(project_l1_in_box(flatten_rows(delta), least, most, epsilon), x)
    else:
        delta = project(delta, epsilon, norm)
    moved = clip_to_box(jax.tree.map(jnp.add, x, delta), bounds)
    return delta if bounds is None else jax.tree.map(jnp.subtract, moved, x)


def project_l1_in_box(delta: Array, least: ArrayLike, most: ArrayLike, epsilon: ArrayLike) -> Array:
    """The nearest point with `sum |d_i| <= epsilon` and `least <= d <= most`, where `least <= 0 <= most`.

    `d_i = sign(delta_i) min(max(|delta_i| - theta, 0), room_i)` with room_i the distance to the side delta_i points to
    and the smallest theta >= 0 that keeps the sum within epsilon, by bisection (Croce & Hein 2021, arXiv:2103.01208,
    proposition 2.1). Projecting onto the ball first and clipping then is farther from delta.

    Args:
        delta: [B, D].
        least, most: scalars or [B, D], may be infinite.
        epsilon: scalar or [B].

    Returns [B, D].
    """
    size = jnp.abs(delta)
    room = jnp.broadcast_to(jnp.where(delta > 0, most, jnp.negative(least)), size.shape)
    epsilon = jnp.broadcast_to(jnp.asarray(epsilon, size.dtype), size.shape[:1])

    def shrunk(theta: Array) -> Array:
        return jnp.minimum(jnp.maximum(size - theta[:, None], 0), room)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        fits = jnp.sum(shrunk(middle), axis=1) <= epsilon
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    most_theta = jnp.max(size, axis=1)
    _, theta = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(epsilon), most_theta))
    theta = jnp.where(jnp.sum(shrunk(jnp.zeros_like(theta)), axis=1) <= epsilon, 0.0, theta)
    return jnp.sign(delta) * shrunk(theta)


def steepest_direction(gradient: Any, norm: str) -> Any:
    """argmax over the unit ball of `sum(gradient * direction)`: the first-order worst perturbation of that size.

    linf: sign(gradient). l2: gradient / |gradient|. l1: the sign of the largest coordinate, there alone (the first
    of several). A zero gradient gives zero.

    Args:
        gradient: leaves [B, ...].

    Returns leaves [B, ...].
    """
    match known(norm):
        case "linf":
            return jax.tree.map(jnp.sign, gradient)
        case "l2":
            # Scaled by the largest coordinate first: the squares of a saturated network's gradient underflow.
            largest = jnp.maximum(norms(gradient, "linf"), jnp.finfo(jnp.float32).tiny)
            scaled = jax.tree.map(lambda g: g / _over(largest, g).astype(g.dtype), gradient)
            # At least 1 unless all is 0. XLA turns a / b / c into a / (b c), and a tiny floor here would make b c 0.
            size = jnp.maximum(norms(scaled, "l2"), 1.0)
            return jax.tree.map(lambda g: g / _over(size, g).astype(g.dtype), scaled)
        case _:
            rows = flatten_rows(gradient)
            largest = jnp.argmax(jnp.abs(rows), axis=1)
            return unflatten_rows(jax.nn.one_hot(largest, rows.shape[1], dtype=rows.dtype) * jnp.sign(rows), gradient)


def random_in_ball(key: Key, like: Any, epsilon: ArrayLike, norm: str) -> Any:
    """A perturbation for each row, uniform in the ball of radius `epsilon`.

    linf: uniform coordinates. l2: a Gaussian's direction times epsilon u^(1/D). l1: Laplace coordinates over their
    absolute sum, times the same radius.

    Args:
        like: leaves [B, ...] that give shapes and dtypes, D numbers a row.
        epsilon: scalar or [B].

    Returns leaves [B, ...].
    """
    rows = flatten_rows(like)
    direction_key, radius_key = jax.random.split(key)
    if known(norm) == "linf":
        unit = jax.random.uniform(direction_key, rows.shape, rows.dtype, minval=-1.0, maxval=1.0)
    else:
        draw = jax.random.normal if norm == "l2" else jax.random.laplace
        direction = draw(direction_key, rows.shape, rows.dtype)
        radius = jax.random.uniform(radius_key, rows.shape[:1], rows.dtype) ** (1.0 / rows.shape[1])
        unit = direction * (radius / norms(direction, norm))[:, None]
    return unflatten_rows(unit * _over(epsilon, unit), like)


def flatten_rows(tree: Any) -> Array:
    """The leaves [B, ...] of a pytree side by side, as [B, D]."""
    leaves = jax.tree.leaves(tree)
    chex.assert_equal_shape_prefix(leaves, 1)
    return jnp.concatenate([jnp.reshape(leaf, (leaf.shape[0], -1)) for leaf in leaves], axis=1)


def unflatten_rows(rows: Array, like: Any) -> Any:
    """Undo `flatten_rows`: [B, D] as leaves [B, ...] in the shapes of `like`."""
    _, restore = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), like))
    return jax.vmap(restore)(rows)


def known(norm: str) -> str:
    """The norm itself. Raises ValueError if it is not one of "linf", "l2", "l1"; no arrays [...] are touched."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    return norm


def _over(value: ArrayLike, leaf: Array) -> Array:
    """A scalar or [B] in the rank and dtype of a leaf [B, ...]."""
    value = jnp.asarray(value, leaf.dtype)
    return value.reshape(value.shape + (1,) * (leaf.ndim - value.ndim))


def _filled(x: Any, value: float) -> Any:
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, value), x)


def _clip(leaf: Array, lower: ArrayLike, upper: ArrayLike) -> Array:
    lower, upper = (
        jnp.reshape(b, (1,) * (leaf.ndim - jnp.ndim(b)) + jnp.shape(b)).astype(leaf.dtype) for b in (lower, upper)
    )
    return jnp.clip(leaf, lower, upper)


def _l1_threshold(sizes: Array, epsilon: ArrayLike) -> Array:
    """theta [B] >= 0 with sum_i max(sizes[b, i] - theta[b], 0) = epsilon, or 0 where the sum is smaller as it is."""
    epsilon = jnp.broadcast_to(jnp.asarray(epsilon, sizes.dtype), sizes.shape[:1])
    ordered = -jnp.sort(-sizes, axis=1)
    excess = jnp.cumsum(ordered, axis=1) - epsilon[:, None]
    counts = jnp.arange(1, sizes.shape[1] + 1, dtype=sizes.dtype)[None, :]
    # The coordinates left are a prefix of the sorted ones: those larger than the threshold they would give.
    last = jnp.sum(ordered * counts > excess, axis=1) - 1
    theta = jnp.take_along_axis(excess / counts, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
    return jnp.where(epsilon > 0, jnp.maximum(theta, 0), jnp.inf)
