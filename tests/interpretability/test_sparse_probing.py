"""Sparse probes: latents that carry the concept are chosen, and shuffled labels give no better than the base rate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.sparse_probing import mean_differences, sparse_probing

ROWS = 600


@pytest.fixture(scope="module")
def concept():
    """12 latents; the 4th says the label but for one row in ten, the 8th says it weakly."""
    rng = np.random.default_rng(0)
    labels = rng.random(ROWS) < 0.4
    latents = np.abs(rng.standard_normal((ROWS, 12))) * (rng.random((ROWS, 12)) < 0.3)
    latents[:, 3] = 3.0 * (labels ^ (rng.random(ROWS) < 0.1)) * rng.uniform(0.5, 1.5, ROWS)
    latents[:, 7] = labels + 2.0 * rng.standard_normal(ROWS)
    return jnp.asarray(latents, jnp.float32), jnp.asarray(labels)


@pytest.fixture(scope="module")
def found(concept):
    """Probes for the concept and its opposite, in one call."""
    latents, labels = concept
    probe = functools.partial(sparse_probing, jax.random.key(2), latents, k=2, held_out=0.25)
    return jax.jit(jax.vmap(probe))(jnp.stack([labels, ~labels]))


def test_the_probe_finds_the_latents_and_beats_its_control(found):
    np.testing.assert_array_equal(found.latents, [[3, 7], [3, 7]])
    assert 0.85 < float(found.accuracy[0]) < 0.95
    assert float(found.low[0]) < float(found.accuracy[0]) < float(found.high[0])
    assert float(found.low[0]) > float(found.majority[0])
    assert abs(float(found.control[0]) - float(found.majority[0])) < 0.1
    np.testing.assert_allclose(found.accuracy[0], found.accuracy[1])
    np.testing.assert_allclose(found.weights[0], -found.weights[1], rtol=1e-3)


def test_the_held_out_accuracy_is_that_of_the_probe(concept, found):
    latents, labels = (np.asarray(part) for part in concept)
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(2))[0], ROWS))[: ROWS // 4]
    odds = latents[order][:, np.asarray(found.latents[0])] @ np.asarray(found.weights[0]) + float(found.bias[0])
    assert float(found.accuracy[0]) == pytest.approx(float(((odds > 0) == labels[order]).mean()))


def test_the_weights_against_scipy(concept, found):
    """The maximum of the penalised likelihood on the training rows, in float64."""
    from scipy.optimize import minimize

    latents, labels = (np.asarray(part) for part in concept)
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.key(2))[0], ROWS))[ROWS // 4 :]
    x, sign = latents[order][:, [3, 7]].astype(np.float64), np.where(labels[order], 1.0, -1.0)
    std = x.std(axis=0)

    def loss(w):  # two columns of opposite sign share the penalty, so it is half
        return np.logaddexp(0, -sign * (x @ w[:2] + w[2])).mean() + 0.25 * 1e-3 * np.sum((std * w[:2]) ** 2)

    expected = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8}).x
    np.testing.assert_allclose([*found.weights[0], found.bias[0]], expected, rtol=1e-2)


def test_mean_differences_by_hand():
    latents = jnp.array([[1.0, 5.0], [3.0, 5.0], [4.0, 2.0]])
    np.testing.assert_allclose(mean_differences(latents, jnp.array([True, True, False])), [-2.0, 3.0])
    np.testing.assert_allclose(mean_differences(latents, jnp.zeros(3, bool)), [0.0, 0.0])


def test_bad_arguments_are_named(concept):
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.12, got 13"):
        sparse_probing(jax.random.key(0), *concept, k=13)
    with pytest.raises(ValueError, match="leaves a part empty"):
        sparse_probing(jax.random.key(0), *concept, k=1, held_out=0.0)
