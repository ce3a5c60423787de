"""The walk over a flat program that every certificate shares: known values are folded, the rest is a domain's to bound.

A domain is a function `(step, operands) -> outputs`, called where at least one operand is abstract: `Bounds` for
intervals, a node of a graph for CROWN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.certification.bounds import Abstract
from jaxalign.certification.flat_program import FlatProgram, Step, flatten
from jaxalign.certification.named_functions import NamedFunction, recognise
from jaxalign.programs import scan_counts

Domain = Callable[[Step, list[Any]], list[Any]]
LIBRARIES = ("/jax/", "/flax/", "/optax/", "/jaxalign/certification/", "/jaxalign/robustness/")  # not the user's code
EXACT = {name: jax.lax.Precision.HIGHEST for name in ("dot_general", "conv_general_dilated")}


class UnsupportedPrimitive(NotImplementedError):
    """A step that has no sound rule: the message names the primitive, where it came from and what to do."""


def evaluate(program: FlatProgram, arguments: Sequence[Any], domain: Domain) -> list[Any]:
    """The outputs of a program whose arguments are arrays [...] or abstract values."""
    values = dict(program.known)
    values.update(zip(program.inputs, arguments, strict=True))
    for step in recognise(program).steps:
        operands = [values[v] for v in step.inputs]
        bounded = any(isinstance(v, Abstract) for v in operands)
        outputs = domain(step, operands) if bounded else fold(step, operands)
        values.update(zip(step.outputs, outputs, strict=True))
    return [values[v] for v in program.outputs]


def fold(step: Step, operands: Sequence[Any]) -> list[Any]:
    """The step on known arrays [...]: now if they are concrete, so that a branch they decide can be taken."""
    if any(isinstance(v, jax.core.Tracer) for v in operands):
        return bind(step, operands)
    with jax.ensure_compile_time_eval():
        return bind(step, operands)


def bind(step: Step, operands: Sequence[Any]) -> list[Any]:
    """The step's own primitive on arrays [...], products in full precision whatever the default is."""
    if isinstance(step.primitive, NamedFunction):
        return [step.primitive.function(*operands, **step.params)]
    params = step.primitive.get_bind_params(step.params)
    if step.name in EXACT:
        params = {**params, "precision": (EXACT[step.name],) * 2}
    found = step.primitive.bind(*operands, **params)
    return list(found) if step.primitive.multiple_results else [found]


def known_branch(step: Step, operands: Sequence[Any]) -> tuple[FlatProgram, list[Any]]:
    """The program that a `cond` or `switch` on a known index takes, and its arguments [...]."""
    index, *arguments = operands
    if isinstance(index, Abstract):
        raise unsupported(step, "its branch depends on the bounded input")
    if isinstance(index, jax.core.Tracer):
        raise unsupported(step, "its branch is not known while tracing")
    branches = step.params["branches"]
    return flatten(branches[int(np.clip(index, 0, len(branches) - 1))]), arguments


def loop_parts(step: Step, operands: Sequence[Any]) -> tuple[FlatProgram, list[Any], list[Any], list[Any]]:
    """The body of a `scan` and its operands [...]: constants, first carries, what is scanned over."""
    first, last = scan_counts(step.source[0])
    return flatten(step.params["jaxpr"]), list(operands[:first]), list(operands[first:last]), list(operands[last:])


def unsupported(step: Step, reason: str = "it has no rule") -> UnsupportedPrimitive:
    """The error for a step on abstract values [...], to be raised."""
    return UnsupportedPrimitive(
        f"cannot bound the primitive `{step.name}`: {reason} ({_place(step)}). "
        "Write that part with other operations, or bound the function up to there and from there on."
    )


def _place(step: Step) -> str:
    """The line of the user's own code that made the step, and the module it stands in."""
    shapes = ", ".join(str(v.aval) for equation in step.source[:1] for v in equation.invars)
    stack = next((str(e.source_info.name_stack) for e in step.source if str(e.source_info.name_stack)), "")
    frames = [f for e in step.source for f in getattr(e.source_info.traceback, "frames", ())]
    mine = next((f for f in frames if not any(part in f.file_name for part in LIBRARIES)), None)
    where = f"{mine.file_name}:{mine.line_num} in {mine.function_name}" if mine else "no source line known"
    return f"on {shapes}; {where}" + (f"; in {stack}" if stack else "")
