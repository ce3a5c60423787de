"""Reading traced programs: what decides, on a CPU, whether a loop or a batch of them pays."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Every equation of a program, those of nested programs (loops, branches, calls) included."""
    for equation in jaxpr.eqns:
        yield equation
        yield from nested(equation)


def nested(equation: Any) -> Iterator[Any]:
    """Every equation of the programs [...] that one equation runs."""
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
        if isinstance(value, Jaxpr | ClosedJaxpr):
            yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def scan_counts(equation: Any) -> tuple[int, int]:
    """Of a `scan`'s operands [...], how many are constants, and how many constants and carries together.

    Told apart by their shapes, as JAX 0.10 and 0.11 name the counts differently: what is scanned over, and what is
    collected, has an axis more outside the body than inside.
    """
    body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
    pairs = zip(equation.invars, body.invars, strict=True)
    scanned = sum(outside.aval.ndim > inside.aval.ndim for outside, inside in pairs)
    pairs = zip(equation.outvars, body.outvars, strict=True)
    kept = sum(outside.aval.ndim == inside.aval.ndim for outside, inside in pairs)
    return len(equation.invars) - scanned - kept, len(equation.invars) - scanned


def largest_value(jaxpr: ClosedJaxpr) -> int:
    """Elements of the largest array [...] that a program computes; 0 if it computes nothing."""
    sizes = (math.prod(getattr(v.aval, "shape", ())) for e in equations(jaxpr.jaxpr) for v in e.outvars)
    return max(sizes, default=0)


def has_primitive(jaxpr: ClosedJaxpr, name: str) -> bool:
    """Whether a program of any shapes [...] applies this primitive ("conv_general_dilated")."""
    return any(equation.primitive.name == name for equation in equations(jaxpr.jaxpr))
