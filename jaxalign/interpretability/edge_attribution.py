"""What each edge of a circuit graph contributes: exactly by cutting it, or for all at once from one gradient."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.interpretability.circuit_graph import CircuitGraph, Keep, Metric, check_examples
from jaxalign.types import Array, Params


def edge_attribution_patching(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    clean: Any,
    corrupted: Any,
    target: Any,
    *,
    batch_size: int | None = None,
) -> Array:
    """EAP: first-order estimates [B, U, V] of `exact_edge_patching` for every edge, from one backward pass.

    `score[u, v] = d metric / d keep[u, v]` at keep = 1, which is `sum((clean_u - corrupted_u) * d metric / d input_v)`:
    how much the metric gains by the edge. The literature's effect of corrupting the edge is `-score`.
    Syed, Rager and Conmy 2023 (arXiv 2310.10348), equation 2.

    Args:
        clean, corrupted, target: of B examples.
        batch_size: examples computed side by side; None is one after another.
    """
    check_examples("edge_attribution_patching", clean, corrupted)

    def one(clean: Any, corrupted: Any, target: Any) -> Array:
        return _keep_gradient(graph, metric, params, clean, graph.messages(params, corrupted), target)

    return _by_example(one, (clean, corrupted, target), batch_size)


def integrated_edge_attribution_patching(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    clean: Any,
    corrupted: Any,
    target: Any,
    *,
    steps: int = 5,
    batch_size: int | None = None,
) -> Array:
    """EAP-IG: the scores [B, U, V] of `edge_attribution_patching` with the gradient averaged on the way to `clean`.

    `score[u, v] = sum((clean_u - corrupted_u) * mean over k of (d metric / d input_v) at z_k)`, where
    `z_k = corrupted + k / steps * (clean - corrupted)`, k = 1 .. steps, are embedded inputs. A metric that is flat at
    `clean` still has a gradient on the way. Hanna, Pezzelle and Belinkov 2024 (arXiv 2403.17806), equation 3.

    Raises ValueError if `steps` < 1, or clean and corrupted inputs differ in shape.
    """
    check_examples("integrated_edge_attribution_patching", clean, corrupted)
    if steps < 1:
        raise ValueError(f"integrated_edge_attribution_patching: steps must be at least 1, got {steps}")

    def one(clean: Any, corrupted: Any, target: Any) -> Array:
        begin, end = graph.embed(params, corrupted), graph.embed(params, clean)
        gap = jax.tree.map(jnp.subtract, graph.messages(params, end), graph.messages(params, begin))

        def at(alpha: Array) -> Array:
            z = jax.tree.map(lambda low, high: low + alpha.astype(low.dtype) * (high - low), begin, end)
            other = jax.tree.map(jnp.subtract, graph.messages(params, z), gap)
            return _keep_gradient(graph, metric, params, z, other, target)

        return jax.lax.map(at, jnp.arange(1, steps + 1) / steps).mean(axis=0)

    return _by_example(one, (clean, corrupted, target), batch_size)


def exact_edge_patching(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    clean: Any,
    corrupted: Any,
    target: Any,
    edges: Keep,
    *,
    keep: Keep | None = None,
    batch_size: int | None = None,
) -> Array:
    """What each edge contributes, [B, E]: `metric(keep) - metric(keep without the edge)`.

    Args:
        edges: [E, 2] (source, reader), as `kept_edges` lists them.
        keep: [U, V], the circuit they are cut from; None is the whole network.
        batch_size: edges computed side by side; None is one after another.
    """
    check_examples("exact_edge_patching", clean, corrupted)
    other = graph.messages(params, corrupted)
    whole = jnp.ones(graph.allowed.shape) if keep is None else jnp.asarray(keep, float)

    def value(keep: Array) -> Array:
        return metric(graph.run(params, clean, keep, other), target)

    def without(edge: Array) -> Array:
        return value(whole.at[edge[0], edge[1]].set(0))

    return (value(whole)[None] - jax.lax.map(without, jnp.asarray(edges), batch_size=batch_size)).T


def _keep_gradient(graph: CircuitGraph, metric: Metric, params: Params, inputs: Any, other: Any, target: Any) -> Array:
    def value(keep: Array) -> Array:
        return metric(graph.run(params, inputs, keep, other), target).sum()

    return jax.grad(value)(jnp.ones(graph.allowed.shape))


def _by_example(one: Any, examples: Any, batch_size: int | None) -> Array:
    """`one` of each example, still with a batch axis, of length 1."""
    batched = jax.tree.map(lambda x: jnp.asarray(x)[:, None], examples)
    return jax.lax.map(lambda example: one(*example), batched, batch_size=batch_size)
