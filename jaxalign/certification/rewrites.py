"""Steps written with others that have good lines: largest values with ReLU, max(a, b) = b + relu(a - b), and powers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.certification.bounds import Bounds
from jaxalign.types import Array

# (parameters of the step, its operands' bounds) -> the same function of its operands
Rewrite = Callable[[dict[str, Any], Sequence[Any]], Callable[..., Array]]


def larger(a: Array, b: Array) -> Array:
    """max(a, b) [...], linear but for one ReLU."""
    return b + jnp.maximum(a - b, 0)


def knockout(entrants: Sequence[Array]) -> Array:
    """The largest of arrays of one shape [...], by rounds of pairs: the fewest ReLUs one behind another."""
    while len(entrants) > 1:
        pairs = zip(entrants[0::2], entrants[1::2], strict=False)
        odd = entrants[-1:] if len(entrants) % 2 else []
        entrants = [larger(a, b) for a, b in pairs] + list(odd)
    return entrants[0]


def _smaller(params: dict[str, Any], operands: Sequence[Any]) -> Callable[..., Array]:
    del params, operands
    return lambda a, b: -jnp.maximum(-a, -b)


def _clamp(params: dict[str, Any], operands: Sequence[Any]) -> Callable[..., Array]:
    del params, operands
    return lambda low, x, high: -jnp.maximum(-jnp.maximum(x, low), -high)


def _reduce_max(params: dict[str, Any], operands: Sequence[Any]) -> Callable[..., Array]:
    del operands
    axes = params["axes"]

    def function(x: Array) -> Array:
        entrants = jnp.moveaxis(x, axes, range(len(axes))).reshape(-1, *_without(x.shape, axes))
        while len(entrants) > 1:
            half = len(entrants) // 2
            entrants = jnp.concatenate([larger(entrants[:half], entrants[half : 2 * half]), entrants[2 * half :]])
        return entrants[0]

    return function


def _without(shape: Sequence[int], axes: Sequence[int]) -> list[int]:
    return [n for i, n in enumerate(shape) if i not in axes]


def _reduce_window_max(params: dict[str, Any], operands: Sequence[Any]) -> Callable[..., Array]:
    """One strided slice for each place in the window. Padding is a number that no real entry falls below."""
    (bounds,) = operands
    floor = jax.lax.stop_gradient(jnp.min(bounds.lower))  # the result does not depend on it

    def function(x: Array) -> Array:
        spread = [gap - 1 for gap in params["base_dilation"]]
        edges = [(low, high, between) for (low, high), between in zip(params["padding"], spread, strict=True)]
        padded = jax.lax.pad(x, floor, edges)
        sizes, steps, gaps = (params[k] for k in ("window_dimensions", "window_strides", "window_dilation"))
        reach = [(size - 1) * gap for size, gap in zip(sizes, gaps, strict=True)]
        entrants = []
        for place in itertools.product(*map(range, sizes)):
            start = [p * gap for p, gap in zip(place, gaps, strict=True)]
            stop = [n - r + s for n, r, s in zip(padded.shape, reach, start, strict=True)]
            entrants.append(jax.lax.slice(padded, start, stop, steps))
        return knockout(entrants)

    return function


def _upside_down(rewrite: Rewrite) -> Rewrite:
    """The least value as minus the largest of the negated ones."""

    def of_least(params: dict[str, Any], operands: Sequence[Any]) -> Callable[..., Array]:
        negated = [Bounds(-v.upper, -v.lower) if isinstance(v, Bounds) else -v for v in operands]
        largest = rewrite(params, negated)
        return lambda x: -largest(-x)

    return of_least


def _known_base(params: dict[str, Any], operands: Sequence[Any]) -> Callable[..., Array]:
    """base^x = exp(x log base) for a positive base."""
    del params, operands
    return lambda base, x: jnp.exp(x * jnp.log(base))


REWRITES: dict[str, Rewrite] = {
    "max": lambda params, operands: larger,
    "min": _smaller,
    "clamp": _clamp,
    "reduce_max": _reduce_max,
    "reduce_min": _upside_down(_reduce_max),
    "reduce_window_max": _reduce_window_max,
    "reduce_window_min": _upside_down(_reduce_window_max),
    "pow": _known_base,
}
