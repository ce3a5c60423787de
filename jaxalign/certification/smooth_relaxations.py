"""Ranges and lines of the smooth functions of one number; `SMOOTH` holds them by the name of their JAX primitive.

Lines are finite where the interval lies in the part of the domain named beside each function; elsewhere (infinite ends,
values near overflow) the slope is 0 and the intercepts are the range. Where the function is undefined for some x of the
interval (a logarithm of a negative number, 1 / 0) the range is (-inf, inf): never NaN.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.certification.hull_lines import Curve
from jaxalign.certification.periodic_relaxations import wave
from jaxalign.certification.power_relaxations import integer_power, real_power
from jaxalign.certification.relaxations import Elementwise, Lines
from jaxalign.certification.smooth_curve import LARGE, LOG_LARGE, lines_inside, smooth
from jaxalign.types import Array


def monotone_step(f: Curve) -> Elementwise:
    """A rising function that jumps (sign, round, floor, ceil), [...] -> [...]: its range, and flat lines."""

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        shape = lower.shape if alpha is None else jnp.shape(alpha)
        low, high = (jnp.broadcast_to(f(v), shape) for v in (lower, upper))
        return Lines(jnp.zeros_like(low), low, jnp.zeros_like(high), high)

    return Elementwise(lambda lower, upper: (f(lower), f(upper)), relax, lambda lower, upper: f(lower) < f(upper))


def _absolute_value() -> Elementwise:
    def image(lower: Array, upper: Array) -> tuple[Array, Array]:
        return jnp.abs(jnp.clip(0.0, lower, upper)), jnp.maximum(jnp.abs(lower), jnp.abs(upper))

    def relax(lower: Array, upper: Array, alpha: Array | None = None) -> Lines:
        """Below, any line through the origin with a slope in [-1, 1]; above, the chord."""

        def draw(lower: Array, upper: Array) -> Lines:
            crossing = (lower < 0) & (upper > 0)
            side = jnp.sign(lower + upper)
            free = side if alpha is None else 2 * alpha - 1
            shape = jnp.shape(free)
            crossing, side, lower, upper = (jnp.broadcast_to(v, shape) for v in (crossing, side, lower, upper))
            chord = jnp.where(crossing, (upper + lower) / jnp.where(crossing, upper - lower, 1.0), side)
            below = jnp.where(crossing, free, side)
            height = jnp.maximum(jnp.abs(lower) - chord * lower, jnp.abs(upper) - chord * upper)
            return Lines(below, jnp.zeros_like(below), chord, jnp.where(crossing, height, 0.0))

        inside = jnp.isfinite(lower) & jnp.isfinite(upper)
        return lines_inside(inside, draw, lower, upper, image(lower, upper), 1.0)

    def start(lower: Array, upper: Array) -> Array:
        return (1 + jnp.sign(lower + upper)) / 2

    return Elementwise(image, relax, lambda lower, upper: (lower < 0) & (upper > 0), start)


def elu(alpha: Any = 1.0) -> Elementwise:
    """x [...] where x > 0, else alpha (exp(x) - 1), with alpha >= 0: convex for alpha <= 1."""

    def f(x: Array) -> Array:
        return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0.0)))

    def slope(x: Array) -> Array:
        return jnp.where(x > 0, 1.0, alpha * jnp.exp(jnp.minimum(x, 0.0)))

    if isinstance(alpha, float):
        return smooth(f, slope, convex=(None, None if alpha <= 1 else 0.0))
    return smooth(f, slope, convex=(None, jnp.where(alpha <= 1, jnp.inf, 0.0)))


def _sigmoid_slope(x: Array) -> Array:
    return jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)  # as a product it is precise where one of the two is close to 1


def _silu_slope(x: Array) -> Array:
    return jax.nn.sigmoid(x) * (1 + x * jax.nn.sigmoid(-x))


def _bell(x: Array) -> Array:
    """The standard normal density [...]."""
    return jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _gelu(x: Array) -> Array:
    return x * jax.lax.erfc(-x / math.sqrt(2)) / 2


def _gelu_slope(x: Array) -> Array:
    return jax.lax.erfc(-x / math.sqrt(2)) / 2 + x * _bell(x)


def _tanh_gelu_gate(x: Array) -> tuple[Array, Array]:
    """(v, dv/dx) for the gate sigmoid(v) of the GELU with tanh."""
    scale = 2 * math.sqrt(2 / math.pi)
    return scale * (x + 0.044715 * x * x * x), scale * (1 + 3 * 0.044715 * x * x)


def _tanh_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(_tanh_gelu_gate(x)[0])


def _tanh_gelu_slope(x: Array) -> Array:
    gate, rate = _tanh_gelu_gate(x)
    return jax.nn.sigmoid(gate) + x * rate * _sigmoid_slope(gate)


def _from(f: Curve, floor: float) -> Curve:
    """f [...] -> [...], to the left of `floor` as at `floor`: where it has died out, and -inf times 0 would be NaN."""
    return lambda x: f(jnp.maximum(x, floor))


TWO_OVER_ROOT_PI = 2 / math.sqrt(math.pi)
LOG_2 = math.log(2)
EXPONENTIAL = (-LARGE, LOG_LARGE)

SMOOTH: dict[str, Elementwise] = {
    "square": integer_power(2),
    "reciprocal": integer_power(-1),
    "sqrt": real_power(0.5),
    "rsqrt": real_power(-0.5),
    "abs": _absolute_value(),
    "exp": smooth(jnp.exp, jnp.exp, within=EXPONENTIAL),
    "exp2": smooth(jnp.exp2, lambda x: LOG_2 * jnp.exp2(x), within=(-LARGE, LOG_LARGE / LOG_2)),
    "expm1": smooth(jnp.expm1, jnp.exp, within=EXPONENTIAL),
    "log": smooth(jnp.log, lambda x: 1 / x, sign=-1.0, defined=0.0, within=(1e-12, 1e12)),
    "log1p": smooth(jnp.log1p, lambda x: 1 / (1 + x), sign=-1.0, defined=-1.0, within=(-0.999999, 1e12)),
    "tanh": smooth(jnp.tanh, lambda x: 4 * _sigmoid_slope(2 * x), convex=(None, 0.0)),
    "logistic": smooth(jax.nn.sigmoid, _sigmoid_slope, convex=(None, 0.0)),
    "erf": smooth(jax.lax.erf, lambda x: TWO_OVER_ROOT_PI * jnp.exp(-x * x), convex=(None, 0.0)),
    "erfc": smooth(jax.lax.erfc, lambda x: -TWO_OVER_ROOT_PI * jnp.exp(-x * x), convex=(0.0, None), lowest=math.inf),
    "atan": smooth(jnp.atan, lambda x: 1 / (1 + x * x), convex=(None, 0.0)),
    "asinh": smooth(jnp.asinh, lambda x: jax.lax.rsqrt(1 + x * x), convex=(None, 0.0)),
    "sinh": smooth(jnp.sinh, jnp.cosh, convex=(0.0, None), within=(-LOG_LARGE, LOG_LARGE)),
    "cosh": smooth(jnp.cosh, jnp.sinh, lowest=0.0, within=(-LOG_LARGE, LOG_LARGE)),
    "sin": wave(jnp.sin, jnp.cos, 0.0),
    "cos": wave(jnp.cos, lambda x: -jnp.sin(x), math.pi / 2),
    "softplus": smooth(jax.nn.softplus, jax.nn.sigmoid),
    "elu": elu(),
    # The two inflections, and the lowest point, as roots of the second and of the first derivative in float64.
    "silu": smooth(
        _from(jax.nn.silu, -1e4),
        _silu_slope,
        convex=(-2.3993572805154675, 2.3993572805154675),
        lowest=-1.278464542761074,
    ),
    "gelu": smooth(_from(_gelu, -1e4), _gelu_slope, convex=(-math.sqrt(2), math.sqrt(2)), lowest=-0.7517915246935644),
    "gelu_tanh": smooth(
        _from(_tanh_gelu, -1e4),
        _tanh_gelu_slope,
        convex=(-1.4185040087908283, 1.4185040087908283),
        lowest=-0.7524614220710163,
    ),
    "sign": monotone_step(jnp.sign),
    "round": monotone_step(jnp.round),
    "floor": monotone_step(jnp.floor),
    "ceil": monotone_step(jnp.ceil),
}
