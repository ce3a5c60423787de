"""The metrics against NumPy float64, in parts and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.sae_metrics import add_moments, evaluate_sae, metrics_of, sae_metrics, sae_moments
from jaxalign.interpretability.sparse_autoencoder import SAEConfig, sae_decode, sae_encode, sae_init


def draw(rows=60):
    random = np.random.default_rng(0)
    x = 50 + random.standard_normal((rows, 5))
    features = np.maximum(random.standard_normal((rows, 8)) - np.linspace(-1, 4, 8), 0)
    return x, x + 0.3 * random.standard_normal(x.shape) - 1, features


def reference(x, x_hat, f):
    errors = ((x - x_hat) ** 2).sum(axis=1)
    lengths, lengths_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    products, density = (x * x_hat).sum(axis=1), (f > 0).mean(axis=0)
    variance = (x**2).sum(axis=1).mean() - (x.mean(axis=0) ** 2).sum()
    return {
        "l0": (f > 0).sum(axis=1).mean(),
        "mse": errors.mean(),
        "explained_variance": 1 - errors.mean() / variance,
        "cosine_similarity": (products / lengths / lengths_hat).mean(),
        "l2_ratio": lengths_hat.mean() / lengths.mean(),
        "shrinkage": (lengths_hat**2).mean() / products.mean(),
        "dead_fraction": (density == 0).mean(),
        "dense_fraction_1": (density > 0.01).mean(),
        "dense_fraction_10": (density > 0.1).mean(),
    }


def test_matches_numpy_and_parts_add_up():
    x, x_hat, f = draw()
    expected = reference(x, x_hat, f)
    whole = jax.jit(sae_metrics)(x, x_hat, f)
    parts = [sae_moments(a, b, c) for a, b, c in zip(*(np.split(v, [7, 30]) for v in (x, x_hat, f)), strict=True)]
    joined = metrics_of(add_moments(add_moments(parts[0], parts[1]), parts[2]))
    assert whole.keys() == joined.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(whole[name], value, rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(joined[name], value, rtol=2e-5, err_msg=name)


def test_by_hand():
    x = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    found = sae_metrics(x, jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([[0.0, 0.0, 1.0], [0.0, 3.0, 1.0]]))
    # Errors 1 and 1 against a variance of 1; the first row has no direction and counts 0.
    hand = {"l0": 1.5, "mse": 1.0, "explained_variance": 0.0, "cosine_similarity": 0.5, "l2_ratio": 1.0}
    hand |= {"shrinkage": 1.0, "dead_fraction": 1 / 3, "dense_fraction_10": 2 / 3}
    for name, value in hand.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_perfect_reconstruction_and_the_mean_alone():
    x, _, f = draw()
    perfect = sae_metrics(x, x, f)
    assert (perfect["explained_variance"], perfect["mse"]) == (1.0, 0.0)
    np.testing.assert_allclose([perfect["cosine_similarity"], perfect["shrinkage"]], 1.0, rtol=1e-6)
    mean = sae_metrics(x, np.broadcast_to(x.mean(axis=0), x.shape), f)
    np.testing.assert_allclose(mean["explained_variance"], 0.0, atol=1e-5)


def test_a_stream_of_batches_is_as_their_rows_together():
    config = SAEConfig(5, 12, "topk", k=3, layers=2)
    params = sae_init(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (4, 6, 2, 5)) + 3
    streamed = jax.jit(lambda params, x: evaluate_sae(params, x, config))(params, x)
    rows = x.reshape(24, 2, 5)
    f = sae_encode(params, rows, config)
    whole = sae_metrics(rows, sae_decode(params, f, config), f)
    for name, value in whole.items():
        np.testing.assert_allclose(streamed[name], value, rtol=1e-5, err_msg=name)


def test_bad_shapes_are_shown():
    for shapes in (((4, 3), (4, 2), (4, 5)), ((4, 3), (4, 3), (5, 5)), ((0, 3), (0, 3), (0, 5))):
        with pytest.raises(ValueError, match="features"):
            sae_metrics(*(jnp.zeros(shape) for shape in shapes))
