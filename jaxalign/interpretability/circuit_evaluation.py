"""Is a circuit what the network does? Faithfulness, completeness and minimality, with intervals over examples.

All three compare metrics of runs in which some edges are cut (they carry what they carry in the corrupted run):
of the circuit C, of the whole network G, of G without C, of C without one of its nodes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interpretability.circuit_graph import CircuitGraph, Keep, Metric, circuit_values
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array, ArrayLike, Key, Params


class Estimate(NamedTuple):
    """A number and the ends of its 95% bootstrap interval over examples, each [...]."""

    value: Array
    low: Array
    high: Array


def circuit_faithfulness(
    key: Key, values: ArrayLike, whole: ArrayLike, corrupted: ArrayLike, *, resamples: int = 2000
) -> Estimate:
    """The share of the network's behaviour that circuits keep, with intervals.

    `F = (mean(values) - mean(corrupted)) / (mean(whole) - mean(corrupted))`, means over examples: 1 is the whole
    network's metric, 0 that of the corrupted run; below 0 or above 1 a circuit does worse or better. Resamples
    draw examples, the same for all circuits. The interval is wide or senseless where whole and corrupted hardly differ.

    Args:
        values: [B, ...], of circuits, from `circuit_values`.
        whole, corrupted: [B], of the network itself and of the corrupted run.

    Returns an Estimate of [...]. Raises ValueError where the shapes disagree.
    """
    values, whole, corrupted = (jnp.asarray(x) for x in (values, whole, corrupted))
    if not values.shape[:1] == whole.shape == corrupted.shape:
        shapes = f"values {values.shape}, whole {whole.shape}, corrupted {corrupted.shape}"
        raise ValueError(f"circuit_faithfulness: {shapes}")
    flat = values.reshape(len(values), -1)

    def share(rows: Array) -> Array:
        mean = rows.mean(axis=0)
        return (mean[:-2] - mean[-1]) / (mean[-2] - mean[-1])

    rows = jnp.concatenate([flat, whole[:, None], corrupted[:, None]], axis=1)
    low, high = bootstrap_interval(key, rows, statistic=share, resamples=resamples)
    return Estimate(*(x.reshape(values.shape[1:]) for x in (share(rows), low, high)))


def completeness_circuits(key: Key, graph: CircuitGraph, keep: Keep, *, subsets: int = 8) -> tuple[Array, Array]:
    """(C without K, G without K), each [S, U, V] bool, for S subsets K of the circuit C = keep[U, V].

    A complete circuit answers as the network does whatever part of it is cut from both: |F(C \\ K) - F(G \\ K)| is
    small (Wang et al. 2022, arXiv 2211.00593, section 4.2). K is the whole circuit first, then random halves of
    its edges.
    Of K = C, F(C \\ K) = 0, and F(G \\ K) is what the rest of the network does without the circuit.
    """
    circuit = graph.allowed & (np.asarray(keep) > 0)
    if subsets < 1:
        raise ValueError(f"completeness_circuits: subsets must be at least 1, got {subsets}")
    halves = jax.random.bernoulli(key, 0.5, (subsets - 1, *circuit.shape))
    removed = jnp.concatenate([jnp.ones((1, *circuit.shape), bool), halves]) & circuit[None]
    return circuit[None] & ~removed, graph.allowed[None] & ~removed


def node_minimality(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    clean: Any,
    corrupted: Any,
    target: Any,
    keep: Keep,
    *,
    batch_size: int | None = None,
) -> Array:
    """How much the metric falls, [B, N], as each of the circuit's nodes leaves it, in the order of `circuit_nodes`.

    In a minimal circuit no node can go without a change. Each edge by itself: `exact_edge_patching` with `keep`.
    """
    circuit = graph.allowed & (np.asarray(keep) > 0)
    nodes = circuit_nodes(graph, circuit)
    without = circuit[None] & (np.arange(len(circuit))[None, :] != nodes[:, None])[:, :, None]
    keeps = np.concatenate([circuit[None], without])
    values = circuit_values(graph, metric, params, clean, corrupted, target, keeps, batch_size=batch_size)
    return values[:, :1] - values[:, 1:]


def circuit_nodes(graph: CircuitGraph, keep: Keep) -> np.ndarray:
    """Indices [N] of the sources that keep[U, V] has an edge from."""
    return np.flatnonzero((graph.allowed & (np.asarray(keep) > 0)).any(axis=1))
