"""Computations as graphs of nodes and edges, and the circuits (sets of edges) found in them.

Shapes: U sources, V readers, B examples, C circuits, E edges. A metric is any `metric(output, target) -> [B]` whose
larger values are better, `target` a pytree of leaves [B, ...] (the right and wrong answers, say).
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, Params

Metric = Callable[[Any, Any], Array]
Keep = np.ndarray | Array


class CircuitGraph(NamedTuple):
    """A network as nodes that write and inputs that read, so that any edge between them can be cut.

    sources: [U] names of what writes ("embedding", "head 3.5", "mlp 3"), in the order of computation
    readers: [V] names of what reads ("head 4.1 q", "mlp 4", "logits"), in the order of computation
    allowed: [U, V] bool, u writes before v reads
    feeds: [V, U] bool, what v reads goes straight into what u writes; a reader that feeds nothing is an output, a
        source fed by nothing is an input
    embed: embed(params, inputs) -> the inputs as floats, which `messages` and `run` take as well as `inputs`
    messages: messages(params, inputs) -> a pytree of what each source wrote
    run: run(params, inputs, keep[U, V], other messages) -> output. Reader v sees
        `sum over u of keep[u, v] * own_u + (1 - keep[u, v]) * other_u`: where keep is 1 the network itself, where it
        is 0 the run that `other` came from
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    allowed: np.ndarray
    feeds: np.ndarray
    embed: Callable[[Params, Any], Any]
    messages: Callable[[Params, Any], Any]
    run: Callable[[Params, Any, Array, Any], Any]


def edge_names(graph: CircuitGraph, edges: Keep) -> list[str]:
    """Names of edges [E, 2] (source, reader): "head 3.5 -> head 4.1 q"."""
    return [f"{graph.sources[u]} -> {graph.readers[v]}" for u, v in np.asarray(edges)]


def kept_edges(graph: CircuitGraph, keep: Keep | None = None) -> np.ndarray:
    """The edges [E, 2] (source, reader) of the circuit keep[U, V], of None all, in the order of computation."""
    chosen = graph.allowed if keep is None else graph.allowed & (np.asarray(keep) > 0)
    return np.argwhere(chosen.T)[:, ::-1]


def prune(graph: CircuitGraph, keep: Keep) -> np.ndarray:
    """The edges of keep[U, V] that lie on a path from an input to an output, as a mask [U, V]."""
    keep = graph.allowed & (np.asarray(keep) > 0)
    reached = ~graph.feeds.any(axis=0)  # sources
    wanted = ~graph.feeds.any(axis=1)  # readers
    for _ in graph.sources:
        more = reached | (reached @ keep @ graph.feeds)
        useful = wanted | (graph.feeds @ (keep @ wanted))
        if (more == reached).all() and (useful == wanted).all():
            break
        reached, wanted = more, useful
    return keep & reached[:, None] & wanted[None, :]


def circuits_by_score(graph: CircuitGraph, scores: Keep, sizes: Sequence[int]) -> np.ndarray:
    """Circuits [C, U, V] grown from the outputs by |score|, one for each number of edges in `sizes`.

    Each step takes, among the edges into readers that the circuit already uses, the one with the largest |score|;
    so all of it leads to an output, as a plain choice of the largest need not. Then `prune`, which can leave fewer.
    Hanna, Pezzelle and Belinkov 2024 (arXiv 2403.17806), section 3.

    Args:
        scores: [U, V], as `edge_attribution_patching` gives them, averaged over examples; averages of |score| also
            find edges that help in some examples and hurt in others.

    Raises ValueError for scores of another shape or that are not finite, or a size outside 1 .. number of edges.
    """
    strength = np.abs(np.asarray(scores, np.float64))
    most = int(graph.allowed.sum())
    if strength.shape != graph.allowed.shape or not np.isfinite(strength[graph.allowed]).all():
        raise ValueError(f"circuits_by_score: scores must be finite {graph.allowed.shape}, got {strength.shape}")
    if not len(sizes) or not all(1 <= size <= most for size in sizes):
        raise ValueError(f"circuits_by_score: sizes must lie in 1 .. {most}, got {list(sizes)}")
    keep = np.zeros_like(graph.allowed)
    seen_readers, seen_sources = np.zeros(len(graph.readers), bool), np.zeros(len(graph.sources), bool)
    frontier: list[tuple[float, int, int]] = []

    def open_readers(readers: np.ndarray) -> None:
        for v in np.flatnonzero(readers & ~seen_readers):
            seen_readers[v] = True
            for u in np.flatnonzero(graph.allowed[:, v]):
                heapq.heappush(frontier, (-strength[u, v], int(u), int(v)))

    open_readers(~graph.feeds.any(axis=1))
    found = {}
    for count in range(1, max(sizes) + 1):
        if frontier:
            _, u, v = heapq.heappop(frontier)
            keep[u, v] = True
            if not seen_sources[u]:
                seen_sources[u] = True
                open_readers(graph.feeds[:, u])
        if count in sizes:
            found[count] = prune(graph, keep)
    return np.stack([found[size] for size in sizes])


def circuit_values(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    clean: Any,
    corrupted: Any,
    target: Any,
    keeps: Keep,
    *,
    batch_size: int | None = None,
) -> Array:
    """The metric [B, C] of each circuit in keeps[C, U, V], cut edges carrying what they carry in the corrupted run.

    Args:
        clean, corrupted: inputs of B examples, pairwise of one shape.
        batch_size: circuits computed side by side; None is one after another.
    """
    check_examples("circuit_values", clean, corrupted)
    other = graph.messages(params, corrupted)

    def value(keep: Array) -> Array:
        return metric(graph.run(params, clean, keep.astype(float), other), target)

    return jax.lax.map(value, jnp.asarray(keeps), batch_size=batch_size).T


def check_examples(caller: str, clean: Any, corrupted: Any) -> None:
    """Raises ValueError unless clean and corrupted inputs [B, ...] have the same shapes."""
    shapes = [jax.tree.map(jnp.shape, inputs) for inputs in (clean, corrupted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{caller}: clean inputs are {shapes[0]}, corrupted ones {shapes[1]}; they must agree")
