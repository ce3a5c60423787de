"""Two lines around a smooth function on an interval, from the convex hull of its graph.

The function is convex on [start, end] and concave on either side of it. That covers convex functions (both None), the
S-shaped (tanh: convex up to 0; x^3: convex from 0), GELU and SiLU (convex between their two inflections), one and two
bends of a sine, and by `sign` the negatives of all of them.

Whatever the slope, a line's intercept is the extreme of f(x) - slope x over both ends and the touching point, so a
slope that is a little wrong (a search that ended early, a chord of a tiny interval) gives a looser line, not a wrong
one. Lines hold up to the rounding of their terms.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.certification.relaxations import Lines
from jaxalign.types import Array

Curve = Callable[[Array], Array]

SEARCH_STEPS = 24
NARROW = 1e-3  # in units of min(1, |x|): there the tangent is as close as the chord, and better conditioned
NARROWEST = 1e-12
NEAREST = 1e-3  # alpha 0 touches a thousandth of the way in: the square root has no slope at 0


def hull_lines(
    f: Curve,
    slope: Curve,
    lower: Array,
    upper: Array,
    alpha: Array | None = None,
    *,
    convex: tuple[Any, Any] = (None, None),
    sign: Any = 1.0,
) -> Lines:
    """Lines [...] around f on the finite intervals [lower, upper], both [...], where f and its `slope` are finite.

    `sign` f(x) is convex on convex = (start, end), numbers or [...] or None for no such end, and concave elsewhere.
    A line that may touch f at more than one point touches by default where it leaves the smallest area: at the middle
    of the interval, or as near to it as a line can touch. `alpha` [..., *shape] in [0, 1] moves it over all such
    points, from left to right; 0.5 is the default.
    """
    if alpha is not None and jnp.ndim(alpha) > lower.ndim:
        lines = lambda alpha: hull_lines(f, slope, lower, upper, alpha, convex=convex, sign=sign)  # noqa: E731
        return jax.vmap(lines)(alpha)
    g, dg = jax.vmap(lambda x: sign * f(x)), jax.vmap(lambda x: sign * slope(x))
    left, right = convex[0] is not None, convex[1] is not None
    cuts = [jnp.clip(end, lower, upper) for end in convex if end is not None]
    ends = _marks(g, dg, lower, upper, *cuts)
    bend = _Bend(ends[0], ends[1], ends[2] if left else ends[0], ends[-1] if right else ends[1])
    tangents = _tangents(g, dg, bend, left, right)
    chord, middle = _chord(bend), lower + (upper - lower) / 2

    # Below: a tangent of the convex part that passes under both ends, or the chord where there is none.
    touches = tangents.any_below & (tangents.first <= tangents.last)
    best = jnp.clip(middle, tangents.first, tangents.last)
    low_point = jnp.where(touches, _between(tangents.first, best, tangents.last, alpha), lower)
    # Above: the chord, or a tangent of a concave part where f leaves the chord upward at that end.
    to_left = (lower < bend.start.x) & (bend.lower.slope > chord)
    to_right = (upper > bend.end.x) & (bend.upper.slope < chord)
    best = jnp.minimum(middle, tangents.left)
    high_point = jnp.where(to_left, _between(lower, best, tangents.left, alpha), lower)
    best = jnp.maximum(middle, tangents.right)
    high_point = jnp.where(to_right, _between(tangents.right, best, upper, alpha), high_point)

    low, high = _marks(g, dg, low_point, high_point)
    below = _line(jnp.where(touches, low.slope, chord), [bend.lower, bend.upper, low], jnp.minimum)
    above = _line(jnp.where(to_left | to_right, high.slope, chord), [bend.lower, bend.upper, high], jnp.maximum)
    up = jnp.broadcast_to(sign, lower.shape) > 0
    lines, turned = Lines(*below, *above), Lines(*above, *below)
    return jax.tree.map(lambda kept, other: jnp.where(up, kept, -other), lines, turned)


class _Mark(NamedTuple):
    """A point, and f and its slope there; each [...]."""

    x: Array
    f: Array
    slope: Array


class _Bend(NamedTuple):
    """f on [lower, upper], convex on [start, end], which is cut to the interval."""

    lower: _Mark
    upper: _Mark
    start: _Mark
    end: _Mark


class _Tangents(NamedTuple):
    """Where lines touch f: from below in [first, last] if `any_below`, from above up to `left` and from `right` on."""

    first: Array
    last: Array
    any_below: Array
    left: Array
    right: Array


def _marks(f: Curve, slope: Curve, *points: Array) -> list[_Mark]:
    """All points at once: a function evaluated in one place compiles once."""
    stacked = jnp.stack(points)
    return [_Mark(*parts) for parts in zip(points, f(stacked), slope(stacked), strict=True)]


def _line(slope: Array, marks: list[_Mark], extreme: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
    return slope, functools.reduce(extreme, [mark.f - slope * mark.x for mark in marks])


def _between(first: Array, default: Array, last: Array, alpha: Array | None) -> Array:
    if alpha is None:
        return default
    return default + (2 * alpha - 1) * (1 - NEAREST) * jnp.where(alpha < 0.5, default - first, last - default)


def _chord(bend: _Bend) -> Array:
    """(f(upper) - f(lower)) / (upper - lower), held to the slopes that f has there: rounding cannot carry it away."""
    lower, upper, *_ = bend
    width, size = upper.x - lower.x, jnp.maximum(jnp.abs(lower.x), jnp.abs(upper.x))
    wide = width > jnp.maximum(NARROW * jnp.minimum(1.0, size), NARROWEST)
    ratio = (upper.f - lower.f) / jnp.where(wide, width, 1.0)
    # Two at a time: the derivative of a minimum over an axis divides by how many equal it, which may round to none.
    least, most = (functools.reduce(extreme, [m.slope for m in bend]) for extreme in (jnp.minimum, jnp.maximum))
    return jnp.where(wide, jnp.clip(ratio, least, most), (lower.slope + upper.slope) / 2)


def _tangents(f: Curve, slope: Curve, bend: _Bend, left: bool, right: bool) -> _Tangents:
    lower, upper, start, end = bend
    searches = [(lower, start, end), (upper, start, lower)] * left  # (the anchor, from, to)
    searches += [(upper, end, start), (lower, end, upper)] * right
    if not searches:
        return _Tangents(lower.x, upper.x, jnp.ones(lower.x.shape, bool), lower.x, upper.x)
    signs = jnp.asarray([1.0, -1.0] * (len(searches) // 2), lower.x.dtype)
    signs = signs.reshape(-1, *[1] * lower.x.ndim)
    anchor, near, far = (jax.tree.map(lambda *v: jnp.stack(v), *column) for column in zip(*searches, strict=True))
    points, found = _touching(f, slope, signs, anchor, near, far)
    return _Tangents(
        first=points[0] if left else lower.x,
        last=points[-2] if right else upper.x,
        any_below=found[0] & found[-2],
        left=points[1] if left else lower.x,
        right=points[-1] if right else upper.x,
    )


def _touching(f: Curve, slope: Curve, sign: Array, anchor: _Mark, near: _Mark, far: _Mark) -> tuple[Array, Array]:
    """(the points from `near` to `far` whose tangents go through the anchors, whether there is one), each [k, ...].

    Between them sign f is convex, and its tangent at `near` passes above the anchor: bisection, returning the end at
    which it passes below. Where `near` is the anchor itself every tangent passes below, and the point is the anchor.
    The search is a constant for differentiation; its result has the derivative of the implicit function it solves.
    """

    def excess(at: _Mark, anchor: _Mark) -> Array:
        return sign * (at.f - anchor.f + at.slope * (anchor.x - at.x))

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        outside, inside = bracket
        middle = outside + (inside - outside) / 2
        passes = excess(_Mark(middle, f(middle), slope(middle)), fixed) <= 0
        return jnp.where(passes, outside, middle), jnp.where(passes, middle, inside)

    fixed, near, far = jax.lax.stop_gradient((anchor, near, far))
    _, point = jax.lax.fori_loop(0, SEARCH_STEPS, halve, (near.x, far.x))
    evaluate = lambda x: _Mark(x, f(x), slope(x))  # noqa: E731
    mark, rates = jax.lax.stop_gradient(jax.jvp(evaluate, (point,), (jnp.ones_like(point),)))
    rate = sign * rates.slope * (fixed.x - point)
    steep = jnp.abs(rate) > NARROWEST
    moves = (excess(mark, anchor) - excess(mark, fixed)) / jnp.where(steep, rate, 1.0)
    at_anchor = near.x == fixed.x
    point = jnp.where(at_anchor, anchor.x, point - jnp.where(steep, moves, 0.0))
    return point, at_anchor | (excess(far, fixed) <= 0)
