"""Edge attribution: exact where the network is linear, near where it is flat, equal to cutting by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.circuit_graph import circuits_by_score, edge_names, kept_edges
from jaxalign.interpretability.edge_attribution import (
    edge_attribution_patching,
    exact_edge_patching,
    integrated_edge_attribution_patching,
)
from jaxalign.interpretability.mlp_graph import mlp_graph
from jaxalign.interpretability.transformer_graph import transformer_graph
from jaxalign.networks.transformer import TransformerConfig, transformer


def first(output, target):
    return output[:, 0] * target


def dense(*kernels):
    """Parameters of an MLP without biases."""
    return {
        f"Dense_{i}": {"kernel": jnp.asarray(w, float), "bias": jnp.zeros(len(w[0]))} for i, w in enumerate(kernels)
    }


@pytest.fixture(scope="module")
def linear():
    """A random linear network of two layers: (graph, metric, params, clean, corrupted, target)."""
    graph = mlp_graph(3, (4, 2), activation=lambda x: x)
    rng = np.random.default_rng(0)
    params = dense(rng.normal(size=(3, 4)), rng.normal(size=(4, 2)))
    clean, corrupted = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    return graph, first, params, clean, corrupted, jnp.arange(1.0, 6.0)


def test_all_agree_with_arithmetic_on_a_linear_network(linear):
    graph, _, params, clean, corrupted, _ = linear
    edges = kept_edges(graph)

    @jax.jit
    def everything(*given):
        return exact_edge_patching(graph, first, *given, edges), [
            edge_attribution_patching(graph, first, *given, batch_size=2),
            integrated_edge_attribution_patching(graph, first, *given, steps=2),
        ]

    exact, estimates = everything(*linear[2:])
    w, v = (np.asarray(params[f"Dense_{i}"]["kernel"], np.float64) for i in (0, 1))
    gap = np.asarray(clean, np.float64) - np.asarray(corrupted)
    expected = np.zeros((5, *graph.allowed.shape))
    expected[:, :3, :4] = gap[:, :, None] * (w * v[:, 0])
    expected[:, 3:, 4] = (gap @ w) * v[:, 0]
    expected *= np.arange(1, 6)[:, None, None]
    np.testing.assert_allclose(exact, expected[:, edges[:, 0], edges[:, 1]], rtol=1e-4, atol=1e-5)
    for scores in estimates:
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_integrating_sees_what_is_flat_at_the_end():
    """output = tanh(5 x) from -1 to 1: the slope at 1 says 0.002, cutting the edge changes 2."""
    graph, params = mlp_graph(1, (1, 1), activation=jnp.tanh), dense([[5.0]], [[1.0]])

    @jax.jit
    def everything(*given):
        plain = edge_attribution_patching(graph, first, *given)
        integrated = integrated_edge_attribution_patching(graph, first, *given, steps=20)
        return exact_edge_patching(graph, first, *given, np.array([[0, 0]]))[0, 0], plain[0, 0, 0], integrated[0, 0, 0]

    exact, plain, integrated = map(float, everything(params, jnp.ones((1, 1)), -jnp.ones((1, 1)), jnp.ones(1)))
    assert exact == pytest.approx(2 * np.tanh(5), rel=1e-5)
    assert plain == pytest.approx(10 * (1 - np.tanh(5) ** 2), rel=1e-3)
    assert integrated == pytest.approx(exact, rel=0.02)


def known_network():
    """output 0 = |x0 - x1| by neurons 0 and 1; output 1 = relu(x2) + relu(x3) by 2 and 3; 4 hardly reaches either."""
    first_layer = np.zeros((4, 5))
    first_layer[0], first_layer[1] = [1, -1, 0, 0, 1], [-1, 1, 0, 0, 0]
    first_layer[2], first_layer[3] = [0, 0, 1, 0, 1], [0, 0, 0, 1, 0]
    params = dense(first_layer, [[1, 0], [1, 0], [0, 1], [0, 1], [0.01, 0.02]])
    clean = jnp.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 0]], float)
    corrupted = jnp.array([[0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], float)
    return mlp_graph(4, (5, 2)), params, clean, corrupted


def test_scores_find_a_known_circuit():
    graph, params, clean, corrupted = known_network()
    edges = [
        "input 0 -> neuron 0.0", "input 1 -> neuron 0.0", "input 0 -> neuron 0.1", "input 1 -> neuron 0.1",
        "neuron 0.0 -> output 0", "neuron 0.1 -> output 0",
    ]  # fmt: skip
    # At a clean input one of the two neurons is off, and its slope 0: the other half of the circuit needs the path.
    score = jax.jit(functools.partial(integrated_edge_attribution_patching, graph, first))
    scores = score(params, clean, corrupted, jnp.ones(4))
    (keep,) = circuits_by_score(graph, np.abs(scores).mean(axis=0), [6])
    assert sorted(edge_names(graph, kept_edges(graph, keep))) == sorted(edges)


def test_inside_a_circuit_edges_count_differently():
    graph, params, clean, corrupted = known_network()
    edge = np.array([[graph.sources.index("neuron 0.0"), graph.readers.index("output 0")]])
    keep = jnp.asarray(graph.allowed, float).at[:, 0].set(0)  # neuron 0 hears the corrupted inputs alone

    @jax.jit
    def effect(keep):
        return exact_edge_patching(graph, first, params, clean, corrupted, jnp.ones(4), edge, keep=keep)[:, 0]

    np.testing.assert_allclose(effect(jnp.ones(graph.allowed.shape)), [1, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(effect(keep), 0, atol=1e-6)


@pytest.mark.slow
def test_scores_of_a_transformer_add_up_to_its_residual_stream():
    config = TransformerConfig(7, 8, 8, 2, 2, 1, 4, remat="none")
    graph, rng = transformer_graph(config, position=-1), np.random.default_rng(0)
    shapes, tree = jax.tree.flatten(jax.eval_shape(transformer(config).init, jax.random.key(0)))
    params = tree.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in shapes])
    clean, corrupted = (jnp.asarray(rng.integers(0, 7, (2, 3)), jnp.int32) for _ in range(2))

    def head(stream):
        normal = (
            stream / jnp.sqrt((stream**2).mean(axis=-1, keepdims=True) + 1e-5) * params["final_norm"]["scale"][None]
        )
        return (normal @ params["embedding"].T)[:, 0]

    @jax.jit
    def both(params):
        ends = [graph.messages(params, tokens).sum(axis=0)[:, -1] for tokens in (clean, corrupted)]
        slope = jax.grad(lambda stream: head(stream).sum())(ends[0])
        scores = edge_attribution_patching(graph, first, params, clean, corrupted, jnp.ones(2))
        return scores, ((ends[0] - ends[1]) * slope).sum(axis=1)

    scores, expected = both(params)
    assert scores.shape == (2, *graph.allowed.shape)
    assert (np.asarray(scores)[:, ~graph.allowed] == 0).all()
    np.testing.assert_allclose(scores[:, :, -1].sum(axis=1), expected, rtol=1e-3)


def test_what_does_not_fit_is_refused(linear):
    graph, metric, params, clean, corrupted, target = linear
    for method in (edge_attribution_patching, functools.partial(exact_edge_patching, edges=[[0, 0]])):
        with pytest.raises(ValueError, match="must agree"):
            method(graph, metric, params, clean, corrupted[:2], target)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        integrated_edge_attribution_patching(*linear, steps=0)
