"""What rounding can cost a row of coefficients in passing a step, in units of eps for each unit of coefficient.

A step's transpose adds up n numbers, so its result may be wrong by gamma_n |weights| |row|, which the parent's values
can turn into gamma_n |row| |weights| |values|. The forward step on absolute values says it for all rows at once. n is
taken as the elements of the step's result.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxalign.certification.bounds import Bounds
from jaxalign.certification.flat_program import Step
from jaxalign.certification.interpreter import bind
from jaxalign.certification.linear_graph import Node, magnitude
from jaxalign.certification.relaxations import Lines
from jaxalign.types import Array

TERMS = 16  # operations of a step beside its sum, and of the lines and planes themselves


def linear_error(step: Step, operands: Sequence[Any]) -> list[Array]:
    """For a linear or bilinear step: n |weights| |values| [...] of each result."""
    sizes = [_size(v) for v in operands]
    found = [sizes[0] + sizes[1]] if step.name == "sub" else [jnp.abs(v) for v in bind(step, sizes)]
    return [(v.size + TERMS) * v for v in found]


def lines_error(lines: Lines, box: Bounds) -> Array:
    """For a function of one number between lines: n (|slope| |x| + |intercept|) of both [...]."""
    size = magnitude(box)
    lower = jnp.abs(lines.lower_slope) * size + jnp.abs(lines.lower_intercept)
    upper = jnp.abs(lines.upper_slope) * size + jnp.abs(lines.upper_intercept)
    return (size.size + TERMS) * (lower + upper)


def _size(value: Any) -> Any:
    if isinstance(value, Node):
        return magnitude(value.bounds)
    return jnp.abs(value) if jnp.issubdtype(jnp.result_type(value), jnp.floating) else value
