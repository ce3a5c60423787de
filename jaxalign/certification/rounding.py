"""Rounding paid for: bounds that hold in exact arithmetic although they are computed in floating point.

Every step's bounds are moved outward by more than the step's own computation can be wrong, so that by induction the
bounds hold for the function evaluated over the real numbers. With eps = finfo.eps, u = eps / 2, n the terms of a sum:

- moving, choosing and comparing values is exact;
- sums, products, quotients and curves: k eps |bound| + a eps, k and a from ROUNDED and CURVES;
- contractions and sums over axes: gamma_n |W| max(|lower|, |upper|) with gamma_n = n u / (1 - n u), for any order of
  summation (Higham 2002, "Accuracy and Stability of Numerical Algorithms", sections 3.1 and 4.2);
- and finfo.tiny for each term, since XLA takes results below it for 0.

What is known is a value, not an interval: parameters as they are stored (below finfo.tiny: 0), and what the program
computes from known values alone (a scaled weight, a folded normalisation) as float arithmetic makes it. Assumed are
products in full precision by plain sums (no TF32, no fast transforms), and curves as accurate as XLA's on a CPU.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxalign.certification.bounds import Bounds
from jaxalign.certification.flat_program import Step
from jaxalign.certification.interpreter import bind, unsupported
from jaxalign.certification.interval import COMPARISONS, INDEXED, LOGIC, MOVES
from jaxalign.types import Array

CHOICES = ("max", "min", "clamp", "cummax", "cummin", "reduce_max", "reduce_min", "reduce_window_max")
CHOICES += (
    "reduce_window_min",
    "sort",
    "select_n",
    "abs",
    "sign",
    "round",
    "floor",
    "ceil",
    "neg",
    "is_finite",
    "ne",
    "eq",
)
EXACT = {*MOVES, *INDEXED, *CHOICES, *COMPARISONS, *LOGIC} - {"scatter-add", "convert_element_type", "reduce_precision"}
# In units of eps: correctly rounded is 1/2, but XLA may multiply by 1 / b for a / b, and may fuse.
ROUNDED = {"add": 1, "add_any": 1, "sub": 1, "mul": 1, "square": 1, "div": 3, "sqrt": 2, "leaky_relu": 1, "pow": 4}
# (relative, absolute) in units of eps: at least twice the largest error of XLA 0.10 on a CPU against float64, over
# three million numbers from 1e-38 to 1e6, around 0 and 1 and the multiples of pi / 2.
CURVES = {
    **dict.fromkeys(("exp", "log", "rsqrt", "reciprocal"), (3, 0)),
    **dict.fromkeys(("log1p", "logistic", "softplus"), (5, 0)),
    **dict.fromkeys(("tanh", "erf", "atan", "asinh", "expm1", "elu"), (8, 0)),
    **dict.fromkeys(("sinh", "cosh"), (32, 0)),
    **dict.fromkeys(("exp2", "erfc"), (80, 0)),
    **dict.fromkeys(("sin", "cos"), (1, 1)),
    **dict.fromkeys(("silu", "gelu", "gelu_tanh"), (4, 4)),
}
SLACK = 16  # roundings of a contraction beside its sum: of centre and radius, of their products, of the widening itself


def widen(step: Step, operands: Sequence[Any], bounds: list[Bounds]) -> list[Bounds]:
    """The bounds [...] of a step's results, moved outward by what their computation from `operands` may be wrong.

    Operands are known arrays and Bounds. Raises UnsupportedPrimitive for a step whose rounding is not known.
    """
    if step.name in EXACT or not jnp.issubdtype(bounds[0].lower.dtype, jnp.floating):
        return bounds
    if step.name in ROUNDED:
        return [outward(b, ROUNDED[step.name]) for b in bounds]
    if step.name in CURVES:
        return [outward(b, *CURVES[step.name]) for b in bounds]
    if step.name == "integer_pow":
        return [outward(b, abs(step.params["y"]) + 3) for b in bounds]
    if step.name in PRECISION:
        return PRECISION[step.name](step, operands, bounds)
    if step.name in TERMS:
        return [_sum_outward(step, operands, bounds[0], TERMS[step.name](step, operands))]
    if step.name in LOGARITHMIC:
        return [LOGARITHMIC[step.name](operands[0], bounds[0], _exponential_error(step, operands[0]))]
    raise unsupported(step, "its rounding is not known")


def outward(bounds: Bounds, relative: float, absolute: float = 0.0) -> Bounds:
    """lower - e, upper + e with e = (relative |bound| + absolute) eps + tiny, [...]; itself safe in floating point.

    `relative` counts eps = 2u, of which an error of u leaves room for the rounding of this very sum.
    """
    kind = jnp.finfo(bounds.lower.dtype)

    def error(bound: Array) -> Array:
        return (relative * jnp.abs(bound) + absolute) * kind.eps + 2 * kind.tiny

    # infinity minus infinity: an infinite bound stays
    lower = jnp.where(jnp.isinf(bounds.lower), bounds.lower, bounds.lower - error(bounds.lower))
    upper = jnp.where(jnp.isinf(bounds.upper), bounds.upper, bounds.upper + error(bounds.upper))
    return Bounds(lower, upper)


def _by(bounds: Bounds, error: Array) -> Bounds:
    return Bounds(bounds.lower - error, bounds.upper + error)


def _magnitude(value: Any) -> Array:
    """The largest |v| that an operand may have, [...]."""
    if isinstance(value, Bounds):
        return jnp.maximum(jnp.abs(value.lower), jnp.abs(value.upper))
    value = jnp.asarray(value)
    return jnp.abs(value) if jnp.issubdtype(value.dtype, jnp.floating) else value  # indices stay


def _largest(value: Array) -> Array:
    return jnp.max(jnp.where(jnp.isfinite(value), value, 0), initial=0)


def _sum_outward(step: Step, operands: Sequence[Any], bounds: Bounds, terms: int) -> Bounds:
    """gamma times the same step on magnitudes, whose own rounding a factor 1 + 2 gamma covers."""
    kind = jnp.finfo(bounds.lower.dtype)
    share = (terms + SLACK) * float(kind.eps) / 2
    if share >= 0.25:
        return Bounds(jnp.full_like(bounds.lower, -jnp.inf), jnp.full_like(bounds.upper, jnp.inf))
    gamma = share / (1 - share)
    magnitudes = [_magnitude(v) for v in operands]
    (size,) = bind(step, magnitudes)
    real = [m for m in magnitudes if jnp.issubdtype(m.dtype, jnp.floating)]
    lost = terms * float(kind.tiny) * (2 + sum(_largest(m) for m in real))
    return _by(bounds, gamma * (1 + 2 * gamma) * size + lost)


def _contracted(step: Step, operands: Sequence[Any]) -> int:
    (left, _), _ = step.params["dimension_numbers"]
    shape = _shape(operands[0])
    return math.prod(shape[axis] for axis in left)


def _kernel(step: Step, operands: Sequence[Any]) -> int:
    shape = _shape(operands[1])
    return math.prod(shape) // max(1, shape[step.params["dimension_numbers"].rhs_spec[0]])


def _shape(value: Any) -> tuple[int, ...]:
    return jnp.shape(value.lower if isinstance(value, Bounds) else value)


TERMS: dict[str, Callable[[Step, Sequence[Any]], int]] = {  # how many terms one entry of the result sums
    "dot_general": _contracted,
    "conv_general_dilated": _kernel,
    "reduce_sum": lambda step, operands: math.prod(_shape(operands[0])[axis] for axis in step.params["axes"]),
    "cumsum": lambda step, operands: _shape(operands[0])[step.params["axis"]],
    "reduce_window_sum": lambda step, operands: math.prod(step.params["window_dimensions"]),
    "scatter-add": lambda step, operands: 1 + math.prod(_shape(operands[2])),
}


def _converted(step: Step, operands: Sequence[Any], bounds: list[Bounds]) -> list[Bounds]:
    """One unit of the new type where it is the coarser: the number meant is the one before the conversion."""
    before, after = operands[0].lower.dtype, bounds[0].lower.dtype
    if not jnp.issubdtype(before, jnp.floating):
        return bounds
    return bounds if jnp.finfo(before).eps >= jnp.finfo(after).eps else [outward(b, 1) for b in bounds]


def _reduced(step: Step, operands: Sequence[Any], bounds: list[Bounds]) -> list[Bounds]:
    coarser = 2.0 ** -step.params["mantissa_bits"] / float(jnp.finfo(bounds[0].lower.dtype).eps)
    return [outward(b, max(coarser, 1.0)) for b in bounds]


PRECISION = {"convert_element_type": _converted, "reduce_precision": _reduced}


def _exponential_error(step: Step, x: Bounds) -> Array:
    """How wrong a logarithm of a sum of exponentials of x [...] may be, taken term by term, in nats.

    Each of the n turns of log(exp a + exp b) = max + log1p(exp(-|a - b|)) rounds a value that lies within log n of the
    largest |x| of its row, and adds a few eps of its own.
    """
    axis = step.params["axis"]
    terms = max(1, x.lower.size if axis is None else x.lower.shape[axis])
    largest = jnp.max(_magnitude(x), axis=axis, keepdims=step.params.get("keepdims", True), initial=0)
    return 8 * jnp.finfo(x.lower.dtype).eps * (terms + 2) * (1 + math.log(terms) + largest)


def _share_outward(x: Bounds, bounds: Bounds, error: Array) -> Bounds:
    """A softmax is the exponential of a logarithm with that error: exp(error) - 1 <= 2 error while error <= 1."""
    upper = jnp.where(error <= 1, bounds.upper * (1 + 2 * error), jnp.inf)
    return outward(Bounds(jnp.where(error <= 1, bounds.lower * (1 - 2 * error), -jnp.inf), upper), 8)


LOGARITHMIC: dict[str, Callable[[Bounds, Bounds, Array], Bounds]] = {
    "log_softmax": lambda x, bounds, error: _by(bounds, error),
    "logsumexp": lambda x, bounds, error: _by(bounds, error),
    "cumlogsumexp": lambda x, bounds, error: _by(bounds, error),
    "softmax": _share_outward,
}
