"""A lower and an upper bound of every value: what goes into a certificate and what comes out of it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array


class Abstract:
    """A value known only by its bounds; everything else in a program is a known array [...]."""


@flax.struct.dataclass
class Bounds(Abstract):
    """lower <= value <= upper, element by element: arrays [...] or pytrees of one structure."""

    lower: Any
    upper: Any


def input_box(x: Any, epsilon: Any, bounds: tuple[Any, Any] | None = None) -> Bounds:
    """The L-infinity ball of radius `epsilon` around x [...], cut to the box `bounds` = (lo, hi)."""
    lower, upper = jax.tree.map(lambda v: v - epsilon, x), jax.tree.map(lambda v: v + epsilon, x)
    if bounds is not None:
        lower, upper = (jax.tree.map(lambda v: jnp.clip(v, *bounds), side) for side in (lower, upper))
    return Bounds(lower, upper)


def check_box(name: str, lower: Any, upper: Any) -> tuple[list[Array], list[Array], Any]:
    """The leaves [...] of both sides as arrays, and their tree structure.

    Raises ValueError naming `name`: trees or shapes that differ, values that are not floating point; and, outside a
    trace, a lower above its upper, an infinite side or NaN.
    """
    lows, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, lower))
    highs, other = jax.tree.flatten(jax.tree.map(jnp.asarray, upper))
    if structure != other:
        raise ValueError(f"{name}: lower and upper differ in structure: {structure} and {other}")
    for i, (low, high) in enumerate(zip(lows, highs, strict=True)):
        leaf = f"leaf {i} of " if len(lows) > 1 else ""
        if low.shape != high.shape or low.dtype != high.dtype:
            shapes = f"{low.dtype}{list(low.shape)} and {high.dtype}{list(high.shape)}"
            raise ValueError(f"{name}: {leaf}lower and upper must agree in shape and type, got {shapes}")
        if not jnp.issubdtype(low.dtype, jnp.floating):
            raise ValueError(f"{name}: {leaf}lower and upper must be floating point, got {low.dtype}")
        if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer):
            _check_values(name, leaf, np.asarray(low), np.asarray(high))
    return lows, highs, structure


def _check_values(name: str, leaf: str, low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]) -> None:
    infinite = ~(np.isfinite(low) & np.isfinite(high))
    for wrong, words in ((infinite, "must be finite"), (low > high, "lower above upper")):
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(f"{name}: {leaf}the box at {list(place)} is [{low[place]}, {high[place]}]: {words}")
