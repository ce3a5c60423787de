"""What each input contributes to an output: gradients, integrated gradients, SmoothGrad, expected gradients, occlusion.

Every function here takes `fn(x)`, any JAX function of a pytree x of floats (pixels, embeddings, features). Its value is
either a scalar, for one example, or [B], for a batch whose leaves are [B, ...] and whose rows do not see each other;
attributions come in the structure and shapes of x. Pick the output to explain in `fn`:
`lambda x: network.apply(params, x)[:, 3]`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike, Key

Explained = Callable[[Any], Array]  # pytree of leaves [...] -> scalar, or of [B, ...] -> [B]


def input_gradient(fn: Explained, x: Any) -> Any:
    """d fn(x)[b] / d x[b], in the shapes of x.

    Raises ValueError if fn(x) is neither a scalar nor [B] with B the leading axis of every leaf of x.
    """
    return jax.grad(lambda x: jnp.sum(checked_output(fn(x), x)))(as_arrays(x))


def saliency(fn: Explained, x: Any) -> Any:
    """`|d fn / d x|` (Simonyan et al. 2013, arXiv:1312.6034), in the shapes of x [...] or [B, ...]."""
    return jax.tree.map(jnp.abs, input_gradient(fn, x))


def gradient_times_input(fn: Explained, x: Any) -> Any:
    """`x * d fn / d x`, in the shapes of x [...] or [B, ...]: each input's share where fn is linear without a bias."""
    return jax.tree.map(jnp.multiply, as_arrays(x), input_gradient(fn, x))


def integrated_gradients(fn: Explained, x: Any, baseline: Any, *, steps: int = 32, chunk: int = 8) -> Any:
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365, equation 1).

    `(x - baseline) * integral over a in [0, 1] of d fn(baseline + a (x - baseline)) / d x`, by Gauss-Legendre
    quadrature: exact where fn is a polynomial of degree up to 2 steps along the line. Attributions sum to
    `fn(x) - fn(baseline)` but for the error that `completeness_residual` measures.

    Args:
        x: pytree of [...] or [B, ...] (see the module).
        baseline: where nothing is present; a pytree like x, or one array or number for all leaves, broadcast to x.
        steps: gradients taken.
        chunk: how many of them at a time; memory grows with it.

    Returns attributions in the shapes of x. Raises ValueError on steps < 1 and on a baseline that does not fit x.
    """
    x = as_arrays(x)
    baseline = baseline_like(baseline, x)
    difference = jax.tree.map(jnp.subtract, x, baseline)

    def gradient(a: Array) -> Any:
        return input_gradient(fn, jax.tree.map(lambda b, d: b + a.astype(d.dtype) * d, baseline, difference))

    points, weights = unit_quadrature(steps)
    mean = weighted_sum(gradient, weights, points, chunk=chunk)
    return jax.tree.map(jnp.multiply, difference, mean)


def completeness_residual(fn: Explained, x: Any, baseline: Any, attributions: Any) -> Array:
    """`fn(x) - fn(baseline) - sum(attributions)`, a scalar or [B]: 0 for a complete attribution.

    Holds integrated gradients (and Shapley values) to account: a residual that is large beside fn(x) - fn(baseline)
    asks for more steps.
    """
    x = as_arrays(x)
    value = checked_output(fn(x), x)
    total = sum(jnp.sum(a, axis=tuple(range(value.ndim, a.ndim))) for a in jax.tree.leaves(attributions))
    return value - fn(baseline_like(baseline, x)) - total


def smooth_grad(key: Key, fn: Explained, x: Any, *, sigma: ArrayLike, samples: int = 32, chunk: int = 8) -> Any:
    """SmoothGrad: `mean over n of d fn(x + sigma n) / d x`, n standard normal (Smilkov et al. 2017, arXiv:1706.03825).

    Args:
        x: pytree of [...] or [B, ...] (see the module).
        sigma: deviation of the noise in input units.
        samples, chunk: noisy inputs drawn, and how many at a time.

    Returns gradients in the shapes of x; take their magnitude for the paper's pictures.
    """
    x = as_arrays(x)
    leaves, treedef = jax.tree.flatten(x)

    def gradient(sample_key: Key) -> Any:
        keys = jax.random.split(sample_key, len(leaves))
        noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        return input_gradient(fn, jax.tree.map(lambda x, n: x + sigma * n, x, treedef.unflatten(noise)))

    return weighted_sum(gradient, np.full(samples, 1 / samples), jax.random.split(key, samples), chunk=chunk)


def expected_gradients(key: Key, fn: Explained, x: Any, baselines: Any, *, samples: int = 64, chunk: int = 8) -> Any:
    """Expected gradients: integrated gradients averaged over many baselines (arXiv:1906.10670, equation 3).

    `mean over s of (x - b_s) * d fn(b_s + a_s (x - b_s)) / d x`, b_s drawn from the rows of `baselines`, a_s uniform on
    the s-th of `samples` equal parts of [0, 1]. In expectation they sum to fn(x) - mean(fn(baselines)).

    Args:
        x: pytree of [...] or [B, ...] (see the module).
        baselines: pytree like x, its leaves [N, ...] for N examples; each row of a batch draws its own.
        samples, chunk: gradients taken, and how many at a time.

    Returns attributions in the shapes of x. Raises ValueError naming the shapes if baselines are no rows like x.
    """
    x, baselines = as_arrays(x), as_arrays(baselines)
    if jax.tree.structure(x) != jax.tree.structure(baselines):
        raise ValueError(f"baselines are {jax.tree.structure(baselines)}, x is {jax.tree.structure(x)}")
    leaves, rows = jax.tree.leaves(x), jax.tree.leaves(baselines)
    batch = leaves[0].shape[:1] if rows[0].ndim == leaves[0].ndim else ()
    for leaf, row in zip(leaves, rows, strict=True):
        if row.shape[1:] != leaf.shape[len(batch) :] or leaf.shape[: len(batch)] != batch:
            raise ValueError(f"expected_gradients: baselines {row.shape} are no rows like x {leaf.shape}")

    def term(place_and_key: tuple[Array, Key]) -> Any:
        place, sample_key = place_and_key
        row_key, part_key = jax.random.split(sample_key)
        chosen = jax.random.randint(row_key, batch, 0, rows[0].shape[0])
        a = (place + jax.random.uniform(part_key, batch)) / samples
        b = jax.tree.map(lambda row: row[chosen], baselines)
        at = jax.tree.map(lambda b, x: b + _per_row(a, x) * (x - b), b, x)
        return jax.tree.map(lambda g, x, b: g * (x - b), input_gradient(fn, at), x, b)

    draws = (jnp.arange(samples), jax.random.split(key, samples))
    return weighted_sum(term, np.full(samples, 1 / samples), draws, chunk=chunk)


def occlusion(
    fn: Explained,
    x: ArrayLike,
    window: Sequence[int],
    *,
    stride: Sequence[int] | None = None,
    baseline: ArrayLike = 0.0,
    chunk: int = 16,
) -> Array:
    """Occlusion: how much fn falls when a window of the input is covered (Zeiler & Fergus 2013, arXiv:1311.2901).

    `attribution[i] = mean over windows w that contain i of fn(x) - fn(where(w, baseline, x))`. Windows begin at every
    `stride`, the last ones reach past the end.

    Args:
        x: one array [...] or [B, ...].
        window: its size along the first axes of one example; the axes after those are covered whole, so that (3, 3)
            covers all channels of images [B, H, W, C].
        stride: likewise; None moves by one.
        baseline: what covers, broadcast to x.
        chunk: windows tried at a time.

    Returns [...] in the shape of x, in units of fn. Raises ValueError on a window or stride that does not fit x, and on
    a stride that leaves gaps.
    """
    x = jnp.asarray(x)
    value = checked_output(fn(x), x)
    covered, shape = baseline_like(baseline, x), x.shape[value.ndim :]
    stride = tuple(stride or (1,) * len(window))
    fits = len(window) == len(stride) <= len(shape)
    if not fits or any(not 1 <= s <= w <= n for s, w, n in zip(stride, window, shape, strict=False)):
        raise ValueError(f"occlusion: window {tuple(window)} by strides {stride} does not fit an example {shape}")
    counts = [1 - (w - n) // s for n, w, s in zip(shape, window, stride, strict=False)]
    starts = np.stack([axis.ravel() for axis in np.indices(counts)], axis=1) * np.array(stride)

    def inside(start: Array) -> Array:
        """bool, one example's shape: what the window covers."""
        covers = jnp.ones(shape, bool)
        for axis, size in enumerate(window):
            place = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            covers &= (place >= start[axis]) & (place < start[axis] + size)
        return covers

    def drop(start: Array) -> tuple[Array, Array]:
        covers = jnp.broadcast_to(inside(start), x.shape)
        fall = value - fn(jnp.where(covers, covered, x))
        return jnp.where(covers, _per_row(fall, x), 0), inside(start).astype(x.dtype)

    falls, times = weighted_sum(drop, np.ones(len(starts)), jnp.asarray(starts), chunk=chunk)
    return falls / jnp.broadcast_to(times, x.shape)


def unit_quadrature(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre points and weights on [0, 1], each [steps]. Raises ValueError on steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    points, weights = np.polynomial.legendre.leggauss(steps)
    return (1 + points) / 2, weights / 2


def weighted_sum(function: Callable[[Any], Any], weights: np.ndarray, points: Any, *, chunk: int) -> Any:
    """`sum over s of weights[s] * function(points[s])` for points with leaves [S, ...], `chunk` of them at a time."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    count = len(weights)
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)
    # Full chunks only, the surplus weighing nothing: a remainder would be compiled as a second program.
    places = np.minimum(np.arange(chunks * chunk), count - 1).reshape(chunks, chunk)
    padded = np.pad(np.asarray(weights), (0, chunks * chunk - count)).reshape(chunks, chunk)
    floats = jnp.asarray(padded, jnp.result_type(float))

    def add(total: Any, part: tuple[Array, Any]) -> tuple[Any, None]:
        w, at = part
        values = jax.vmap(function)(at)
        return jax.tree.map(lambda t, v: t + jnp.tensordot(w.astype(v.dtype), v, axes=1), total, values), None

    parts = jax.tree.map(lambda leaf: jnp.asarray(leaf)[places], points)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0, 0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (floats, parts))[0]


def as_arrays(x: Any) -> Any:
    """The leaves [...] of x as JAX arrays."""
    return jax.tree.map(jnp.asarray, x)


def baseline_like(baseline: Any, x: Any) -> Any:
    """`baseline` in the structure, shapes and types of x; one array or number serves all leaves [...].

    Raises ValueError if it is of another structure or does not broadcast.
    """
    leaves, treedef = jax.tree.flatten(as_arrays(x))
    given = jax.tree.leaves(baseline)
    if jax.tree.structure(baseline) != treedef:
        if not jax.tree_util.treedef_is_leaf(jax.tree.structure(baseline)):
            raise ValueError(f"baseline is {jax.tree.structure(baseline)}, x is {treedef}")
        given = given * len(leaves)
    for one, leaf in zip(given, leaves, strict=True):
        shape = np.shape(one)
        if len(shape) > leaf.ndim or any(n not in (1, m) for n, m in zip(shape[::-1], leaf.shape[::-1], strict=False)):
            raise ValueError(f"a baseline of shape {shape} does not broadcast to x {leaf.shape}")
    pairs = zip(given, leaves, strict=True)
    return treedef.unflatten([jnp.broadcast_to(jnp.asarray(one, leaf.dtype), leaf.shape) for one, leaf in pairs])


def checked_output(value: Array, x: Any) -> Array:
    """`value` itself. Raises ValueError unless it is a scalar, or [B] where every leaf of x is [B, ...]."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if jnp.ndim(value) and (value.ndim > 1 or any(shape[:1] != value.shape for shape in shapes)):
        raise ValueError(f"fn(x) is {value.shape}; needs a scalar, or [B] for x of leaves [B, ...], got x {shapes}")
    return value


def _per_row(values: Array, x: Array) -> Array:
    """A scalar or [B] as an array that multiplies x [...] or [B, ...]."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).astype(x.dtype)
