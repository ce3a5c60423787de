"""How fast a function can change: upper bounds of Lipschitz constants, everywhere or in a box, and their use."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.certification.bounds import Abstract
from jaxalign.certification.flat_program import Step, trace
from jaxalign.certification.interpreter import bind, evaluate, known_branch, unsupported
from jaxalign.certification.interval import interval_bounds
from jaxalign.certification.spectral_bounds import spectral_norm_upper_bound
from jaxalign.types import Array, ArrayLike

NORMS = ("l2", "linf")
LARGEST_OPERATOR = 1 << 23  # entries of a convolution written out as a matrix: 32 MB

STEEPEST = {  # sup |f'|, rounded up; GELU's is Phi(sqrt 2) + sqrt(2) phi(sqrt 2), its approximation's a little more
    **dict.fromkeys(("abs", "asinh", "atan", "clamp", "cos", "elu", "leaky_relu", "sin", "softplus", "tanh"), 1.0),
    **dict.fromkeys(("max", "min", "reduce_max", "reduce_min", "sort", "logsumexp"), 1.0),
    "gelu": 1.1289042,
    "gelu_tanh": 1.1289931,
    "silu": 1.0998394,
    "erf": 1.1283792,
    "logistic": 0.25,
    "softmax": 0.5,
}
SUMS = ("add", "add_any", "sub")
CHOICES = ("concatenate", "max", "min", "select_n")  # each element of the result is an element of one operand
PRODUCTS = ("mul", "div", "dot_general", "conv_general_dilated")
LINEAR = {
    *("add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "cumsum", "dynamic_slice", "gather"),
    *("expand_dims", "neg", "pad", "reduce_precision", "reduce_sum", "reduce_window_sum", "reshape", "rev"),
    *("scatter", "scatter-add", "scatter_add", "select_n", "slice", "split", "squeeze", "sub", "tile", "transpose"),
}


@dataclasses.dataclass(frozen=True)
class Slope(Abstract):
    """A value [...] of the program: it changes by at most `constant` times the change of the input."""

    constant: Array
    shape: tuple[int, ...]
    dtype: Any


def lipschitz_upper_bound(fn: Callable[[Array], Any], x: Any, *, norm: str = "l2") -> Array:
    """A constant L with |fn(a) - fn(b)| <= L |a - b| for all inputs a and b, both norms "l2" or both "linf".

    The product of the steps' own constants: of a linear step the operator norm (in "linf" the largest absolute row sum,
    exactly; in "l2" `spectral_norm_upper_bound` of a matrix, of a small convolution written out as one, and of a larger
    one min(sqrt(|A|_1 |A|_inf), sqrt(r) |K|) with the kernel K as a matrix [h w I, O] and r the patches that hold one
    pixel (Tsuzuku et al. 2018, arXiv:1802.04034, corollary 1)); of a function of one number its steepest slope. The
    constants of branches that are added add; parts that are concatenated, or compared by max, are parts of one vector.

    Args:
        fn: of one example, any jittable function: x [...] -> an array or a pytree. `lambda x: apply(x[None])[0]` makes
            one of a batched classifier.
        x: an input, or anything with its shape and dtype.

    Returns a scalar, a pure function of the arrays that `fn` closes over: it may be jitted and differentiated.
    Raises ValueError for another norm, UnsupportedPrimitive for a step without a constant that holds everywhere (a
    product of two values that depend on x, exp): `local_lipschitz_bound` may do there.
    """
    _known(norm)
    shape = jax.ShapeDtypeStruct(jnp.shape(x), x.dtype if hasattr(x, "dtype") else jnp.result_type(float))
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(f"lipschitz_upper_bound: x must be floating point, got {shape.dtype}")
    one = Slope(jnp.ones((), jnp.promote_types(shape.dtype, jnp.float32)), shape.shape, shape.dtype)
    outputs = evaluate(trace(fn, shape), [one], functools.partial(_slope_step, norm))
    return _side_by_side([v.constant for v in outputs if isinstance(v, Slope)], norm)


def local_lipschitz_bound(
    fn: Callable[[Array], Array], lower: ArrayLike, upper: ArrayLike, *, norm: str = "l2"
) -> Array:
    """A constant L with |fn(a) - fn(b)| <= L |a - b| for all a and b in the box [lower, upper].

    `interval_bounds` of the Jacobian over the box, J = max(|lower|, |upper|) entry by entry; then the largest row sum
    of J in "linf", and in "l2" the smaller of sqrt(|J|_1 |J|_inf) and `spectral_norm_upper_bound(J)`. In a box in which
    every ReLU is known to be on or off it is the constant of that linear piece (in "l2" of its absolute values); in a
    wide one it may exceed `lipschitz_upper_bound`.

    Args:
        fn: of one example, x [...] -> [...], of whose derivative the interval rules know every step.
        lower, upper: [...], the box.

    Returns a scalar, infinite where the Jacobian may be. Raises as `interval_bounds` does; ValueError for another norm.
    """
    _known(norm)
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)
    jacobian = interval_bounds(jax.jacfwd(fn), lower, upper)
    entries = jnp.maximum(jnp.abs(jacobian.lower), jnp.abs(jacobian.upper)).reshape(-1, lower.size)
    rounding = 1 + jnp.finfo(entries.dtype).eps * sum(entries.shape)
    rows, columns = (jnp.max(jnp.sum(entries, axis=axis)) * rounding for axis in (1, 0))
    if norm == "linf":
        return rows
    finite = jnp.all(jnp.isfinite(entries))
    spectral = spectral_norm_upper_bound(jnp.where(finite, entries, 0.0))
    return jnp.where(finite, jnp.minimum(jnp.sqrt(rows * columns), spectral), jnp.inf)


def lipschitz_radius(logits: ArrayLike, y: ArrayLike, constant: ArrayLike, *, norm: str = "l2") -> Array:
    """The radius within which no input changes the class of a classifier of Lipschitz constant `constant`.

    max(0, z_y - max_{j != y} z_j) / (c constant), with c = sqrt(2) for "l2" and 2 for "linf": what a difference of two
    logits can change in that norm (Tsuzuku et al. 2018, arXiv:1802.04034, proposition 1).

    Args:
        logits: [..., C]. y: [...] int, the classes to certify. constant: scalar or [...], of the logits as a vector.

    Returns [...], in the units of x and in the norm of the constant; 0 where the class is another already,
    or y is none.
    """
    _known(norm)
    logits, y = jnp.asarray(logits), jnp.asarray(y)
    if logits.ndim < 1 or y.shape != logits.shape[:-1]:
        raise ValueError(f"lipschitz_radius: needs logits [..., C] and y [...], got {logits.shape} and {y.shape}")
    own = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    margin = jnp.sum(jnp.where(own, logits, 0.0), -1) - jnp.max(jnp.where(own, -jnp.inf, logits), -1)
    margin = jnp.where(jnp.any(own, -1), jnp.maximum(margin, 0.0), 0.0)  # no such class: nothing is certified
    return margin / ((math.sqrt(2.0) if norm == "l2" else 2.0) * jnp.asarray(constant))


def _slope_step(norm: str, step: Step, operands: list[Any]) -> list[Any]:
    """The slopes of a step's results [...]; at least one operand is a Slope."""
    if step.name == "cond":
        program, arguments = known_branch(step, operands)
        return evaluate(program, arguments, functools.partial(_slope_step, norm))
    slopes = [v for v in operands if isinstance(v, Slope)]
    constants = [v.constant for v in slopes]
    if step.name == "select_n" and isinstance(operands[0], Slope):
        raise unsupported(step, "its choice depends on the input, so it may jump")
    if len(slopes) == 1 and (gain := _gain(norm, step, operands)) is not None:
        constant = constants[0] * gain
    elif step.name in SUMS:
        constant = functools.reduce(jnp.add, constants)
    elif step.name in CHOICES:
        constant = _side_by_side(constants, norm)
    else:
        raise unsupported(step, "no Lipschitz constant that holds everywhere is known for it")
    return [Slope(constant, v.shape, v.dtype) for v in _result_shapes(step, operands)]


def _result_shapes(step: Step, operands: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    given = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Slope) else v for v in operands]
    shapes = jax.eval_shape(lambda *values: bind(step, values), *given)
    if any(not jnp.issubdtype(v.dtype, jnp.floating) for v in shapes):
        raise unsupported(step, "its result is not floating point, so it jumps")
    return shapes


def _gain(norm: str, step: Step, operands: Sequence[Any]) -> ArrayLike | None:
    """The Lipschitz constant of a step of one Slope and known arrays [...]; None if there is no rule."""
    if step.name in STEEPEST:
        if step.name == "sort" and len(operands) > 1:
            raise unsupported(step, "what is sorted along with the input jumps")
        return STEEPEST[step.name]
    x = next(v for v in operands if isinstance(v, Slope))
    if step.name == "log_softmax":  # I - 1 p^T, at its worst where p is one class
        return 2.0 if norm == "linf" else math.sqrt(x.shape[step.params["axis"]])
    if step.name == "reduce_window_max":
        windows = (step.params[name] for name in ("window_dimensions", "window_strides", "window_dilation"))
        return 1.0 if norm == "linf" else math.sqrt(_overlap(*windows))
    if step.name in LINEAR or (step.name in PRODUCTS and not (step.name == "div" and operands[0] is not x)):
        return _operator_norm(norm, step, operands)
    return None


def _operator_norm(norm: str, step: Step, operands: Sequence[Any]) -> Array:
    """The norm of a linear step A of one Slope [...] from the row sums |A| 1 and the column sums 1 |A|."""
    place = next(i for i, v in enumerate(operands) if isinstance(v, Slope))
    x = operands[place]
    product = step.name in PRODUCTS

    def absolute(value: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            return value
        return jnp.abs(value) if product else jnp.zeros_like(value)  # what is only added has no part in a difference

    known = [v if i == place else absolute(v) for i, v in enumerate(operands)]

    def run(value: Array) -> list[Array]:
        return bind(step, [value if i == place else v for i, v in enumerate(known)])

    rows, transpose = jax.vjp(run, jnp.ones(x.shape, x.dtype))
    (columns,) = transpose([jnp.ones_like(v) for v in rows])
    most_in_row = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(v), initial=0.0) for v in rows])
    most_in_column = jnp.max(jnp.abs(columns), initial=0.0)
    terms = 2 if step.name in ("mul", "div") else math.prod(x.shape) + sum(v.size for v in rows)
    if product or "sum" in step.name or "scatter" in step.name:  # what rounding may have taken away
        most_in_row, most_in_column = (v * (1 + terms * jnp.finfo(v.dtype).eps) for v in (most_in_row, most_in_column))
    if norm == "linf":
        return most_in_row
    bound = jnp.sqrt(most_in_row * most_in_column)
    if step.name == "dot_general":
        return jnp.minimum(bound, _matrix_norm(step, operands, place))
    if step.name == "conv_general_dilated":
        return jnp.minimum(bound, _convolution_norm(step, operands, place, rows[0].size))
    return bound


def _matrix_norm(step: Step, operands: Sequence[Any], place: int) -> Array:
    """Of x times a known matrix: the largest of its batch of matrices [..., contracted, free], each by Gram's bound."""
    contracted, batched = (sides[1 - place] for sides in step.params["dimension_numbers"])
    w = jnp.asarray(operands[1 - place])
    free = [axis for axis in range(w.ndim) if axis not in (*contracted, *batched)]
    w = jnp.transpose(w, (*batched, *contracted, *free))
    sizes = [math.prod(w.shape[a:b]) for a, b in ((0, len(batched)), (len(batched), len(batched) + len(contracted)))]
    return jnp.max(spectral_norm_upper_bound(w.reshape(*sizes, -1)))


def _convolution_norm(step: Step, operands: Sequence[Any], place: int, outputs: int) -> Array:
    """Of x convolved with a known kernel [...]: written out if that is small, else by its patches; or infinity."""
    x, params = operands[place], step.params
    inputs = math.prod(x.shape)
    if inputs * outputs <= LARGEST_OPERATOR:
        basis = jnp.eye(inputs, dtype=x.dtype).reshape(inputs, *x.shape)
        run = lambda value: bind(step, [value if i == place else v for i, v in enumerate(operands)])[0]  # noqa: E731
        return spectral_norm_upper_bound(jax.vmap(run)(basis).reshape(inputs, outputs))
    groups = params["feature_group_count"] * params["batch_group_count"]
    if place or groups > 1 or any(d > 1 for d in params["lhs_dilation"]):
        return jnp.asarray(jnp.inf)
    kernel = jnp.asarray(operands[1])
    out, *rest = params["dimension_numbers"].rhs_spec
    window = [kernel.shape[axis] for axis in rest[1:]]
    matrix = jnp.transpose(kernel, (*rest, out)).reshape(-1, kernel.shape[out])
    repeats = _overlap(window, params["window_strides"], params["rhs_dilation"])
    return math.sqrt(repeats) * spectral_norm_upper_bound(matrix)


def _overlap(window: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> int:
    """How many windows can hold one element [...]: taps of a window that a shift by the stride maps onto each other."""
    return math.prod(-(-w // (s // math.gcd(s, d))) for w, s, d in zip(window, strides, dilation, strict=True))


def _side_by_side(constants: Sequence[Array], norm: str) -> Array:
    """Of parts [...] of one vector. 0 without any: a constant function."""
    if not constants:
        return jnp.zeros(())
    if norm == "linf" or len(constants) == 1:
        return functools.reduce(jnp.maximum, constants)
    return jnp.sqrt(sum(constant**2 for constant in constants))


def _known(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
