"""Two lines around a function of one number, on an interval: the piecewise linear functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxalign.types import Array


class Lines(NamedTuple):
    """lower_slope x + lower_intercept <= f(x) <= upper_slope x + upper_intercept on an interval; each field [...]."""

    lower_slope: Array
    lower_intercept: Array
    upper_slope: Array
    upper_intercept: Array


class Elementwise(NamedTuple):
    """A function f of one number.

    image(lower, upper) -> (lower, upper): the range of f over the interval.
    relax(lower, upper, alpha=None) -> Lines: `alpha` in [0, 1] moves the line that is free to move; None is a good one.
    unstable(lower, upper) -> bool: whether tighter bounds of x could make better lines.
    start(lower, upper) -> alpha: where a search for the best alpha begins.
    """

    image: Callable[[Array, Array], tuple[Array, Array]]
    relax: Callable[..., Lines]
    unstable: Callable[[Array, Array], Array] = lambda lower, upper: lower < upper
    start: Callable[[Array, Array], Array] = lambda lower, upper: jnp.full_like(lower, 0.5)


def leaky_relu(slope: Any = 0.0) -> Elementwise:
    """max(x, slope x) of numbers x [...] for a scalar 0 <= slope <= 1; slope 0 is ReLU.

    Where the interval holds 0 inside, the upper line is the chord and the lower goes through the origin with a slope
    between `slope` (alpha 0) and 1 (alpha 1); by default the end that leaves the smaller area (Zhang et al. 2018,
    "Efficient Neural Network Robustness Certification with General Activation Functions", section 3.3).
    """

    def value(x: Array) -> Array:
        return jnp.maximum(x, slope * x)

    def crosses(lower: Array, upper: Array) -> Array:
        return (lower < 0) & (upper > 0)

    def smaller_area(lower: Array, upper: Array) -> Array:
        return (upper > -lower).astype(lower.dtype)

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        crossing = crosses(lower, upper)
        stable = jnp.where(lower >= 0, 1.0, slope).astype(lower.dtype)
        # The chord (upper - slope lower) / (upper - lower), written so that no infinite or empty interval gives NaN.
        ratio = 1 / (1 + jnp.where(crossing, -lower, 1.0) / jnp.where(crossing, upper, 1.0))  # upper / (upper - lower)
        chord = jnp.where(crossing, slope + (1 - slope) * ratio, stable)
        choice = smaller_area(lower, upper) if alpha is None else alpha
        below = jnp.where(crossing, slope + (1 - slope) * choice, stable)
        height = jnp.where(crossing, -(1 - slope) * ratio * jnp.where(crossing, lower, 0.0), 0.0)
        return Lines(below, jnp.zeros_like(below), chord, height)

    return Elementwise(lambda lower, upper: (value(lower), value(upper)), relax, crosses, smaller_area)


def at_least(floor: Array) -> Elementwise:
    """max(x, floor) for a known `floor` [...]: floor + relu(x - floor)."""
    relu = leaky_relu()

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        lines = relu.relax(lower - floor, upper - floor, alpha)
        return Lines(
            lines.lower_slope,
            lines.lower_intercept + floor * (1 - lines.lower_slope),
            lines.upper_slope,
            lines.upper_intercept + floor * (1 - lines.upper_slope),
        )

    return Elementwise(
        lambda lower, upper: (jnp.maximum(lower, floor), jnp.maximum(upper, floor)),
        relax,
        lambda lower, upper: relu.unstable(lower - floor, upper - floor),
        lambda lower, upper: relu.start(lower - floor, upper - floor),
    )
