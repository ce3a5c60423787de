"""The rules of a smooth function of one number from the function, its derivative and where it bends."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.certification.hull_lines import Curve, hull_lines
from jaxalign.certification.relaxations import Elementwise, Lines
from jaxalign.types import Array

LARGE = 1e6  # beyond it lines would be made of rounding
LOG_LARGE = 64.0  # exp of it is 6e27: its products with x and its second derivative stay finite in float32


def smooth(
    f: Curve,
    slope: Curve,
    *,
    convex: tuple[Any, Any] = (None, None),
    sign: Any = 1.0,
    lowest: float = -math.inf,
    defined: float = -math.inf,
    within: tuple[float, float] = (-LARGE, LARGE),
) -> Elementwise:
    """The rules of a function f with derivative `slope`, both [...] -> [...]; see `hull_lines` for `convex` and `sign`.

    Args:
        lowest: f falls up to here and rises from here; -inf for a rising function, inf for a falling one.
        defined: f is undefined to the left of this.
        within: where f and its first two derivatives are finite, and lines are drawn.
    """

    def image(lower: Array, upper: Array) -> tuple[Array, Array]:
        known = lower >= defined
        lower, upper = jnp.where(known, lower, max(defined, 0.0)), jnp.where(known, upper, max(defined, 0.0))
        # An infinite end has no derivative: 0, where some of these functions would make it NaN.
        lower, upper = (jnp.where(jnp.isfinite(v), v, jax.lax.stop_gradient(v)) for v in (lower, upper))
        if math.isinf(lowest):
            low, high = (f(lower), f(upper)) if lowest < 0 else (f(upper), f(lower))
        else:
            low, high = f(jnp.clip(lowest, lower, upper)), jnp.maximum(f(lower), f(upper))
        return jnp.where(known, low, -jnp.inf), jnp.where(known, high, jnp.inf)

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        inside = (lower >= within[0]) & (upper <= within[1])
        draw = lambda lower, upper: hull_lines(f, slope, lower, upper, alpha, convex=convex, sign=sign)  # noqa: E731
        return lines_inside(inside, draw, lower, upper, image(lower, upper), max(within[0], 1.0))

    return Elementwise(image, relax)


def lines_inside(
    inside: Array, draw: Any, lower: Array, upper: Array, image: tuple[Array, Array], elsewhere: float
) -> Lines:
    """Lines [..., *shape]: draw(lower, upper) where `inside` [*shape], else the flat ones of `image`.

    The drawing sees `elsewhere` for the intervals it is not used on, so that no gradient of theirs is NaN.
    """
    safe = (jnp.where(inside, side, elsewhere).astype(lower.dtype) for side in (lower, upper))
    lines = draw(*safe)
    inside, low, high = (jnp.broadcast_to(v, lines.lower_slope.shape) for v in (inside, *image))
    flat = Lines(jnp.zeros_like(low), low, jnp.zeros_like(high), high)
    return jax.tree.map(lambda drawn, flat: jnp.where(inside, drawn, flat), lines, flat)
