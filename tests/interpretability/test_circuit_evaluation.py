"""Faithfulness, completeness and minimality of circuits whose worth is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.circuit_evaluation import (
    circuit_faithfulness,
    circuit_nodes,
    completeness_circuits,
    node_minimality,
)
from jaxalign.interpretability.circuit_graph import circuit_values
from jaxalign.interpretability.mlp_graph import mlp_graph


def first(output, target):
    return output[:, 0]


def test_faithfulness_by_hand():
    whole, corrupted = jnp.array([4.0, 6.0, 5.0]), jnp.array([1.0, -1.0, 0.0])
    values = jnp.stack([whole, corrupted, jnp.array([2.0, 2.0, 3.5])], axis=1)
    found = circuit_faithfulness(jax.random.key(0), values, whole, corrupted, resamples=500)
    np.testing.assert_allclose(found.value, [1, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose([found.low[:2], found.high[:2]], [[1, 0]] * 2, atol=1e-6)  # whatever the examples
    # Worst and best resamples: ratios of single examples are (2 - 1)/3, (2 + 1)/7, 3.5/5.
    assert 1 / 3 - 1e-6 <= found.low[2] < 0.5 < found.high[2] <= 0.7 + 1e-6
    with pytest.raises(ValueError, match="faithfulness"):
        circuit_faithfulness(jax.random.key(0), values, whole[:2], corrupted)


@pytest.fixture(scope="module")
def redundant():
    """output = n0 + n1 + n2, where n0 = n1 = x0 (two copies of one thing) and n2 = x1."""
    kernels = jnp.array([[1.0, 1, 0], [0, 0, 1]]), jnp.ones((3, 1))
    params = {f"Dense_{i}": {"kernel": w, "bias": jnp.zeros(w.shape[1])} for i, w in enumerate(kernels)}
    graph = mlp_graph(2, (3, 1))
    clean, corrupted = jnp.array([[1.0, 1], [2, 1]]), jnp.zeros((2, 2))
    keep = graph.allowed & (np.arange(5) != 3)[:, None]  # all but the second copy
    return graph, first, params, clean, corrupted, jnp.zeros(2), keep


def test_an_incomplete_circuit_leaves_its_copy_behind(redundant):
    *problem, keep = redundant
    graph = problem[0]
    circuits, rests = completeness_circuits(jax.random.key(0), graph, keep, subsets=3)
    assert not circuits[0].any()
    np.testing.assert_array_equal(rests[0], graph.allowed & ~keep)
    np.testing.assert_array_equal(rests & keep[None], circuits)
    assert (circuits[1] != circuits[2]).any()
    rest = graph.allowed & ~(keep & (np.arange(5) >= 2)[:, None])  # cut from the circuit's neurons to the output
    keeps = np.stack([graph.allowed, keep, rest, circuits[0]])
    found = jax.jit(lambda *given: circuit_values(graph, first, *given, keeps))(*problem[2:])
    np.testing.assert_allclose(found, [[3, 2, 1, 0], [5, 3, 2, 0]], atol=1e-6)
    with pytest.raises(ValueError, match="subsets"):
        completeness_circuits(jax.random.key(0), graph, keep, subsets=0)


def test_minimality_names_what_can_go(redundant):
    *problem, keep = redundant
    graph = problem[0]
    assert [graph.sources[u] for u in circuit_nodes(graph, keep)] == ["input 0", "input 1", "neuron 0.0", "neuron 0.2"]
    minimality = jax.jit(lambda params: node_minimality(*problem[:2], params, *problem[3:], keep, batch_size=2))
    found = minimality(problem[2])
    np.testing.assert_allclose(found, [[1, 1, 1, 1], [2, 1, 2, 1]], atol=1e-6)
    idle = {**problem[2], "Dense_1": {"kernel": jnp.array([[1.0], [1], [0]]), "bias": jnp.zeros(1)}}
    found = minimality(idle)
    np.testing.assert_allclose(found[:, [1, 3]], 0, atol=1e-6)  # x1 and its neuron no longer matter
