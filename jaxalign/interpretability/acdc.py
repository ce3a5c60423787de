"""Automatic circuit discovery: cut every edge that can go without loss, from the output back to the input."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.interpretability.circuit_graph import CircuitGraph, Keep, Metric, check_examples, kept_edges
from jaxalign.types import Array, ArrayLike, Params


class ACDC(NamedTuple):
    """What `acdc` found.

    keep: [U, V] bool, the circuit
    value: the metric of the circuit, a mean over examples
    edges: [E, 2] (source, reader), in the order tried
    change: [E], how much the metric fell as each was cut
    """

    keep: Array
    value: Array
    edges: Array
    change: Array


def acdc(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    clean: Any,
    corrupted: Any,
    target: Any,
    *,
    threshold: ArrayLike,
    start: Keep | None = None,
) -> ACDC:
    """Greedy pruning of edges, in one scan: an edge is cut for good if the metric falls by less than `threshold`.

    From the last reader to the first, and for each from its last source to its first:
    `cut if metric(circuit) - metric(circuit without edge) < threshold`, metrics being means over the examples and cut
    edges carrying what they carry in the corrupted run. Conmy et al. 2023 (arXiv 2304.14997), algorithm 1, where the
    metric is minus the divergence from the network's own output (`negative_kl`). Edges into nodes that nothing
    reads any more fall with them, as they change nothing (threshold > 0).

    Args:
        threshold: tau; may be traced, so that thresholds can be swept by vmap.
        start: [U, V], the circuit to begin from, so that only its edges are tried; None is the whole network. Each edge
            costs a run.
    """
    check_examples("acdc", clean, corrupted)
    edges = jnp.asarray(kept_edges(graph, start)[::-1].copy())
    other = graph.messages(params, corrupted)

    def value(keep: Array) -> Array:
        return metric(graph.run(params, clean, keep, other), target).mean()

    def consider(carry: tuple[Array, Array], edge: Array) -> tuple[tuple[Array, Array], Array]:
        keep, before = carry
        tried = keep.at[edge[0], edge[1]].set(0)
        after = value(tried)
        cut = before - after < threshold
        return (jnp.where(cut, tried, keep), jnp.where(cut, after, before)), before - after

    whole = jnp.asarray(graph.allowed if start is None else graph.allowed & (jnp.asarray(start) > 0), float)
    (keep, last), change = jax.lax.scan(consider, (whole, value(whole)), edges)
    return ACDC(keep > 0, last, edges, change)
