"""Measures of samples: hand numbers, SciPy and NumPy, and intervals that cover."""

import jax
import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.special import softmax

from jaxalign.robustness.gan_quality import (
    class_coverage,
    classifier_score,
    frechet_distance,
    jackknife,
    precision_and_recall,
)

RNG = np.random.default_rng(0)
near = jax.jit(precision_and_recall, static_argnames="k")
score = jax.jit(classifier_score)


def test_classifier_score_of_sure_even_and_of_equal_predictions():
    sure = 200.0 * np.eye(4)  # probabilities of 0 in float32
    assert float(score(sure)) == pytest.approx(4.0)
    assert float(score(np.stack([sure[0], sure[0], sure[1], sure[1]]))) == pytest.approx(2.0)
    assert float(score(np.tile(RNG.normal(size=(1, 4)), (4, 1)))) == pytest.approx(1.0, abs=1e-5)


def test_classifier_score_matches_numpy_and_has_a_gradient():
    logits = RNG.normal(size=(6, 4)) * 2
    p = softmax(logits, axis=1)
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0, keepdims=True))), axis=1)))
    value_and_gradient = jax.jit(jax.value_and_grad(classifier_score))
    value, gradient = value_and_gradient(logits)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert np.abs(gradient).max() > 0.01
    assert np.isfinite(value_and_gradient(200.0 * np.eye(4)[[0, 1, 2, 3, 0, 1]])[1]).all()


def test_class_coverage():
    logits = 5.0 * np.eye(4)[[0, 0, 2, 2, 2, 2, 1, 1]]
    covered, entropy = jax.jit(class_coverage)(logits)
    assert float(covered) == 0.75
    assert float(entropy) == pytest.approx(1.5 * np.log(2), rel=1e-6)


def test_frechet_distance_by_hand_in_one_dimension():
    """(m_r - m_f)^2 + (s_r - s_f)^2, with rows +-s / sqrt(2) of deviation s."""
    real, fake = np.array([[1.0], [-1.0]]) / np.sqrt(2), 5.0 + np.array([[3.0], [-3.0]]) / np.sqrt(2)
    assert frechet_distance(real, fake) == pytest.approx(25.0 + 4.0)


def test_frechet_distance_matches_scipy():
    real, fake = RNG.normal(size=(50, 3)) @ RNG.normal(size=(3, 3)), RNG.normal(size=(40, 3)) + 0.3
    s, t = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    expected = np.sum((real.mean(0) - fake.mean(0)) ** 2) + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-8)
    # Fewer rows than features: singular covariances.
    assert np.isfinite(frechet_distance(RNG.normal(size=(4, 9)), RNG.normal(size=(5, 9))))
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        frechet_distance(np.zeros((5, 3)), np.zeros((5, 2)))


def test_precision_and_recall_by_hand():
    """Data at 0, 1, 2, 10 with k = 1: balls of radius 1, 1, 1, 8. The fakes' own radii are 0.5, 0.5 and 94."""
    real, fake = np.array([[0.0], [1.0], [2.0], [10.0]]), np.array([[5.5], [6.0], [100.0]])
    precision, recall = near(real, fake, k=1)
    assert float(precision) == pytest.approx(2 / 3)
    assert float(recall) == pytest.approx(1 / 4)  # only 10 is within 94 of 100
    with pytest.raises(ValueError, match="k = 3"):
        precision_and_recall(real, fake, k=3)


def test_precision_and_recall_match_numpy():
    real, fake = RNG.normal(size=(40, 3)), 0.7 * RNG.normal(size=(40, 3)) + 0.5

    def share_inside(points, centres, k):
        own = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=2), axis=1)[:, k]
        return (np.linalg.norm(points[:, None] - centres[None], axis=2) <= own[None]).any(axis=1).mean()

    measured = near(real, fake, k=3)
    np.testing.assert_allclose(measured, [share_inside(fake, real, 3), share_inside(real, fake, 3)], rtol=1e-6)
    np.testing.assert_array_equal(measured, near(fake, real, k=3)[::-1])


def test_jackknife_of_a_mean_is_the_t_interval_of_the_groups():
    x = RNG.normal(size=40)
    estimate = jackknife(np.mean, x, groups=20)
    groups = x.reshape(2, 20).mean(axis=0)
    error = groups.std(ddof=1) / np.sqrt(20)
    assert estimate.value == pytest.approx(x.mean())
    np.testing.assert_allclose([estimate.low, estimate.high], x.mean() + 2.0930240544 * error * np.array([-1, 1]))
    with pytest.raises(ValueError, match="groups"):
        jackknife(np.mean, x, groups=21)


def test_jackknife_takes_the_bias_out_of_a_frechet_distance_and_covers_it():
    rng, features = np.random.default_rng(3), 4

    def draw(shift, rows):
        return rng.normal(size=(rows, features)) + shift

    estimates = [jackknife(frechet_distance, draw(0, 60), draw(0.5, 60), groups=10) for _ in range(60)]
    plain = [frechet_distance(draw(0, 60), draw(0.5, 60)) for _ in range(60)]
    truth = 0.25 * features
    assert abs(np.mean([e.value for e in estimates]) - truth) < 0.5 * (np.mean(plain) - truth)
    assert np.mean([e.low <= truth <= e.high for e in estimates]) >= 0.85


def test_jackknife_of_several_numbers_and_jax_functions():
    logits = RNG.normal(size=(12, 3))
    estimate = jackknife(lambda z: np.array([score(z), np.mean(z)]), logits, groups=3)
    assert estimate.value.shape == estimate.low.shape == (2,)
    assert (estimate.low <= estimate.value).all()
