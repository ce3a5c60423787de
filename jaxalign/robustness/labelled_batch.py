"""What every trainer of classifiers here takes as a batch: inputs with labels, and perhaps groups and row numbers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array


class LabelledBatch(NamedTuple):
    """Inputs with their classes. A tuple (x, y) or a mapping with these names will do wherever one is taken.

    x: the inputs, an array or a pytree with leaves [B, ...]
    y: [B] int, the classes
    group: [B] int, which group a row belongs to, or None
    index: [B] int, a row's number in the data set, or None
    """

    x: Any
    y: Array
    group: Array | None = None
    index: Array | None = None


AnyBatch = LabelledBatch | tuple[Any, ...] | Mapping[str, Any]


def as_labelled(batch: AnyBatch) -> LabelledBatch:
    """The batch as a LabelledBatch, x [B, ...] and y [B]. ValueError on other names or shapes, or y not of integers."""
    if isinstance(batch, Mapping):
        if not {"x", "y"} <= batch.keys() <= set(LabelledBatch._fields):
            raise ValueError(f"a labelled batch has x, y and perhaps group and index; got {sorted(batch)}")
        batch = LabelledBatch(**batch)
    elif not isinstance(batch, LabelledBatch):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(f"a labelled batch is a pair (x, y), a mapping or a LabelledBatch; got {type(batch)}")
        batch = LabelledBatch(*batch)
    for name in ("y", "group", "index"):
        value = getattr(batch, name)
        if value is not None and (jnp.ndim(value) != 1 or not jnp.issubdtype(jnp.result_type(value), jnp.integer)):
            raise ValueError(
                f"a labelled batch needs {name} [B] of integers, got {jnp.shape(value)} {jnp.result_type(value)}"
            )
    rows = len(batch.y)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    if any(shape[:1] != (rows,) for shape in shapes):
        raise ValueError(f"a labelled batch needs leaves [B, ...] with B = {rows}, the length of y; got {shapes}")
    return batch
