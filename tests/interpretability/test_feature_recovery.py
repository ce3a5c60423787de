"""Recovery measures on dictionaries whose answer is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.feature_recovery import (
    absolute_cosines,
    count_detections,
    detection_scores,
    feature_recovery,
    hungarian_matching,
    mean_correlation_coefficient,
)
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.synthetic_features import synthetic_features

MEASURED = {"samples": 2048, "batch": 1024}


@pytest.fixture(scope="module")
def world():
    """As many features as dimensions, orthonormal."""
    return jax.jit(
        functools.partial(
            synthetic_features, num_features=12, dim=12, roots=2, branching=2, depth=1, rank=4, min_probability=0.05,
            std_magnitude=(0.2, 0.0), spread_steps=200,
        )
    )(jax.random.key(0))  # fmt: skip


def perfect(world):
    """The SAE that inverts an orthonormal dictionary: W_enc its transpose, b_dec the bias."""
    params = {
        "W_enc": world.dictionary.T, "b_enc": jnp.zeros(12), "W_dec": world.dictionary, "b_dec": world.bias,
        "threshold": jnp.full(12, 0.5),
    }  # fmt: skip
    config = SAEConfig(12, 12, "jumprelu")
    return params, config


def measure(world, params, config, decoder=None):
    encode = functools.partial(sae_encode, params, config=config)
    decode = functools.partial(sae_decode, params, config=config)
    return feature_recovery(
        jax.random.key(1), encode, decode, params["W_dec"] if decoder is None else decoder, world, **MEASURED
    )


def test_a_perfect_sae_scores_one(world):
    params, config = perfect(world)
    order = np.random.default_rng(0).permutation(12)
    shuffled = {name: leaf[order] if name in ("W_dec", "b_enc", "threshold") else leaf for name, leaf in params.items()}
    shuffled["W_enc"] = params["W_enc"][:, order]
    found = measure(world, shuffled, config)
    for name in ("mcc", "f1", "precision", "recall", "uniqueness", "explained_variance"):
        assert getattr(found, name) == pytest.approx(1.0, abs=2e-3), name
    assert found.l0 == pytest.approx(found.true_l0, abs=0.01)
    assert found.true_l0 == pytest.approx(float(world.probability.sum()), abs=0.1)
    assert found.dead_fraction == 0
    np.testing.assert_array_equal(found.closest, order)


def test_a_dead_and_a_doubled_latent_count_against_it(world):
    params, config = perfect(world)
    params["threshold"] = params["threshold"].at[3].set(1e9)
    params["W_dec"] = params["W_dec"].at[5].set(params["W_dec"][4])
    found = measure(world, params, config)
    assert found.dead_fraction == pytest.approx(1 / 12)
    assert found.uniqueness == pytest.approx(11 / 12)
    assert found.latent_f1[3] == 0
    assert found.latent_f1[4] == pytest.approx(1.0, abs=1e-3)
    assert found.latent_f1[5] < 0.9
    assert found.mcc < 0.99
    assert found.explained_variance < 0.99


def test_the_matching_against_all_permutations():
    import itertools

    rng = np.random.default_rng(0)
    decoder, dictionary = rng.standard_normal((4, 3)), rng.standard_normal((6, 3))
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    similarity = np.abs(unit(decoder) @ unit(dictionary).T)
    best = max(similarity[range(4), list(columns)].mean() for columns in itertools.permutations(range(6), 4))
    assert mean_correlation_coefficient(decoder, dictionary) == pytest.approx(best, rel=1e-5)
    assert mean_correlation_coefficient(dictionary, decoder) == pytest.approx(best, rel=1e-5)
    assert mean_correlation_coefficient(decoder, -2 * decoder) == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(absolute_cosines(decoder, dictionary), similarity, rtol=1e-5)
    assert float(absolute_cosines(jnp.zeros((1, 3)), dictionary).max()) == 0
    with pytest.raises(ValueError, match="not finite"):
        hungarian_matching(np.full((2, 2), np.nan))


def test_detections_by_hand():
    latents = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    features = jnp.array([[0.0, 3.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    counts = jax.jit(count_detections)(latents, features, jnp.array([1, 0]))
    np.testing.assert_array_equal(jnp.stack(counts), [[2, 0], [1, 0], [1, 1], [0, 3]])
    precision, recall, f1 = detection_scores(counts)
    np.testing.assert_allclose(precision, [2 / 3, 0])
    np.testing.assert_allclose(recall, [2 / 3, 0])
    np.testing.assert_allclose(f1, [2 / 3, 0])
    halves = [count_detections(latents[i], features[i], jnp.array([1, 0])) for i in (slice(0, 2), slice(2, 4))]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(jnp.add, *halves), counts)


def test_bad_arguments_are_named(world):
    params, config = perfect(world)
    with pytest.raises(ValueError, match=r"decoder is \(3, 4\), the data's D is 12"):
        measure(world, params, config, decoder=jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="multiple of batch, got 100 and 64"):
        feature_recovery(jax.random.key(0), sae_encode, sae_decode, params["W_dec"], world, samples=100, batch=64)
