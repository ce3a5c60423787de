"""Ranges and lines of powers of one number."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.certification.hull_lines import hull_lines
from jaxalign.certification.relaxations import Elementwise, Lines
from jaxalign.certification.smooth_curve import LARGE, LOG_LARGE, lines_inside, smooth
from jaxalign.types import Array

SMALLEST, FURTHEST = 1e-8, 1e12  # where the upper end must lie for a real power to have sloped lines
STEEPEST = 1e-12  # the slope of a root is taken no nearer to 0


def integer_power(exponent: int) -> Elementwise:
    """x^n, x [...], for any whole n; for n < 0 undefined at 0, so an interval around 0 has the range (-inf, inf)."""
    if exponent < 0:
        return _negative_power(exponent)
    if exponent < 2:
        return _line(float(exponent))
    even = exponent % 2 == 0
    furthest = min(math.exp(LOG_LARGE / exponent), LARGE)
    return smooth(
        lambda x: jax.lax.integer_pow(x, exponent),
        lambda x: exponent * jax.lax.integer_pow(x, exponent - 1),
        convex=(None if even else 0.0, None),
        lowest=0.0 if even else -math.inf,
        within=(-furthest, furthest),
    )


def _line(slope: float) -> Elementwise:
    """x for slope 1, and 1 for slope 0."""

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        shape = lower.shape if alpha is None else jnp.shape(alpha)
        line = jnp.full(shape, slope, lower.dtype), jnp.full(shape, 1 - slope, lower.dtype)
        return Lines(*line, *line)

    def f(x: Array) -> Array:
        return x if slope else jnp.ones_like(x)

    return Elementwise(lambda lower, upper: (f(lower), f(upper)), relax, lambda lower, _: jnp.zeros(lower.shape, bool))


def _negative_power(exponent: int) -> Elementwise:
    """x^n with n < 0, from its convex branch on x > 0: f(-x) = (-1)^n f(x)."""
    odd = exponent % 2 == 1
    nearest = math.exp(-LOG_LARGE / (2 - exponent))

    def f(x: Array) -> Array:
        return jax.lax.integer_pow(x, exponent)

    def slope(x: Array) -> Array:
        return exponent * jax.lax.integer_pow(x, exponent - 1)

    def image(lower: Array, upper: Array) -> tuple[Array, Array]:
        known = (lower > 0) | (upper < 0)
        ends = f(jnp.where(known, lower, 1.0)), f(jnp.where(known, upper, 1.0))
        return jnp.where(known, jnp.minimum(*ends), -jnp.inf), jnp.where(known, jnp.maximum(*ends), jnp.inf)

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        turned = upper < 0
        low, high = jnp.where(turned, -upper, lower), jnp.where(turned, -lower, upper)

        def draw(low: Array, high: Array) -> Lines:
            lines = hull_lines(f, slope, low, high, alpha)
            mirrored = Lines(-lines.lower_slope, lines.lower_intercept, -lines.upper_slope, lines.upper_intercept)
            if odd:
                below, low_height, above, high_height = lines
                mirrored = Lines(above, -high_height, below, -low_height)
            return jax.tree.map(lambda kept, other: jnp.where(turned, other, kept), lines, mirrored)

        inside = (low >= nearest) & (high <= LARGE)
        return lines_inside(inside, draw, low, high, image(lower, upper), 1.0)

    return Elementwise(image, relax)


def real_power(exponent: Any) -> Elementwise:
    """x^p on x >= 0 (x > 0 if p < 0) for a known p, a number or an array [...] of the shape of x; it may be traced.

    Convex for p <= 0 and p >= 1, concave between. An interval with negative numbers has the range (-inf, inf), unless
    p is a known whole number, which is `integer_power`.
    """
    if not isinstance(exponent, jax.core.Tracer) and np.ndim(exponent) == 0 and float(exponent).is_integer():
        return integer_power(int(exponent))
    p = exponent if isinstance(exponent, float) else jnp.asarray(exponent)
    root = {0.5: jnp.sqrt, -0.5: jax.lax.rsqrt}.get(p) if isinstance(p, float) else None

    def f(x: Array) -> Array:
        """x^p, with no infinite derivative at 0."""
        positive = jnp.where(x > 0, x, 1.0)
        value = jnp.power(positive, p) if root is None else root(positive)
        return jnp.where(x > 0, value, jnp.where(jnp.greater(p, 0), 0.0, jnp.where(jnp.less(p, 0), jnp.inf, 1.0)))

    def slope(x: Array) -> Array:
        positive = jnp.maximum(x, STEEPEST)
        return p * f(positive) / positive

    def image(lower: Array, upper: Array) -> tuple[Array, Array]:
        known = lower >= 0
        ends = f(jnp.where(known, lower, 1.0)), f(jnp.where(known, upper, 1.0))
        return jnp.where(known, jnp.minimum(*ends), -jnp.inf), jnp.where(known, jnp.maximum(*ends), jnp.inf)

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        rises = jnp.greater(p, 0)
        growth = jnp.where(rises, p, jnp.subtract(p, 2.0))
        sizes = (growth * jnp.log(jnp.maximum(v, STEEPEST)) for v in (lower, upper))
        inside = (lower >= jnp.where(rises, 0.0, STEEPEST)) & (upper >= SMALLEST) & (upper <= FURTHEST)
        inside &= jnp.maximum(*sizes) <= LOG_LARGE
        sign = jnp.where(jnp.less_equal(p, 0) | jnp.greater_equal(p, 1), 1.0, -1.0).astype(lower.dtype)
        draw = lambda low, high: hull_lines(f, slope, low, high, alpha, sign=sign)  # noqa: E731
        return lines_inside(inside, draw, lower, upper, image(lower, upper), 1.0)

    return Elementwise(image, relax)
