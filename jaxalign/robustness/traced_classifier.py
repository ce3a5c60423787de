"""A classifier as a traced program: its closed-over arrays set apart, its convolutions fit for loops."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxalign.networks.convolution import convolve
from jaxalign.programs import equations, has_primitive
from jaxalign.types import Array

CONVOLUTION = "conv_general_dilated"
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}  # what may be inlined without loss


def traced_classifier(apply: Callable[..., Array], x: Any, *extra: Any) -> ClosedJaxpr:
    """`apply` on leaves [B, ...] as a program of the same leaves, the arrays it closes over as its `consts`.

    On a CPU its convolutions become products of matrices (`jaxalign.networks.convolve`), which run as fast inside a
    loop as outside; XLA's own do not.
    """
    # A lambda of its own: JAX keeps the trace of a function object, with the values it closed over then.
    program = jax.make_jaxpr(lambda *inputs: apply(*inputs))(x, *extra)
    if jax.default_backend() != "cpu" or not has_primitive(program, CONVOLUTION):
        return program
    rewritten = functools.partial(_evaluate, program.jaxpr)
    return jax.make_jaxpr(lambda *leaves: rewritten(program.consts, leaves))(*jax.tree.leaves((x, *extra)))


def shape_signature(program: ClosedJaxpr) -> tuple[Any, ...]:
    """What programs share that differ only in the values of `consts` [...]: their text, and nested constants by id."""
    closed = [v for e in equations(program.jaxpr) for v in jax.tree.leaves(e.params, is_leaf=_closed) if _closed(v)]
    return str(program.jaxpr), tuple(id(c) for v in closed for c in v.consts)


def computed_once(values: Any, done: Array) -> Any:
    """`values`, leaves [B, ...], written to memory before any use of them; zeros if all rows are `done` [B].

    XLA's CPU compiler otherwise fuses the end of a convolution's gradient, or the start of its input, into every use:
    a FAB step then takes twice as long. It removes `lax.optimization_barrier` before it fuses, but keeps a branch.
    """
    return jax.lax.cond(jnp.all(done), lambda v: jax.tree.map(jnp.zeros_like, v), lambda v: v, values)


def _closed(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Run a program operation by operation, convolutions through `convolve`; calls that hold some are inlined."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inputs = [read(v) for v in equation.invars]
        if name == CONVOLUTION:
            params = {k: v for k, v in equation.params.items() if k != "out_sharding"}
            outputs = [convolve(*inputs, **params)]
        elif name in CALLS and has_primitive(equation.params[CALLS[name]], CONVOLUTION):
            inner = equation.params[CALLS[name]]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            found = equation.primitive.bind(*inputs, **params)
            outputs = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]
