"""What CROWN does with each kind of step: linear ones by their own transpose, curves by lines, products by planes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.certification.bounds import Abstract, Bounds
from jaxalign.certification.crown_rounding import linear_error, lines_error
from jaxalign.certification.elementwise import elementwise_of
from jaxalign.certification.flat_program import Step, trace
from jaxalign.certification.interpreter import bind, evaluate, known_branch, loop_parts
from jaxalign.certification.interval import ALL, BILINEAR, INDEXED, MOVES, as_bounds, interval_step, rounded_outward
from jaxalign.certification.linear_graph import Graph, Node
from jaxalign.certification.named_functions import NamedFunction
from jaxalign.certification.relaxations import Elementwise, Lines
from jaxalign.certification.rewrites import REWRITES
from jaxalign.certification.smooth_relaxations import SMOOTH
from jaxalign.types import Array

LINEAR = {  # primitives linear (up to a constant) in these operands (ALL: in every one), the others known
    **dict.fromkeys((*MOVES, "add", "add_any", "neg", "sub", "cumsum", "reduce_sum", "reduce_window_sum"), ALL),
    **INDEXED,
    "div": (0,),
    "select_n": tuple(range(1, 64)),
}


def crown_step(graph: Graph, step: Step, operands: list[Any]) -> list[Any]:
    """The nodes of a step's results [...], added to `graph`; operands are nodes and known arrays."""
    if step.name == "scan":
        return _unroll(graph, step, operands)
    if step.name == "cond":
        program, arguments = known_branch(step, operands)
        return evaluate(program, arguments, functools.partial(crown_step, graph))
    elementwise = elementwise_of(step, operands)
    abstract = [i for i, v in enumerate(operands) if isinstance(v, Abstract)]
    if elementwise is not None:
        return [_curve(graph, step, elementwise, operands[abstract[0]])]
    if isinstance(step.primitive, NamedFunction):
        box = graph.tighten(operands[0])
        return _rewritten(graph, step, step.primitive.rewrite(box.lower, box.upper, **step.params), operands)
    if step.name in BILINEAR and len(abstract) == 2:
        return [_product(graph, step, *operands)]
    if _is_linear(step, operands, abstract):
        return _linear(graph, step, operands, abstract)
    if step.name == "div":
        return run(graph, jnp.multiply, operands[0], _curve(graph, step, SMOOTH["reciprocal"], operands[1]))
    if step.name in REWRITES:
        return _rewritten(graph, step, REWRITES[step.name](step.params, [_known(v) for v in operands]), operands)
    return [graph.add(b) for b in _interval(graph, step, operands)]  # no lines: its range alone


def run(graph: Graph, function: Callable[..., Any], *operands: Any) -> list[Any]:
    """`function` of nodes and arrays [...], bounded as a part of the same graph."""
    arguments = [v if isinstance(v, Node) else jnp.asarray(v) for v in operands]
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arguments]
    return evaluate(trace(function, *shapes), arguments, functools.partial(crown_step, graph))


def _known(value: Any) -> Any:
    return value.bounds if isinstance(value, Node) else value


def _interval(graph: Graph, step: Step, operands: Sequence[Any]) -> list[Bounds]:
    return interval_step(step, [_known(v) for v in operands], widen=rounded_outward(graph.sound))


def _is_linear(step: Step, operands: Sequence[Any], abstract: Sequence[int]) -> bool:
    if not all(jnp.issubdtype(operands[i].dtype, jnp.floating) for i in abstract):
        return False
    if step.name == "convert_element_type" and not jnp.issubdtype(step.params["new_dtype"], jnp.floating):
        return False
    if step.name in BILINEAR:
        return True
    return step.name in LINEAR and (LINEAR[step.name] is ALL or set(abstract) <= set(LINEAR[step.name]))


def _linear(graph: Graph, step: Step, operands: list[Any], abstract: Sequence[int]) -> list[Node]:
    """A row passes through the transpose of the step itself; what the known operands add is a constant."""
    parents = [operands[i] for i in abstract]
    zeros = [jnp.zeros(p.shape, p.dtype) for p in parents]

    def function(*values: Array) -> list[Array]:
        full = list(operands)
        for i, value in zip(abstract, values, strict=True):
            full[i] = value
        return bind(step, full)

    offsets = function(*zeros) if len(abstract) < len(operands) and step.name in LINEAR else None

    def pull_of(k: int) -> Callable[[Array, Any], tuple[list[Array], Array]]:
        def pull(row: Array, alpha: Any) -> tuple[list[Array], Array]:
            del alpha
            _, transpose = jax.vjp(lambda *values: function(*values)[k], *zeros)
            constant = jnp.zeros((), row.dtype) if offsets is None else jnp.sum(row * offsets[k])
            return list(transpose(row)), constant

        return pull

    bounds = _interval(graph, step, operands)
    errors = linear_error(step, operands) if graph.sound else [None] * len(bounds)
    return [graph.add(b, parents, pull_of(k), error=e) for k, (b, e) in enumerate(zip(bounds, errors, strict=True))]


def _curve(graph: Graph, step: Step, elementwise: Elementwise, x: Node) -> Node:
    """A function of one number, between two lines."""
    box = graph.tighten(x, elementwise.unstable)
    lines = elementwise.relax(box.lower, box.upper)

    def pull(row: Array, alpha: Any) -> tuple[list[Array], Array]:
        chosen = lines if alpha is None else elementwise.relax(box.lower, box.upper, alpha)
        coefficients, constant = through_lines(row, chosen)
        return [coefficients], constant

    image = Bounds(*elementwise.image(box.lower, box.upper))
    widen = rounded_outward(graph.sound)
    if widen is not None:
        (image,) = widen(step, [box], [image])
    error = lines_error(lines, box) if graph.sound else None
    return graph.add(image, [x], pull, linear=False, free=elementwise.start(box.lower, box.upper), error=error)


def through_lines(row: Array, lines: Lines) -> tuple[Array, Array]:
    """Coefficients [...] on x and a constant below sum(row f(x)): the lower line where row > 0, the upper where < 0."""
    above, below = jnp.maximum(row, 0), jnp.minimum(row, 0)
    low, high = (jnp.where(jnp.isfinite(v), v, 0) for v in (lines.lower_intercept, lines.upper_intercept))
    lost = (above > 0) & ~jnp.isfinite(lines.lower_intercept) | (below < 0) & ~jnp.isfinite(lines.upper_intercept)
    constant = jnp.sum(above * low + below * high)
    return above * lines.lower_slope + below * lines.upper_slope, jnp.where(jnp.any(lost), -jnp.inf, constant)


def _product(graph: Graph, step: Step, a: Node, b: Node) -> Node:
    """McCormick's planes for a bilinear step f with non-negative weights (mul, dot, convolution), l and u the ends:

    f(a, b) >= f(a, l_b) + f(l_a, b) - f(l_a, l_b) and f(a, b) <= f(a, u_b) + f(l_a, b) - f(l_a, u_b).
    """
    (low, _), (least, most) = ((v.lower, v.upper) for v in (graph.tighten(a), graph.tighten(b)))

    def function(x: Array, y: Array) -> Array:
        return bind(step, [x, y])[0]

    def pull(row: Array, alpha: Any) -> tuple[list[Array], Array]:
        del alpha
        parts, constant = [jnp.zeros_like(low), jnp.zeros_like(least)], jnp.zeros((), row.dtype)
        for side, end in ((jnp.maximum(row, 0), least), (jnp.minimum(row, 0), most)):
            corner, transpose = jax.vjp(function, low, end)
            parts = [p + q for p, q in zip(parts, transpose(side), strict=True)]
            constant = constant - jnp.sum(side * corner)
        return parts, constant

    (bounds,) = _interval(graph, step, [a, b])
    error = linear_error(step, [a, b])[0] if graph.sound else None
    return graph.add(bounds, [a, b], pull, linear=False, error=error)


def _rewritten(graph: Graph, step: Step, function: Callable[..., Array], operands: list[Any]) -> list[Any]:
    """The step through others that have good lines, with its own exact range kept."""
    (node,), (exact,) = run(graph, function, *operands), _interval(graph, step, operands)
    node.sharpen(exact)
    return [node]


def _unroll(graph: Graph, step: Step, operands: list[Any]) -> list[Any]:
    """A loop turn by turn: each has lines of its own."""
    domain = functools.partial(crown_step, graph)
    body, consts, carry, xs = loop_parts(step, operands)
    carries = len(carry)
    turns = range(step.params["length"])
    collected = []
    for t in reversed(turns) if step.params["reverse"] else turns:
        slices = [run(graph, lambda v, t=t: v[t], v)[0] if isinstance(v, Node) else v[t] for v in xs]
        found = evaluate(body, [*consts, *carry, *slices], domain)
        carry = found[:carries]
        collected.append(found[carries:])
    if step.params["reverse"]:
        collected.reverse()
    return [*carry, *(_stack(graph, column) for column in zip(*collected, strict=True))]


def _stack(graph: Graph, values: Sequence[Any]) -> Any:
    if not any(isinstance(v, Node) for v in values):
        return jnp.stack(values)
    return run(graph, lambda *v: jnp.stack(v), *values)[0]


def node_of(graph: Graph, value: Any) -> Node:
    """The node of an output [...]; a known array as a node without parents."""
    return value if isinstance(value, Node) else graph.add(as_bounds(value))
