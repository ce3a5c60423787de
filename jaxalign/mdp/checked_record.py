"""Records of arrays that are checked when they are made, and not when a transformation takes them apart."""

import dataclasses
from typing import Any, Self

import jax
import numpy as np

from jaxalign.types import Array

STOCHASTIC_TOLERANCE = 1e-4  # float32 rows over thousands of states sum to 1 only so closely


class CheckedRecord:
    """Base of a frozen dataclass whose `__init__` checks its arrays [...], then stores them by `_set`, and which is a
    pytree. Decorate it with jax.tree_util.register_pytree_with_keys_class."""

    def _set(self, *children: Any) -> None:
        for field, child in zip(dataclasses.fields(self), children, strict=True):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, child)

    def replace(self, **changes: Any) -> Self:
        """The same record with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], None]:
        """The pytree protocol."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in names), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, ...]) -> Self:
        """The pytree protocol; unchecked, since transformations pass tracers, batches and placeholders through here."""
        record = object.__new__(cls)
        record._set(*children)
        return record


def check_rows(name: str, probability: Array) -> None:
    """Raise ValueError, outside jit, naming the place in `probability` [..., S] that is no distribution."""
    if traced(probability):
        return
    rows = np.asarray(probability)
    for problem, bad in (
        ("is negative or not a number", ~(rows >= 0.0)),
        ("does not sum to 1", np.abs(rows.sum(-1, dtype=np.float64) - 1.0) > STOCHASTIC_TOLERANCE),
    ):
        if bad.any():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            found = rows[at] if bad.ndim == rows.ndim else rows.sum(-1)[at]
            raise ValueError(f"{name}{list(at) if at else ''} {problem}: {found}")


def traced(x: Any) -> bool:
    """Whether an array [...] has no values yet to check."""
    return isinstance(x, jax.core.Tracer)
