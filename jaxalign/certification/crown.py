"""CROWN: linear bounds carried backward through a program, from what is asked of its output to the input box.

A row of coefficients says "bound sum(coefficients * value) from below". Walking back, a linear step passes the row
through its own transpose; a nonlinear one replaces each value by the line on the safe side of it. What reaches the
input is a linear function, whose least value over the box is a lower bound of what was asked.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr

from jaxalign.certification.bound_program import bounds_of
from jaxalign.certification.bounds import Bounds
from jaxalign.certification.crown_rules import crown_step, node_of
from jaxalign.certification.flat_program import flatten, trace_closed
from jaxalign.certification.interpreter import evaluate
from jaxalign.certification.linear_graph import Graph, Node
from jaxalign.types import Array

Intermediate = Literal["crown", "interval"]
Search = Callable[[Graph, Node, Array], Array]  # lower bounds [S] of rows [S, *shape] on a node
METHODS = ("interval", "crown-interval", "crown", "alpha-crown")


def crown_bounds(
    fn: Callable[[Any], Any],
    lower: Any,
    upper: Any,
    *,
    intermediate: Intermediate = "crown",
    specification: Array | None = None,
    capacity: int | None = None,
    sound: bool = False,
) -> Bounds:
    """lower <= fn(x) <= upper for every x between `lower` and `upper`, by linear bounds (Zhang et al. 2018).

    `fn` takes one example, an array [...] or a pytree without a batch axis: vmap over boxes, not inside. With
    `specification` [S, *out] the bounds are those of the S numbers sum(specification[s] * fn(x)), tighter than the same
    sums of bounds. The range of every nonlinear step's input is needed first: `intermediate="crown"` walks back
    from each (tightest); "interval" takes interval bounds (CROWN-IBP, Zhang et al. 2020: one walk in all). `capacity`
    walks back from that many elements at a time and only from those whose line is not settled by interval bounds (ReLUs
    that may be on or off): the same bounds, in less memory and mostly less time, but not differentiable in reverse.
    Loops (`scan`) are unrolled. Bounds hold up to float32 rounding; with `sound` every row pays for the rounding that
    its walk may have met, so that they hold in exact arithmetic.

    Raises ValueError for a bad box or specification; UnsupportedPrimitive for a step without a rule, naming it.
    """
    settings = (intermediate, capacity, sound)
    return _bounds("crown_bounds", fn, lower, upper, settings, specification, plain_bounds, None)


def alpha_crown_bounds(
    fn: Callable[[Any], Any],
    lower: Any,
    upper: Any,
    *,
    intermediate: Intermediate = "crown",
    specification: Array | None = None,
    capacity: int | None = None,
    steps: int = 20,
    optimizer: optax.GradientTransformation | None = None,
) -> Bounds:
    """`crown_bounds` with the free slopes chosen by gradient ascent on the bounds, for each row its own.

    Every slope between its two ends is sound, so alpha in [0, 1], one for each row and each nonlinear element, is moved
    to raise the bound, `steps` times by `optimizer` (default Adam, rate 0.1), and the best bound of each row [S] on the
    way is kept, plain CROWN's among them (Xu et al. 2021, "Fast and Complete", equation 4). Intermediate bounds are
    CROWN's own. Without `specification` the bounds are those of every output element.
    """

    def search(graph: Graph, node: Node, rows: Array) -> Array:
        return best_slopes(graph, node, rows, steps, optimizer)

    settings = (intermediate, capacity, False)
    return _bounds("alpha_crown_bounds", fn, lower, upper, settings, specification, search, (steps, optimizer))


def specified_lower_bounds(
    fn: Callable[[Array], Array],
    box: Bounds,
    specification: Array,
    *,
    method: str,
    capacity: int | None = None,
    sound: bool = False,
    steps: int = 20,
    optimizer: optax.GradientTransformation | None = None,
) -> Array:
    """Lower bounds [S] of sum(specification[s] * fn(x)) over a box, by one of METHODS; the last linear steps merged in.

    "interval" walks back through the linear steps behind the last nonlinear one only, and takes their interval bounds
    there: Gowal et al.'s elision of the last layer.
    """
    intermediate: Intermediate = "interval" if "interval" in method else "crown"
    graph = Graph(intermediate, capacity, sound)
    (node,) = _outputs(graph, trace_closed(fn, box.lower), [box.lower], [box.upper])
    rows = specification.astype(node.dtype)
    if method == "alpha-crown":
        return best_slopes(graph, node, rows, steps, optimizer)
    return graph.lower_bounds({node.index: rows}, {}, linear_only=method == "interval")


def plain_bounds(graph: Graph, node: Node, rows: Array) -> Array:
    """Lower bounds [S] of rows [S, *shape] on a node with every line at its default."""
    return graph.lower_bounds({node.index: rows}, {})


def best_slopes(
    graph: Graph, node: Node, rows: Array, steps: int, optimizer: optax.GradientTransformation | None
) -> Array:
    """The best lower bounds [S] of rows [S, *shape] on a node, over `steps` steps on the free slopes."""
    optimizer = optax.adam(0.1) if optimizer is None else optimizer
    start = {n.index: jnp.broadcast_to(n.free, (len(rows), *n.shape)) for n in graph.nodes if n.free is not None}

    def total(alphas: dict[int, Array]) -> tuple[Array, Array]:
        found = graph.lower_bounds({node.index: rows}, alphas)
        return -jnp.sum(jnp.where(jnp.isfinite(found), found, 0)), found

    def step(carry: Any, _: None) -> tuple[Any, None]:
        alphas, state, best = carry
        (_, found), gradient = jax.value_and_grad(total, has_aux=True)(alphas)
        updates, state = optimizer.update(gradient, state, alphas)
        alphas = jax.tree.map(lambda a: jnp.clip(a, 0, 1), optax.apply_updates(alphas, updates))
        return (alphas, state, jnp.maximum(best, found)), None

    first = (start, optimizer.init(start), plain_bounds(graph, node, rows))
    (alphas, _, best), _ = jax.lax.scan(step, first, length=steps)
    return jnp.maximum(best, total(alphas)[1])


def _bounds(
    name: str,
    fn: Callable[[Any], Any],
    lower: Any,
    upper: Any,
    settings: tuple[Intermediate, int | None, bool],
    specification: Array | None,
    search: Search,
    fixed: Any,
) -> Bounds:
    if settings[0] not in ("crown", "interval"):
        raise ValueError(f"{name}: intermediate must be 'crown' or 'interval', got {settings[0]!r}")
    if settings[1] is not None and settings[1] < 1:
        raise ValueError(f"{name}: capacity must be at least 1, got {settings[1]}")

    def method(program: ClosedJaxpr, lows: list[Array], highs: list[Array], *given: Array) -> Bounds:
        graph = Graph(*settings)
        outputs = _outputs(graph, program, lows, highs)
        if given:
            return _both_sides(search, graph, _specified(name, outputs, *given), *given)
        sides = []
        for node in outputs:
            size = node.bounds.lower.size
            rows = jnp.eye(size, dtype=node.dtype).reshape(size, *node.shape)
            found = _both_sides(search, graph, node, rows)
            sides.append(node.sharpen(jax.tree.map(lambda v, shape=node.shape: v.reshape(shape), found)))
        return Bounds([s.lower for s in sides], [s.upper for s in sides])

    given = () if specification is None else (jnp.asarray(specification),)
    return bounds_of(name, fn, lower, upper, method, (settings, fixed), *given)


def _outputs(graph: Graph, program: ClosedJaxpr, lows: Sequence[Array], highs: Sequence[Array]) -> list[Node]:
    inputs = [graph.add(Bounds(low, high)) for low, high in zip(lows, highs, strict=True)]
    outputs = evaluate(flatten(program), inputs, functools.partial(crown_step, graph))
    return [node_of(graph, v) for v in outputs]


def _both_sides(search: Search, graph: Graph, node: Node, rows: Array) -> Bounds:
    rows = rows.astype(node.dtype)
    found = search(graph, node, jnp.concatenate([rows, -rows]))
    return Bounds(found[: len(rows)], -found[len(rows) :])


def _specified(name: str, outputs: list[Node], rows: Array) -> Node:
    if len(outputs) != 1:
        raise ValueError(f"{name}: specification needs a function with one array as its result, got {len(outputs)}")
    if rows.shape[1:] != outputs[0].shape:
        raise ValueError(f"{name}: specification must be [S, *{list(outputs[0].shape)}], got {list(rows.shape)}")
    return outputs[0]
