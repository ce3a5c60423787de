"""ACDC: a known circuit, the loop it replaces, and thresholds swept in one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.acdc import acdc
from jaxalign.interpretability.circuit_graph import circuit_values, edge_names, kept_edges, prune
from jaxalign.interpretability.mlp_graph import mlp_graph


def first(output, target):
    return -jnp.square(output[:, 0] - target)


@pytest.fixture(scope="module")
def known():
    """output 0 = |x0 - x1| by neurons 0 and 1; neuron 2 takes x2 to output 1, and hardly to output 0."""
    first_layer = jnp.array([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]])
    second = jnp.array([[1.0, 0], [1, 0], [0.05, 1]])
    params = {f"Dense_{i}": {"kernel": w, "bias": jnp.zeros(w.shape[1])} for i, w in enumerate((first_layer, second))}
    clean = jnp.array([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]], float)
    corrupted = jnp.array([[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]], float)
    graph = mlp_graph(3, (3, 2))
    target = graph.run(params, clean, jnp.ones(graph.allowed.shape), graph.messages(params, clean))[:, 0]
    return graph, first, params, clean, corrupted, target


@pytest.fixture(scope="module")
def sweep(known):
    """acdc at three thresholds, in one program."""
    find = jax.jit(jax.vmap(lambda t: acdc(*known, threshold=t)))
    return find(jnp.array([1e-9, 0.02, 10.0]))


def test_a_known_circuit_is_found(known, sweep):
    graph = known[0]
    assert sorted(edge_names(graph, kept_edges(graph, sweep.keep[1]))) == [
        "input 0 -> neuron 0.0", "input 0 -> neuron 0.1", "input 1 -> neuron 0.0", "input 1 -> neuron 0.1",
        "neuron 0.0 -> output 0", "neuron 0.1 -> output 0",
    ]  # fmt: skip
    np.testing.assert_array_equal(prune(graph, sweep.keep[1]), sweep.keep[1])


def test_a_threshold_of_nothing_keeps_what_matters_at_all_and_a_large_one_nothing(known, sweep):
    graph, *rest = known
    everything = set(edge_names(graph, kept_edges(graph, sweep.keep[0])))
    assert {"input 2 -> neuron 0.2", "neuron 0.2 -> output 0"} < everything
    assert not any("output 1" in edge for edge in everything)
    assert not sweep.keep[2].any()
    values = jax.jit(lambda *given: circuit_values(graph, first, *given, sweep.keep))(*rest[1:])
    np.testing.assert_allclose(sweep.value, values.mean(axis=0), atol=1e-6)


def test_it_is_the_greedy_loop():
    graph = mlp_graph(3, (4, 3, 1), activation=jnp.tanh)
    rng = np.random.default_rng(0)
    params = {
        f"Dense_{i}": {"kernel": jnp.asarray(rng.normal(size=(n, m))), "bias": jnp.asarray(rng.normal(size=m))}
        for i, (n, m) in enumerate(((3, 4), (4, 3), (3, 1)))
    }
    clean, corrupted = (jnp.asarray(rng.normal(size=(4, 3))) for _ in range(2))
    target = jnp.zeros(4)
    start = np.ones(graph.allowed.shape, bool)
    start[0, 1] = False
    problem = graph, first, params, clean, corrupted, target
    found = jax.jit(functools.partial(acdc, *problem[:2], start=start))(*problem[2:], threshold=0.05)

    value = jax.jit(
        lambda keep: first(graph.run(params, clean, keep, graph.messages(params, corrupted)), target).mean()
    )
    keep = (graph.allowed & start).astype(float)
    last = float(value(keep))
    for v in reversed(range(len(graph.readers))):
        for u in reversed(range(len(graph.sources))):
            if keep[u, v]:
                keep[u, v] = 0
                new = float(value(keep))
                if last - new < 0.05:
                    last = new
                else:
                    keep[u, v] = 1
    np.testing.assert_array_equal(found.keep, keep > 0)
    assert 0 < found.keep.sum() < start.sum()
    assert float(found.value) == pytest.approx(last, abs=1e-5)
    assert found.edges.shape == (len(kept_edges(graph, start)), 2)
    with pytest.raises(ValueError, match="must agree"):
        acdc(graph, first, params, clean, corrupted[:2], target, threshold=0.1)
