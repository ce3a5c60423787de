"""Randomised smoothing on a linear classifier, whose smoothed self and true radius are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxalign import Network, train
from jaxalign.certification.smoothing import (
    SmoothingCertificate,
    smoothed_accuracy_curve,
    smoothed_certify,
    smoothed_counts,
    smoothed_predict,
)
from jaxalign.networks import MLP
from jaxalign.robustness.attack_program import _programs
from jaxalign.robustness.smooth_adversarial_training import gaussian_augmentation

KEY = jax.random.key(0)
W, B, SIGMA = np.array([3.0, -4.0], np.float32), 0.5, 0.25
X = np.array([[0.1, -0.1], [0.3, 0.2], [-0.5, 0.4], [-0.1, 0.05]], np.float32)
TRUE = np.abs(X @ W + B) / 5  # the last one lies on the boundary


def linear(x):
    return jnp.stack([x @ W + B, jnp.zeros(len(x))], axis=1)


@pytest.fixture(scope="module")
def certificate():
    return smoothed_certify(KEY, linear, X, sigma=SIGMA, n=20_000, batch_size=1000)


def test_a_linear_classifier_is_its_own_smoothed_one(certificate):
    np.testing.assert_array_equal(certificate.prediction, [0, 0, 1, -1])
    np.testing.assert_array_equal(certificate.abstained, [False, False, False, True])
    assert np.all(certificate.radius <= TRUE)
    np.testing.assert_allclose(certificate.radius, TRUE, atol=0.03)
    assert certificate.radius[3] == 0


def test_radius_is_that_of_the_counts_of_the_second_stage(certificate):
    counts = smoothed_counts(jax.random.split(KEY)[1], linear, X, sigma=SIGMA, n=20_000, batch_size=700)
    assert np.all(np.sum(counts, axis=1) == 20_000)
    p = stats.beta.ppf(0.001, np.max(counts, axis=1), 20_001 - np.max(counts, axis=1))
    np.testing.assert_allclose(certificate.radius[:3], SIGMA * stats.norm.ppf(p)[:3], rtol=2e-5)
    expected = 20_000 * stats.norm.cdf((X @ W + B) / (5 * SIGMA))
    assert np.all(np.abs(counts[:, 0] - expected) < 4 * np.sqrt(20_000) / 2)


def counted(x, size):
    return np.asarray(smoothed_counts(KEY, linear, x, sigma=SIGMA, n=257, batch_size=size))


def test_counts_do_not_depend_on_the_batch_size():
    first = counted(X, 64)  # the last of five chunks holds one copy
    np.testing.assert_array_equal(counted(X, 1000), first)
    again = counted(X[[0, 1, 0, 0]], 64)
    np.testing.assert_array_equal(again[:2], first[:2])
    assert not np.array_equal(again[0], again[2])  # examples have noise of their own


def test_certificates_fail_no_more_often_than_alpha():
    """On the boundary no certificate is true, and one that had reused the n0 copies would come twice as often."""
    many = lambda x: smoothed_certify(  # noqa: E731
        KEY, linear, np.tile(x, (4000, 1)), sigma=SIGMA, n0=100, n=100, alpha=0.1, batch_size=100
    )
    wrong = 1 - np.mean(many(X[3]).abstained)
    possible = stats.binom.sf(stats.binom.ppf(0.9, 100, 0.5), 100, 0.5)  # the level a discrete test reaches
    assert abs(wrong - possible) < 4 * np.sqrt(possible / 4000)
    assert np.mean(many(X[0]).radius > TRUE[0]) < 0.1 + 4 * np.sqrt(0.09 / 4000)


def test_predict_equals_the_binomial_test():
    x = np.array([X[0], X[2], X[3], [-0.1, 0.04]], np.float32)
    counts = counted(x, 64)
    sure = np.array([stats.binomtest(int(c[0]), 257).pvalue <= 0.01 for c in counts])
    predicted = smoothed_predict(KEY, linear, x, sigma=SIGMA, n=257, alpha=0.01, batch_size=64)
    np.testing.assert_array_equal(predicted, np.where(sure, counts.argmax(axis=1), -1))
    assert 0 < sure.sum() < len(x)


def test_under_jit_over_sigmas_and_in_double_precision():
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        run = jax.jit(jax.vmap(lambda s: smoothed_certify(KEY, linear, x, sigma=s, n=5000, batch_size=500)))
        found = jax.device_get(run(jnp.array([0.05, SIGMA])))
    assert found.radius.dtype == np.float64
    np.testing.assert_array_equal(found.prediction[1], [0, 0, 1, -1])
    np.testing.assert_allclose(found.radius[1], TRUE, atol=0.06)
    assert np.all(found.radius <= TRUE)
    np.testing.assert_allclose(found.radius[0, 0], 0.05 * stats.norm.ppf(0.001**2e-4), rtol=1e-6)  # all 5000 agree


def test_what_apply_closes_over_is_never_stale_and_never_compiled_again():
    held = {"w": jnp.asarray(W)}
    apply = lambda x: jnp.stack([x @ held["w"] + B, jnp.zeros(len(x))], axis=1)  # noqa: E731
    run = lambda: smoothed_counts(KEY, apply, X, sigma=SIGMA, n=100, batch_size=50)  # noqa: E731
    first, programs = np.asarray(run()), len(_programs)
    held["w"] = -held["w"]
    assert not np.array_equal(run(), first)
    assert len(_programs) == programs


def test_accuracy_curve_by_hand():
    certificate = SmoothingCertificate(
        jnp.array([0, 1, -1, 2]), jnp.array([0.5, 0.3, 0.0, 0.9]), jnp.array([False, False, True, False])
    )
    curve = jax.jit(smoothed_accuracy_curve)(certificate, jnp.array([0, 1, -1, 1]), jnp.array([0.0, 0.3, 0.4, 1.0]))
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.5, 0.25, 0.0])  # an abstention is wrong whatever y says
    assert np.all((curve.low <= curve.accuracy) & (curve.accuracy <= curve.high))
    with pytest.raises(ValueError, match=r"y \(3,\), prediction \(4,\)"):
        smoothed_accuracy_curve(certificate, jnp.zeros(3), jnp.zeros(1))


@pytest.mark.slow
def test_a_network_trained_on_noise_is_certified():
    centres = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.5]])
    network = Network.from_linen(MLP((16, 3)), centres)
    algorithm = gaussian_augmentation(network, optax.adam(1e-2), sigma=0.5)
    batches = np.tile(centres, (60, 8, 1)), np.tile(np.arange(3), (60, 8))
    state, _ = jax.jit(lambda: train(algorithm, KEY, batches))()
    apply = functools.partial(network.apply, state.params)
    found = smoothed_certify(KEY, apply, centres, sigma=0.5, n=2000, batch_size=500)
    np.testing.assert_array_equal(found.prediction, [0, 1, 2])
    # The nearest centres are 1.8 and 2 apart, so no classifier can reach farther than about half of that at all three.
    assert np.all(found.radius > 0.4)
    assert np.min(found.radius) < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, r"sigma must lie in \(0, inf\)"),
        ({"sigma": jnp.ones(2)}, "sigma must be a scalar"),
        ({"alpha": 1.0}, r"alpha must lie in \(0, 1.0\)"),
        ({"n": 0}, "n must be a whole number of at least 1"),
        ({"n0": 2.5}, "n0 must be a whole number"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"x": X.astype(np.int32)}, r"x must be floating point \[B, ...\], got int32"),
        ({"x": X * [[1], [1], [np.nan], [1]]}, r"x\[2\] has values that are not finite"),
        ({"apply": lambda x: x[:, 0]}, r"apply must give logits \[10, C\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"apply": linear, "x": X, "sigma": SIGMA, "n": 10, "batch_size": 10} | change
    with pytest.raises(ValueError, match=message):
        smoothed_certify(KEY, arguments.pop("apply"), arguments.pop("x"), **arguments)


def test_logits_with_nan_are_named_and_count_for_no_class():
    apply = lambda x: linear(x) * jnp.where(x[:, :1] > 0.5, jnp.nan, 1)  # noqa: E731
    with pytest.raises(ValueError, match=r"apply gives NaN for \d+ of the noisy copies of x\[1\]"):
        smoothed_counts(KEY, apply, X, sigma=0.1, n=1000, batch_size=1000)
