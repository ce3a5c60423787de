"""A property of a network as the set of inputs and outputs that would break it."""

from typing import NamedTuple, Self

import numpy as np

Values = np.ndarray


class UnsafeCase(NamedTuple):
    """Inputs in a box whose outputs y [K] satisfy every row of `weights @ y <= offsets`: one way to break a property.

    lower, upper: [N], the box. weights: [M, K], offsets: [M]; with no row every output counts. All float64.
    """

    lower: Values
    upper: Values
    weights: Values
    offsets: Values

    def excess(self, y: Values) -> float:
        """max over rows of weights @ y - offsets at an output y [K], in float64: not above 0 where y is unsafe."""
        values = self.weights @ np.asarray(y, np.float64).reshape(-1) - self.offsets
        return float(values.max()) if values.size else -np.inf

    def holds(self, x: Values) -> bool:
        """Whether the input x [N] is in the box, compared in float64."""
        x = np.asarray(x, np.float64).reshape(-1)
        return bool(((x >= self.lower) & (x <= self.upper)).all())


class Property(NamedTuple):
    """What a network must never do: be in any of `cases`. A counterexample is in one of them.

    num_inputs N and num_outputs K: of the network, both flattened.
    """

    cases: tuple[UnsafeCase, ...]
    num_inputs: int
    num_outputs: int

    def broken_by(self, x: Values, y: Values) -> bool:
        """Whether the input x [N] with its output y [K] is a counterexample."""
        return any(case.holds(x) and case.excess(y) <= 0 for case in self.cases)

    def check(self) -> Self:
        """Itself. Raises ValueError naming the case for shapes that do not fit, an infinite box or an empty one."""
        for i, case in enumerate(self.cases):
            rows = len(case.offsets)
            wanted = {"lower": (self.num_inputs,), "upper": (self.num_inputs,), "weights": (rows, self.num_outputs)}
            for name, shape in wanted.items():
                if getattr(case, name).shape != shape:
                    raise ValueError(f"case {i}: {name} must be {list(shape)}, got {list(getattr(case, name).shape)}")
            for name, values in case._asdict().items():
                if not np.isfinite(values).all():
                    raise ValueError(f"case {i}: {name} must be finite")
            if (case.lower > case.upper).any():
                j = int(np.argmax(case.lower > case.upper))
                raise ValueError(f"case {i}: lower {case.lower[j]} is above upper {case.upper[j]} at input {j}")
        return self


def misclassification(lower: Values, upper: Values, label: int, num_classes: int) -> Property:
    """The property that all x in the box `lower`, `upper` [N] get class `label`: y[label] > y[j] for every other j."""
    lower, upper = (np.asarray(side, np.float64).reshape(-1) for side in (lower, upper))
    rows = np.eye(num_classes)[label] - np.eye(num_classes)
    cases = (UnsafeCase(lower, upper, rows[j : j + 1], np.zeros(1)) for j in range(num_classes) if j != label)
    return Property(tuple(cases), len(lower), num_classes).check()
