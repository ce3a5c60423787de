"""Which steps are functions of one bounded number, and which function."""

from typing import Any

import numpy as np

from jaxalign.certification.bounds import Abstract
from jaxalign.certification.flat_program import Step
from jaxalign.certification.named_functions import NamedFunction
from jaxalign.certification.relaxations import Elementwise, at_least
from jaxalign.certification.smooth_relaxations import SMOOTH, integer_power, real_power


def elementwise_of(step: Step, operands: list[Any]) -> Elementwise | None:
    """The function of the step's one bounded operand [...], its other operands known; else None."""
    abstract = [i for i, v in enumerate(operands) if isinstance(v, Abstract)]
    if isinstance(step.primitive, NamedFunction):
        return step.primitive.elementwise(*operands[1:]) if step.primitive.elementwise else None
    if len(abstract) != 1:
        return None
    if step.name in SMOOTH:
        return SMOOTH[step.name]
    if step.name == "integer_pow":
        return integer_power(step.params["y"])
    if step.name == "max":
        return at_least(operands[1 - abstract[0]])
    if step.name == "pow" and abstract == [0] and np.ndim(operands[1]) == 0:
        return real_power(operands[1])
    return None
