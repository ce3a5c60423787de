"""Functions bounded better as a whole than step by step, and how they are found in a traced program.

JAX inlines most of them without a name, and a name proves nothing (a user may call anything `relu`): so a function is
recognised by its steps, which must equal those of the reference traced on the same shape in the same version of JAX.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.certification.flat_program import FlatProgram, Step, find_at, trace
from jaxalign.certification.relaxations import Elementwise, leaky_relu
from jaxalign.certification.smooth_relaxations import SMOOTH
from jaxalign.types import Array


class NamedFunction(NamedTuple):
    """`function(x [...], *parameters, **variant)`, with `parameters` known scalars after x that it `accepts`.

    elementwise(*parameters) -> Elementwise, for functions of one number; the others have
    image(lower, upper, **variant) -> (lower, upper), their exact range, and
    rewrite(lower, upper, **variant) -> function of x that says the same in steps with good linear bounds.
    """

    name: str
    function: Callable[..., Array]
    parameters: int = 0
    accepts: Callable[..., bool] = lambda *parameters: True
    variants: Callable[[int], Iterable[dict[str, Any]]] = lambda ndim: ({},)
    elementwise: Callable[..., Elementwise] | None = None
    image: Callable[..., tuple[Array, Array]] | None = None
    rewrite: Callable[..., Callable[[Array], Array]] | None = None


def recognise(program: FlatProgram) -> FlatProgram:
    """The same program with each known function as one step; its values [...] keep their numbers."""
    steps: list[Step] = []
    at = 0
    while at < len(program.steps):
        found = _named_step(program, at)
        step, length = found if found else (program.steps[at], 1)
        steps.append(step)
        at += length
    return program._replace(steps=steps)


def _named_step(program: FlatProgram, at: int) -> tuple[Step, int] | None:
    first = program.steps[at]
    for named in NAMED:
        if first.name != _first_step(named):
            continue
        operands = [program.shapes[v] for v in first.inputs if v not in program.known]
        for aval in {(v.shape, v.dtype) for v in operands}:
            for variant in named.variants(len(aval[0])):
                for mapped in range(variant.get("axis") or 0, -1, -1):
                    key = (tuple(variant.items()), mapped, bool(jax.config.jax_enable_x64))
                    pattern = _pattern(named, *aval, *key)
                    found = find_at(program, at, pattern)
                    if found and _accepted(named, program, found[0][1:]):
                        step = Step(named.name, named, variant, *found, first.source)
                        return step, len(pattern.steps)
    return None


def _accepted(named: NamedFunction, program: FlatProgram, parameters: tuple[int, ...]) -> bool:
    values = [program.known.get(v) for v in parameters]
    return all(v is not None and not isinstance(v, jax.core.Tracer) for v in values) and named.accepts(*values)


@functools.lru_cache(maxsize=512)
def _pattern(
    named: NamedFunction, shape: tuple[int, ...], dtype: Any, variant: Any, mapped: int, x64: bool
) -> FlatProgram:
    """The steps of the function, or of the same function of an axis less under `mapped` vmaps, on x [*shape]."""
    del x64  # a key of the cache: the types of literals depend on it
    given = dict(variant)
    if given.get("axis") is not None:
        given["axis"] -= mapped
    function = functools.partial(named.function, **given)
    for _ in range(mapped):
        function = jax.vmap(function)
    scalars = [jax.ShapeDtypeStruct((), dtype)] * named.parameters
    return trace(lambda *values: function(*values), jax.ShapeDtypeStruct(shape, dtype), *scalars)


@functools.lru_cache(maxsize=64)
def _first_step(named: NamedFunction) -> str:
    variant = tuple(next(iter(named.variants(1))).items())
    return _pattern(named, (2,), jnp.dtype("float32"), variant, 0, bool(jax.config.jax_enable_x64)).steps[0].name


def _axes(ndim: int) -> list[dict[str, Any]]:
    return [{"axis": axis} for axis in reversed(range(ndim))]


def _reductions(ndim: int) -> list[dict[str, Any]]:
    return [{**axis, "keepdims": keep} for axis in [*_axes(ndim), {"axis": None}] for keep in (False, True)]


def _log_sum_of_others(x: Array, axis: int) -> Array:
    """log sum_{j != i} exp x_j along `axis`, without subtracting anything: what lies left and right of i."""
    axis %= x.ndim
    edge = jnp.full_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis), -jnp.inf)
    left = jnp.concatenate([edge, jax.lax.slice_in_dim(x, 0, -1, axis=axis)], axis)
    right = jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, axis=axis), edge], axis)
    return jnp.logaddexp(jax.lax.cumlogsumexp(left, axis), jax.lax.cumlogsumexp(right, axis, reverse=True))


def _log_softmax_image(lower: Array, upper: Array, *, axis: int) -> tuple[Array, Array]:
    """x_i - log(exp x_i + sum_{j != i} exp x_j) rises in x_i and falls in every other x_j."""
    least = lower - jnp.logaddexp(lower, _log_sum_of_others(upper, axis))
    return least, upper - jnp.logaddexp(upper, _log_sum_of_others(lower, axis))


def _softmax_image(lower: Array, upper: Array, *, axis: int) -> tuple[Array, Array]:
    least, most = _log_softmax_image(lower, upper, axis=axis)
    return jnp.exp(least), jnp.exp(most)


def _shifted_log_sum(lower: Array, upper: Array, *, axis: Any, keepdims: bool) -> Callable[[Array], Array]:
    """log sum exp x as shift + log sum exp(x - shift), the shift a known array: the centre's largest value."""
    shift = jax.lax.stop_gradient(jnp.max((lower + upper) / 2, axis=axis, keepdims=True))
    outside = shift if keepdims else jnp.squeeze(shift, axis)
    return lambda x: outside + jnp.log(jnp.sum(jnp.exp(x - shift), axis=axis, keepdims=keepdims))


def _log_softmax_rewrite(lower: Array, upper: Array, *, axis: int) -> Callable[[Array], Array]:
    log_sum = _shifted_log_sum(lower, upper, axis=axis, keepdims=True)
    return lambda x: x - log_sum(x)


def _softmax_rewrite(lower: Array, upper: Array, *, axis: int) -> Callable[[Array], Array]:
    """exp(log_softmax(x)), whose inner step is recognised in turn and so keeps its exact range."""
    return lambda x: jnp.exp(jax.nn.log_softmax(x, axis=axis))


NAMED = (
    NamedFunction("softmax", jax.nn.softmax, variants=_axes, image=_softmax_image, rewrite=_softmax_rewrite),
    NamedFunction(
        "log_softmax", jax.nn.log_softmax, variants=_axes, image=_log_softmax_image, rewrite=_log_softmax_rewrite
    ),
    NamedFunction(
        "logsumexp",
        jax.nn.logsumexp,
        variants=_reductions,
        image=lambda lower, upper, **v: (jax.nn.logsumexp(lower, **v), jax.nn.logsumexp(upper, **v)),
        rewrite=_shifted_log_sum,
    ),
    NamedFunction("square", lambda x: x * x, elementwise=lambda: SMOOTH["square"]),
    NamedFunction("gelu_tanh", jax.nn.gelu, elementwise=lambda: SMOOTH["gelu_tanh"]),
    NamedFunction("gelu", functools.partial(jax.nn.gelu, approximate=False), elementwise=lambda: SMOOTH["gelu"]),
    NamedFunction("silu", jax.nn.silu, elementwise=lambda: SMOOTH["silu"]),
    NamedFunction("softplus", jax.nn.softplus, elementwise=lambda: SMOOTH["softplus"]),
    NamedFunction("elu", jax.nn.elu, elementwise=lambda: SMOOTH["elu"]),
    NamedFunction(
        "leaky_relu", jax.nn.leaky_relu, 1, accepts=lambda slope: bool(0 <= slope <= 1), elementwise=leaky_relu
    ),
)
