"""Range and lines of the sine and the cosine."""

import math

import jax.numpy as jnp

from jaxalign.certification.hull_lines import Curve, hull_lines
from jaxalign.certification.relaxations import Elementwise, Lines
from jaxalign.certification.smooth_curve import lines_inside
from jaxalign.types import Array

FAR = 1e3  # beyond it the bends are placed by rounding, and lines are flat
TURN = 6.28  # a little under 2 pi: at most two bends


def wave(f: Curve, slope: Curve, phase: float) -> Elementwise:
    """f(x) = sin(x + phase), [...] -> [...], with derivative `slope`.

    The range holds 1 where a maximum lies in the interval, or so near to it that rounding could hide it; -1 likewise.
    Intervals shorter than a turn have sloped lines, longer ones their range.
    """

    def holds(lower: Array, upper: Array, peak: float) -> Array:
        first, last = ((v + phase - peak) / (2 * math.pi) for v in (lower, upper))
        slack = 4 * jnp.finfo(lower.dtype).eps * (1 + jnp.maximum(jnp.abs(first), jnp.abs(last)))
        return ~(jnp.ceil(first - slack) > jnp.floor(last + slack))  # also where an end is infinite

    def image(lower: Array, upper: Array) -> tuple[Array, Array]:
        ends = f(jnp.where(jnp.isfinite(lower), lower, 0.0)), f(jnp.where(jnp.isfinite(upper), upper, 0.0))
        low = jnp.where(holds(lower, upper, -math.pi / 2), -1.0, jnp.minimum(*ends))
        return low, jnp.where(holds(lower, upper, math.pi / 2), 1.0, jnp.maximum(*ends))

    def draw(lower: Array, upper: Array, alpha: Array | None) -> Lines:
        bend = jnp.ceil((lower + phase) / math.pi)  # the first inflection in the interval; f is concave after even ones
        start = bend * math.pi - phase
        sign = jnp.where(bend % 2 == 0, -1.0, 1.0).astype(lower.dtype)
        return hull_lines(f, slope, lower, upper, alpha, convex=(start, start + math.pi), sign=sign)

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        inside = (lower >= -FAR) & (upper <= FAR) & (upper - lower < TURN)
        return lines_inside(inside, lambda low, high: draw(low, high, alpha), lower, upper, image(lower, upper), 0.0)

    return Elementwise(image, relax)
