"""What CROWN's linear bounds say of one box: whether it is decided, what can be cut off it, and where to split it."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.certification.bounds import Bounds
from jaxalign.certification.crown_rules import crown_step, node_of
from jaxalign.certification.flat_program import flatten, trace_closed
from jaxalign.certification.interpreter import evaluate
from jaxalign.certification.linear_graph import Graph, least_over_box
from jaxalign.types import Array

CAPACITY = 16  # of CROWN: ReLUs bounded at a time
ROUNDINGS = 32  # relative errors, beside one for each input, that a bound may have gathered before it is doubted
EVEN = 0.1  # how much the width of an axis counts by itself, against how much the bound leans on it
STEPS = 8  # of descent in every box

Network = Callable[[Array], Array]


class Rows(NamedTuple):
    """Conditions that share a box: one of G conjunctions of M rows makes an output y [K] unsafe.

    weights: [G, M, K], offsets: [G, M]. Conjunctions of fewer rows repeat their last.
    """

    weights: Array
    offsets: Array


class Examined(NamedTuple):
    """A box after a look at it: `lower`, `upper` [n] of the part that may be unsafe, the `bound` of the excess.

    open: whether it may hold an unsafe input. order [n]: its axes, the one to split first. x [n] with `excess`: the
    best attempt at a counterexample.
    """

    lower: Array
    upper: Array
    bound: Array
    open: Array
    order: Array
    x: Array
    excess: Array


def linear_lower_bounds(
    fn: Network,
    lower: Array,
    upper: Array,
    specification: Array,
    *,
    intermediate: Literal["crown", "interval"] = "crown",
    sound: bool = False,
) -> tuple[Array, Array]:
    """slopes [S, n] and constants [S] with slopes[s] @ x + constants[s] <= specification[s] @ fn(x) on the box [n].

    The linear functions whose least values over the box are `crown_bounds`. With `sound` the constants pay for what
    rounding may cost anywhere in the box.
    """
    graph = Graph(intermediate, CAPACITY, sound)
    box = graph.add(Bounds(lower, upper))
    (value,) = evaluate(flatten(trace_closed(fn, lower)), [box], functools.partial(crown_step, graph))
    rows = {node_of(graph, value).index: specification}
    least = graph.lower_bounds(rows, {})

    def at(x: Array) -> Array:
        """The linear functions at x: their least values over a box of one point."""
        box.bounds = Bounds(x, x)
        return graph.lower_bounds(rows, {})

    graph.sound = False
    _, pull = jax.vjp(at, (lower + upper) / 2)
    (slopes,) = jax.vmap(pull)(jnp.eye(len(specification), dtype=least.dtype))
    return slopes, least - least_over_box(slopes, Bounds(lower, upper))


def examine(
    fn: Network, rows: Rows, lower: Array, upper: Array, *, intermediate: Any = "crown", sound: bool = False
) -> Examined:
    """One look at a box [n]: bound it, cut it, choose an axis, try for a counterexample."""
    groups, count = rows.offsets.shape
    specification = rows.weights.reshape(groups * count, -1)
    slopes, constants = linear_lower_bounds(fn, lower, upper, specification, intermediate=intermediate, sound=sound)
    slopes, constants = slopes.reshape(groups, count, -1), constants.reshape(groups, count) - rows.offsets
    low, high = (jnp.broadcast_to(side, slopes.shape) for side in (lower, upper))
    terms = jnp.where(slopes > 0, slopes * low, slopes * high)
    least = terms.sum(-1) + constants
    size = (jnp.abs(slopes) * jnp.maximum(jnp.abs(low), jnp.abs(high))).sum(-1) + jnp.abs(constants)
    doubt = (ROUNDINGS + len(lower)) * jnp.finfo(least.dtype).eps * (size + jnp.abs(rows.offsets))
    unsafe = ~(least > doubt).any(-1)  # the conjunctions that may hold; written so that NaN lets them

    # A conjunction holds only where slope_i x_i <= doubt - (the least of the other terms), for every i and row.
    limit = (doubt[..., None] - (least[..., None] - terms)) / jnp.where(slopes == 0, 1.0, slopes)
    top = jnp.where((slopes > 0) & (limit < high), limit, high).min(1)
    bottom = jnp.where((slopes < 0) & (limit > low), limit, low).max(1)
    cuts = unsafe[:, None] & (bottom <= top)
    keeps = unsafe[:, None] & ~(bottom <= top)
    cut_lower = jnp.where(cuts, bottom, jnp.where(keeps, low[:, 0], high[:, 0])).min(0)
    cut_upper = jnp.where(cuts, top, jnp.where(keeps, high[:, 0], low[:, 0])).max(0)

    bounds = least.max(-1)
    likeliest = jnp.argmin(jnp.where(unsafe, bounds, jnp.inf))
    slope = slopes[likeliest, jnp.argmax(least[likeliest])]
    lean = jnp.abs(slope) + EVEN * jnp.abs(slope).mean()
    lean = jnp.where(jnp.isfinite(lean) & (lean > 0), lean, 1.0)
    x, excess = descend(fn, rows, jnp.where(slope > 0, lower, upper), lower, upper, steps=STEPS)
    order = jnp.argsort(-lean * (cut_upper - cut_lower))
    return Examined(cut_lower, cut_upper, bounds.min(), unsafe.any(), order, x, excess)


def descend(fn: Network, rows: Rows, x: Array, lower: Array, upper: Array, *, steps: int) -> tuple[Array, Array]:
    """From x [n], the point of least excess on `steps` signed gradient steps inside the box, and that excess."""

    def excess(x: Array) -> Array:
        return (jnp.einsum("gmk,k->gm", rows.weights, fn(x)) - rows.offsets).max(-1).min()

    def step(carry: Any, size: Array) -> tuple[Any, None]:
        x, best, least = carry
        value, gradient = jax.value_and_grad(excess)(x)
        better = value < least
        best, least = jnp.where(better, x, best), jnp.where(better, value, least)
        return (jnp.clip(x - size * (upper - lower) * jnp.sign(gradient), lower, upper), best, least), None

    sizes = 0.25 * jnp.linspace(1.0, 0.0, steps + 1, dtype=x.dtype)
    (_, best, least), _ = jax.lax.scan(step, (x, x, jnp.full((), jnp.inf, x.dtype)), sizes)
    return best, least
