"""Toy models of superposition: known polytopes, and a model small enough to know what it must learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import train
from jaxalign.interpretability.toy_superposition import (
    POLYTOPES,
    feature_dimensionality,
    polytope,
    toy_features,
    toy_model,
    toy_output,
)


@pytest.mark.parametrize("name", POLYTOPES)
def test_the_dimensionality_of_known_solids(name):
    corners = polytope(name)
    np.testing.assert_allclose(np.linalg.norm(corners, axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(feature_dimensionality(corners), POLYTOPES[name], rtol=1e-6)
    # It depends on directions alone once all lengths are the same, and not on how space is turned.
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((corners.shape[1],) * 2))
    np.testing.assert_allclose(feature_dimensionality(3.0 * corners @ turn), POLYTOPES[name], rtol=1e-5)
    assert POLYTOPES[name] == pytest.approx(corners.shape[1] / corners.shape[0])


def test_dimensionality_against_its_definition_and_its_bound():
    w = np.random.default_rng(1).standard_normal((7, 3))
    w[4] = 0.0
    expected = [0.0 if not r.any() else r @ r / sum((r / np.linalg.norm(r) @ s) ** 2 for s in w) for r in w]
    result = feature_dimensionality(w)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    assert 0 < result.sum() <= 3
    gradient = jax.jit(jax.grad(lambda w: feature_dimensionality(w).sum()))(jnp.asarray(w, jnp.float32))
    assert bool(jnp.isfinite(gradient).all())
    with jax.enable_x64(True):
        np.testing.assert_allclose(feature_dimensionality(jnp.asarray(w)), expected, rtol=1e-13)


def test_an_unknown_polytope_is_named():
    with pytest.raises(ValueError, match=r"unknown 'cube'; there are orthogonal, tetrahedron"):
        polytope("cube")


def test_features_are_as_sparse_as_asked_and_uniform():
    x = toy_features(jax.random.key(0), 20000, 4, sparsity=0.9)
    assert float((x > 0).mean()) == pytest.approx(0.1, abs=0.01)
    assert float(x[x > 0].mean()) == pytest.approx(0.5, abs=0.02)
    assert float(x.max()) < 1


def test_the_output_by_hand():
    params = {"W": jnp.array([[1.0], [-1.0]]), "b": jnp.array([0.5, -0.25])}
    # h = 2 - 1 = 1; W h = (1, -1); plus b and relu.
    np.testing.assert_allclose(toy_output(params, jnp.array([[2.0, 1.0]])), [[1.5, 0.0]])


def test_dense_features_take_one_dimension_each_and_sparse_ones_share():
    """Two features in one dimension: dense, only the important one is kept; sparse, both, as an antipodal pair."""

    def run(sparsity, key):
        model = toy_model(
            2, 1, importance=jnp.array([1.0, 0.8]), sparsity=sparsity, batch=256, optimizer=optax.adam(2e-2)
        )
        state, metrics = train(model, key, None, length=600)
        return state.params, metrics["loss"]

    keys = jax.random.split(jax.random.key(0), 3)
    lanes = jax.vmap(run, in_axes=(None, 0))
    params, loss = jax.jit(jax.vmap(lanes, in_axes=(0, None)))(jnp.array([0.0, 0.97]), keys)
    dimensionality = jax.vmap(jax.vmap(feature_dimensionality))(params["W"])
    best = jnp.argmin(loss[:, :, -100:].mean(axis=-1), axis=1)  # some seeds end in a worse optimum
    np.testing.assert_allclose(dimensionality[0, best[0]], [1.0, 0.0], atol=0.05)
    np.testing.assert_allclose(dimensionality[1, best[1]], [0.5, 0.5], atol=0.05)
    assert float(params["W"][1, best[1]].prod()) < 0
