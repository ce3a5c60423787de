"""Scores of what is out of distribution, against NumPy in float64, and how well they tell, against known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from scipy.spatial.distance import cdist

from jaxalign.robustness.ood import (
    energy_score,
    fit_mahalanobis,
    knn_score,
    mahalanobis_score,
    max_logit_score,
    max_softmax_score,
    relative_mahalanobis_score,
)
from jaxalign.robustness.ood_metrics import auroc, detection_interval, false_positive_rate_at


@pytest.fixture(scope="module")
def features():
    """Training features [60, 5] of three classes with labels, and others [7, 5]; far from 0, and unequally scaled."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    scales = np.array([1.0, 3.0, 0.5, 1.0, 2.0])
    train = (rng.normal(size=(60, 5)) + 4 * np.eye(5)[labels]) * scales + 20
    return train, labels, rng.normal(size=(7, 5)) * 3 + 21


def test_logit_scores_by_hand():
    @jax.jit
    def scores(logits, temperature):
        return max_softmax_score(logits), max_logit_score(logits), energy_score(logits, temperature=temperature)

    logits = jnp.array([[3.0, 3.0, 3.0], [1.0, 5.0, 2.0], [-3.0, -3.0, 0.0]])
    softmax, logit, energy = scores(logits, 2.0)
    others = np.exp(-4) + np.exp(-3)
    np.testing.assert_allclose(softmax[:2], [2 / 3, others / (1 + others)], rtol=1e-6)
    np.testing.assert_array_equal(logit, [-3.0, -5.0, 0.0])
    np.testing.assert_allclose(energy[0], -3 - 2 * np.log(3), rtol=1e-6)
    np.testing.assert_allclose(scores(logits, 1e-3)[2], logit, atol=2e-3)
    sure, _, _ = scores(jnp.array([[30.0, 0.0, 0.0], [40.0, 0.0, 0.0], [0.0, 0.0, 50.0]]), 1.0)
    np.testing.assert_allclose(sure, 2 * np.exp([-30.0, -40.0, -50.0]), rtol=1e-5)  # where the softmax is 1


def test_logit_scores_match_numpy():
    logits = np.random.default_rng(1).normal(size=(20, 6)) * 10
    expected = {
        max_softmax_score: 1 - special.softmax(logits, axis=1).max(axis=1),
        energy_score: -special.logsumexp(logits, axis=1),
    }
    for score, values in expected.items():
        single = jax.jit(score)(logits.astype(np.float32))
        np.testing.assert_allclose(single, values, rtol=1e-4, atol=1e-7)
        lanes = jax.jit(jax.vmap(score))(jnp.asarray(logits, jnp.bfloat16))
        assert lanes.shape == (20,)
        assert lanes.dtype == jnp.float32
        with jax.enable_x64(True):
            np.testing.assert_allclose(jax.jit(score)(logits), values, rtol=1e-7, atol=1e-14)


def test_mahalanobis_by_hand():
    # Two classes at (0, 0) and (10, 0); within each the covariance is diag(1, 4).
    spread = np.array([[np.sqrt(2), 0], [-np.sqrt(2), 0], [0, np.sqrt(8)], [0, -np.sqrt(8)]])
    train = np.concatenate([spread, spread + np.array([10, 0])])
    model = fit_mahalanobis(train, np.repeat([0, 1], 4), num_classes=2, shrinkage=0.0)
    points = jnp.array([[0.0, 0.0], [3.0, 0.0], [9.0, 4.0], [5.0, 2.0]])
    np.testing.assert_allclose(mahalanobis_score(model, points), [0, 9, 5, 26], atol=1e-4)
    # All together: mean (5, 0), covariance diag(1 + 25, 4).
    background = np.array([25 / 26, 4 / 26, 16 / 26 + 4, 1])
    np.testing.assert_allclose(relative_mahalanobis_score(model, points), [0, 9, 5, 26] - background, atol=1e-4)


def test_mahalanobis_matches_numpy(features):
    train, labels, points = features
    means = np.stack([train[labels == c].mean(axis=0) for c in range(3)])
    covariance = np.cov((train - means[labels]).T, bias=True)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 5 * np.eye(5)
    expected = cdist(points, means, "mahalanobis", VI=np.linalg.inv(shrunk)).min(axis=1) ** 2
    model = fit_mahalanobis(train, labels, num_classes=3, shrinkage=0.3)
    np.testing.assert_allclose(jax.jit(mahalanobis_score)(model, points), expected, rtol=1e-4)
    # An affine change of the features changes nothing.
    turn = np.random.default_rng(2).normal(size=(5, 5))
    plain, turned = (fit_mahalanobis(x, labels, num_classes=3, shrinkage=0.0) for x in (train, train @ turn + 5))
    for score in (mahalanobis_score, relative_mahalanobis_score):
        np.testing.assert_allclose(score(turned, points @ turn + 5), score(plain, points), rtol=2e-3)


def test_a_dead_feature_needs_shrinkage(features):
    train, labels, points = (np.pad(x, [(0, 0), (0, 1)]) if x.ndim == 2 else x for x in features)
    with pytest.raises(ValueError, match="raise `shrinkage`"):
        fit_mahalanobis(train, labels, num_classes=3, shrinkage=0.0)
    assert jnp.isfinite(mahalanobis_score(fit_mahalanobis(train, labels, num_classes=3), points)).all()


@pytest.mark.parametrize(
    ("k", "normalize", "chunk"), [(1, True, 7), (4, False, 7), (4, True, 4096), (60, False, 16)]
)
def test_knn_matches_numpy_whatever_the_chunk(features, k, normalize, chunk):
    train, _, points = (x.astype(np.float32) for x in features)
    a, b = ((x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x) for x in (points, train))
    expected = np.sort(cdist(a.astype(np.float64), b.astype(np.float64)), axis=1)[:, k - 1]
    score = jax.jit(functools.partial(knn_score, k=k, normalize=normalize, chunk=chunk))
    np.testing.assert_allclose(score(train, points), expected, rtol=1e-4)


def test_knn_of_training_rows_is_zero_and_of_zeros_finite(features):
    train = features[0]
    scores = jax.jit(functools.partial(knn_score, k=1))(train, np.concatenate([train[:9], np.zeros((1, 5))]))
    np.testing.assert_allclose(scores[:9], 0.0, atol=1e-6)
    np.testing.assert_allclose(scores[9], 1.0, rtol=1e-5)  # from no direction to any
    with pytest.raises(ValueError, match="k=61"):
        knn_score(train, train, k=61)


def test_auroc_of_shifted_gaussians():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=20_000), rng.normal(size=20_000) + 1
    area, rate = jax.jit(lambda *both: (auroc(*both), false_positive_rate_at(*both)))(inside, outside)
    np.testing.assert_allclose(area, stats.norm.cdf(1 / np.sqrt(2)), atol=0.01)
    # The share of N(1, 1) below the 95% quantile of N(0, 1).
    np.testing.assert_allclose(rate, stats.norm.cdf(stats.norm.ppf(0.95) - 1), atol=0.015)


def test_detection_measures_by_hand():
    inside, outside = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([2.0, 3.0, 5.0])
    np.testing.assert_allclose(auroc(inside, outside), (1.5 + 2.5 + 4) / 12, rtol=1e-6)
    measure = jax.jit(lambda a, b, rate: false_positive_rate_at(a, b, true_positive_rate=rate))
    for rate, expected in [(0.25, 0.0), (0.5, 1 / 3), (0.51, 2 / 3), (0.75, 2 / 3), (1.0, 2 / 3)]:
        np.testing.assert_allclose(measure(inside, outside, rate), expected, rtol=1e-6)
    assert jnp.isnan(measure(inside, jnp.array([1.0, jnp.nan, 2.0]), 0.95))
    # 0.95 * 20 is 19, and no more.
    assert measure(jnp.arange(20.0), jnp.array([18.0, 18.5, 19.0]), 0.95) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="both"):
        false_positive_rate_at(inside, jnp.zeros(0))


@pytest.mark.slow
def test_interval_has_the_width_theory_gives():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(size=150), rng.normal(size=100) + 1
    low, high = jax.jit(functools.partial(detection_interval, resamples=400))(jax.random.key(4), inside, outside)
    a = float(auroc(inside, outside))
    assert low < a < high
    # Hanley and McNeil 1982, equation 1, with their approximations of the two probabilities.
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    deviation = np.sqrt((a * (1 - a) + 99 * (q1 - a * a) + 149 * (q2 - a * a)) / (100 * 150))
    np.testing.assert_allclose(high - low, 2 * 1.96 * deviation, rtol=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(60, int)}, "must occur"),
        ({"labels": np.arange(60) % 4}, "must occur"),
        ({"labels": np.zeros(59, int)}, r"\(59,\)"),
        ({"shrinkage": 1.5}, "shrinkage"),
        ({"features": np.full((60, 5), np.nan)}, "finite"),
    ],
)
def test_bad_fits_are_named(features, change, message):
    given = {"features": features[0], "labels": features[1], "num_classes": 3} | change
    with pytest.raises(ValueError, match=message):
        fit_mahalanobis(given.pop("features"), given.pop("labels"), **given)
