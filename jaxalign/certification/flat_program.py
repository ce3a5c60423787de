"""A traced function as one flat list of steps: calls inlined, constants set apart, well-known functions recognised."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

CALLS = {  # primitive: the parameter that holds what it calls
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
# stop_gradient has no true derivative: it is dropped like the others.
IDENTITIES = {"stop_gradient", "copy", "copy_p", "name", "optimization_barrier"}


class Step(NamedTuple):
    """`outputs` = primitive(`inputs`): values by number. `source`: its equation, the calls around it."""

    name: str
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: tuple[Any, ...] = ()


class FlatProgram(NamedTuple):
    """The steps in order; `known` holds the literals and constants by number, `shapes` what is known of every value."""

    steps: list[Step]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    known: dict[int, Any]
    shapes: dict[int, Any]


def trace(function: Callable[..., Any], *arguments: Any) -> FlatProgram:
    """`function` of arrays [...] (or ShapeDtypeStructs) as a flat program of their leaves."""
    return flatten(trace_closed(function, *arguments))


def trace_closed(function: Callable[..., Any], *arguments: Any) -> ClosedJaxpr:
    """`jax.make_jaxpr` of arguments [...], traced anew: JAX keeps an old trace, with the values closed over then."""
    return jax.make_jaxpr(lambda *given: function(*given))(*arguments)


def flatten(closed: ClosedJaxpr | Jaxpr) -> FlatProgram:
    """A traced program with every call inlined, its values [...] numbered."""
    numbers = itertools.count()
    steps: list[Step] = []
    known: dict[int, Any] = {}
    shapes: dict[int, Any] = {}

    def fresh(aval: Any) -> int:
        number = next(numbers)
        shapes[number] = aval
        return number

    def constant(value: Any, aval: Any) -> int:
        number = fresh(aval)
        known[number] = value
        return number

    def inline(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[int], calls: tuple[Any, ...]) -> list[int]:
        names = dict(zip(jaxpr.invars, arguments, strict=True))
        names.update((v, constant(c, v.aval)) for v, c in zip(jaxpr.constvars, consts, strict=True))

        def read(atom: Any) -> int:
            return constant(atom.val, atom.aval) if isinstance(atom, Literal) else names[atom]

        for equation in jaxpr.eqns:
            name, inputs = equation.primitive.name, [read(v) for v in equation.invars]
            if name in CALLS:
                inner = equation.params[CALLS[name]]
                called = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
                outputs = inline(*called, inputs, (equation, *calls))
            elif name in IDENTITIES:
                outputs = inputs
            else:
                outputs = [fresh(v.aval) for v in equation.outvars]
                wiring = (tuple(inputs), tuple(outputs))
                steps.append(Step(name, equation.primitive, dict(equation.params), *wiring, (equation, *calls)))
            names.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    program = getattr(closed, "jaxpr", closed)
    inputs = [fresh(v.aval) for v in program.invars]
    outputs = inline(program, getattr(closed, "consts", ()), inputs, ())
    return FlatProgram(steps, tuple(inputs), tuple(outputs), known, shapes)


def find_at(program: FlatProgram, start: int, pattern: FlatProgram) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The inputs and outputs of `pattern`, as values [...] of `program`, if its steps stand there from `start` on.

    Otherwise None. Steps match in order, primitive, parameters, wiring and literals; nothing between is used after.
    """
    stop = start + len(pattern.steps)
    if [s.name for s in program.steps[start:stop]] != [s.name for s in pattern.steps]:
        return None
    names: dict[int, int] = {}
    for ours, theirs in zip(program.steps[start:stop], pattern.steps, strict=True):
        if not _same_params(ours.params, theirs.params):
            return None
        for mine, other in zip(ours.inputs, theirs.inputs, strict=True):
            if other in pattern.known:
                if mine not in program.known or not _same_value(program.known[mine], pattern.known[other]):
                    return None
            elif names.setdefault(other, mine) != mine:
                return None
        names.update(zip(theirs.outputs, ours.outputs, strict=True))
    if any(v not in names or not _same_shape(program.shapes[names[v]], pattern.shapes[v]) for v in pattern.inputs):
        return None
    outputs = tuple(names[v] for v in pattern.outputs)
    between = {v for s in program.steps[start:stop] for v in s.outputs} - set(outputs)
    later = {v for s in program.steps[stop:] for v in s.inputs} | set(program.outputs)
    return None if between & later else (tuple(names[v] for v in pattern.inputs), outputs)


def _same_shape(ours: Any, theirs: Any) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype


def _same_params(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours is theirs or str(ours) == str(theirs)


def _same_value(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, jax.core.Tracer) or isinstance(theirs, jax.core.Tracer):
        return ours is theirs
    mine, other = np.asarray(ours), np.asarray(theirs)
    return mine.dtype == other.dtype and np.array_equal(mine, other, equal_nan=mine.dtype.kind == "f")
