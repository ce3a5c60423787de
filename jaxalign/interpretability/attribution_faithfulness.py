"""Does an attribution tell the truth? Deletion and insertion, infidelity, and randomised weights.

`fn` is that of `jaxalign.interpretability.attribution`: x [...] to a scalar, or x [B, ...] to [B]; here x is one array.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import Network, path_name
from jaxalign.interpretability.attribution import Explained, baseline_like, checked_output, weighted_sum
from jaxalign.statistics import paired_difference_interval, rank_correlation
from jaxalign.types import Array, ArrayLike, Key, Params


class FaithfulnessCurve(NamedTuple):
    """fn as inputs go (deletion) or come (insertion), the most important first.

    fraction: [P + 1] of the features, from 0 to 1
    value: [..., P + 1], with [B, P + 1] for a batch
    area: [...] under value over fraction, by trapezoids
    """

    fraction: Array
    value: Array
    area: Array


class AttributionFaithfulness(NamedTuple):
    """Both curves of B examples, and how much better they are than random orders of the same features.

    deletion, insertion: FaithfulnessCurve
    random_deletion, random_insertion: [B] mean areas over random orders
    deletion_gain: [3] mean over examples of random_deletion - deletion.area, and its interval's low and high end
    insertion_gain: [3] likewise of insertion.area - random_insertion

    A gain whose interval lies above 0 says that the attribution orders features better than chance.
    """

    deletion: FaithfulnessCurve
    insertion: FaithfulnessCurve
    random_deletion: Array
    random_insertion: Array
    deletion_gain: Array
    insertion_gain: Array


def deletion_curve(
    fn: Explained, x: Array, attributions: Array, baseline: ArrayLike, *, points: int = 16, chunk: int = 8
) -> FaithfulnessCurve:
    """fn as features are replaced by the baseline, the largest attributions first (Petsiuk et al. 2018, section 4.1).

    A faithful attribution makes the curve fall early: a small area (arXiv:1806.07421).

    Args:
        x: [...] or [B, ...].
        attributions: one score per feature, in x's shape or in that of its first axes: scores [B, H, W] replace whole
            pixels of images [B, H, W, C].
        baseline: what takes the features' place, broadcast to x.
        points: into how many equal steps the features are cut; P is this, or the number of features if that is less.
        chunk: how many of these at a time.

    Raises ValueError if attributions are of another shape, on points < 1 and, outside jit, on NaN attributions.
    """
    rank = checked_output(fn(x), x).ndim
    return _curve(fn, x, baseline_like(baseline, x), _ranks(attributions, x, rank), points, chunk)


def insertion_curve(
    fn: Explained, x: Array, attributions: Array, baseline: ArrayLike, *, points: int = 16, chunk: int = 8
) -> FaithfulnessCurve:
    """fn as features come back into the baseline, those of largest attribution first: a large area is good.

    Arguments x [...] or [B, ...] and the others as in `deletion_curve`.
    """
    rank = checked_output(fn(x), x).ndim
    return _curve(fn, baseline_like(baseline, x), x, _ranks(attributions, x, rank), points, chunk)


def attribution_faithfulness(
    key: Key,
    fn: Explained,
    x: Array,
    attributions: Array,
    baseline: ArrayLike,
    *,
    points: int = 16,
    random_orders: int = 16,
    confidence: ArrayLike = 0.95,
    chunk: int = 8,
) -> AttributionFaithfulness:
    """Deletion and insertion against `random_orders` random orders of each example's features, paired by example.

    Args:
        x: [B, ...], attributions, baseline, points, chunk: as in `deletion_curve`.
        confidence: of the bootstrap intervals over examples.
    """
    if checked_output(fn(x), x).ndim != 1:
        raise ValueError("attribution_faithfulness: intervals are over examples; fn(x) must be [B]")
    order_key, deletion_key, insertion_key = jax.random.split(key, 3)
    covered, ranks = baseline_like(baseline, x), _ranks(attributions, x, 1)

    def areas(draw: Key) -> tuple[Array, Array]:
        drawn = _ranks(jax.random.uniform(draw, attributions.shape), x, 1)
        curves = (_curve(fn, x, covered, drawn, points, chunk), _curve(fn, covered, x, drawn, points, chunk))
        return curves[0].area, curves[1].area

    deletion = _curve(fn, x, covered, ranks, points, chunk)
    insertion = _curve(fn, covered, x, ranks, points, chunk)
    drawn = jax.lax.map(areas, jax.random.split(order_key, random_orders))
    random_deletion, random_insertion = jnp.mean(drawn[0], axis=0), jnp.mean(drawn[1], axis=0)

    def gain(key: Key, after: Array, before: Array) -> Array:
        ends = paired_difference_interval(key, after, before, confidence=confidence)
        return jnp.stack([jnp.mean(after - before), *ends])

    return AttributionFaithfulness(
        deletion, insertion, random_deletion, random_insertion,
        gain(deletion_key, random_deletion, deletion.area),
        gain(insertion_key, insertion.area, random_insertion),
    )  # fmt: skip


def infidelity(
    key: Key, fn: Explained, x: Array, attributions: Array, *, sigma: ArrayLike, samples: int = 64, chunk: int = 8
) -> Array:
    """`mean over n of (sum(n * attributions) - (fn(x) - fn(x - n)))^2`, n normal of deviation sigma.

    Yeh et al. 2019 (arXiv:1901.09392, definition 2.1), for attributions that are slopes, such as gradients: 0 for the
    gradient of a linear function. Integrated gradients are contributions; divide them by x - baseline first.

    Args:
        x, attributions: [...] or [B, ...], the same shape.
        sigma: in input units.
        samples, chunk: perturbations drawn, and how many at a time.

    Returns a scalar or [B], in squared units of fn.
    """
    value = checked_output(fn(x), x)
    if attributions.shape != x.shape:
        raise ValueError(f"infidelity: attributions {attributions.shape} must have the shape of x {x.shape}")

    def square(draw: Key) -> Array:
        noise = sigma * jax.random.normal(draw, x.shape, x.dtype)
        told = jnp.sum(noise * attributions, axis=tuple(range(value.ndim, x.ndim)))
        return (told - (value - fn(x - noise))) ** 2

    return weighted_sum(square, np.full(samples, 1 / samples), jax.random.split(key, samples), chunk=chunk)


def cascading_randomization(
    key: Key, network: Network, params: Params, attribute: Callable[[Params], Array], layers: Sequence[str]
) -> Array:
    """Do attributions change when the weights are randomised, layer by layer from the output? (Adebayo et al. 2018)

    After step l the first l of `layers` have the weights of a fresh `network.init`; the result [l, b] is Spearman's
    rank correlation of |attribution| with that of the trained weights. One that stays near 1 does not depend on what
    was learned (arXiv:1810.03292, section 3.1).

    Args:
        attribute: params -> attributions [B, ...]; traced once for all steps.
        layers: names of parameters or groups of them, the output layer first: ("MLP_0/Dense_1", "MLP_0/Dense_0", ...).

    Returns [L + 1, B], the first row 1. Raises ValueError on a layer that no parameter's name begins with.
    """
    fresh = network.init(key)
    level = [_level(path_name(path), layers) for path, _ in jax.tree.leaves_with_path(params)]
    if unused := [name for i, name in enumerate(layers) if i not in level]:
        names = ", ".join(path_name(path) for path, _ in jax.tree.leaves_with_path(params))
        raise ValueError(f"cascading_randomization: no parameter of layer {unused[0]!r}; there are {names}")
    levels = jax.tree.unflatten(jax.tree.structure(params), level)

    def attributions(step: Array) -> Array:
        mixed = jax.tree.map(lambda own, other, at: jnp.where(at < step, other, own), params, fresh, levels)
        value = jnp.abs(attribute(mixed))
        return value.reshape(len(value), -1)

    values = jax.lax.map(attributions, jnp.arange(len(layers) + 1))
    return jax.vmap(jax.vmap(rank_correlation), in_axes=(0, None))(values, values[0])


def _level(name: str, layers: Sequence[str]) -> int:
    """The place in `layers` of the one this parameter belongs to, or len(layers)."""
    places = [i for i, layer in enumerate(layers) if name == layer or name.startswith(layer + "/")]
    return places[0] if places else len(layers)


def _ranks(attributions: Array, x: Array, leading: int) -> Array:
    """0 for the largest attribution of each example, then 1, ...: int32 in the shape of the attributions."""
    if attributions.shape != x.shape[: attributions.ndim] or attributions.ndim <= leading:
        raise ValueError(f"attributions {attributions.shape} must have x's shape {x.shape} or that of its first axes")
    if not isinstance(attributions, jax.core.Tracer) and np.isnan(attributions).any():
        raise ValueError("attributions have NaN, which has no place in an order")
    flat = attributions.reshape(*attributions.shape[:leading], -1)
    order = jnp.argsort(-flat, axis=-1, stable=True)
    return jnp.argsort(order, axis=-1).reshape(attributions.shape)


def _curve(fn: Explained, start: Array, end: Array, ranks: Array, points: int, chunk: int) -> FaithfulnessCurve:
    """fn on the way from start to end, the features of lowest rank first."""
    value = jax.eval_shape(fn, start)
    features = int(np.prod(ranks.shape[len(value.shape) :]))
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    counts = np.round(np.linspace(0, features, min(points, features) + 1)).astype(np.int32)
    each = ranks.reshape(ranks.shape + (1,) * (start.ndim - ranks.ndim))
    values = jax.lax.map(lambda n: fn(jnp.where(each < n, end, start)), jnp.asarray(counts), batch_size=chunk)
    values = jnp.moveaxis(values, 0, -1)
    fraction = counts / features
    weights = np.diff(fraction, prepend=0) / 2 + np.diff(fraction, append=1) / 2  # of the trapezoids
    return FaithfulnessCurve(jnp.asarray(fraction, values.dtype), values, values @ jnp.asarray(weights, values.dtype))
