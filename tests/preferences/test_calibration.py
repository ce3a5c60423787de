"""Reliability curves by hand, against NumPy's histogram, and of forecasts whose calibration is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.preferences.calibration import brier_score, expected_calibration_error, reliability_curve
from jaxalign.runtime.reliability import reliability_diagram, wilson_interval


def test_a_curve_by_hand():
    curve = reliability_curve([0.1, 0.2, 0.6, 1.0], [0, 1, 1, 0.5], bins=4)
    np.testing.assert_allclose(curve.confidence, [0.15, np.nan, 0.6, 1.0], rtol=1e-6)
    np.testing.assert_allclose(curve.frequency, [0.5, np.nan, 1.0, 0.5])
    np.testing.assert_array_equal(curve.count, [2, 0, 1, 1])
    error = expected_calibration_error([0.1, 0.2, 0.6, 1.0], [0, 1, 1, 0.5], bins=4)
    np.testing.assert_allclose(error, (2 * 0.35 + 0.4 + 0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(brier_score([0.1, 0.2, 0.6, 1.0], [0, 1, 1, 0.5]), (0.01 + 0.64 + 0.16 + 0.25) / 4)


def test_against_numpys_histogram_and_in_float64():
    rng = np.random.default_rng(0)
    p, y = rng.uniform(size=500), rng.integers(0, 2, 500)
    count, _ = np.histogram(p, bins=10, range=(0, 1))
    sums, _ = np.histogram(p, bins=10, range=(0, 1), weights=y)
    said, _ = np.histogram(p, bins=10, range=(0, 1), weights=p)
    with jax.enable_x64(True):
        curve = jax.jit(reliability_curve, static_argnames="bins")(p, y, bins=10)
        error = expected_calibration_error(p, y)
    assert curve.frequency.dtype == np.float64
    np.testing.assert_array_equal(curve.count, count)
    np.testing.assert_allclose(curve.frequency, sums / count, rtol=1e-12)
    np.testing.assert_allclose(curve.confidence, said / count, rtol=1e-12)
    np.testing.assert_allclose(error, np.abs(sums - said).sum() / 500, rtol=1e-12)


def test_a_calibrated_forecast_and_a_boast():
    rng = np.random.default_rng(1)
    p = rng.uniform(size=20_000).astype(np.float32)
    y = rng.uniform(size=20_000) < p
    assert expected_calibration_error(p, y) < 0.02
    np.testing.assert_allclose(brier_score(p, y), (p * (1 - p)).mean(), atol=0.005)
    half = rng.uniform(size=20_000) < 0.5
    np.testing.assert_allclose(expected_calibration_error(np.full(20_000, 0.9), half), 0.4, atol=0.02)
    assert brier_score(np.full(20_000, 0.5), half) == 0.25


def test_a_nan_shows_everywhere_and_bad_arguments_are_named():
    p = jnp.array([0.5, jnp.nan, 0.7])
    curve = reliability_curve(p, jnp.ones(3), bins=3)
    assert all(np.isnan(x).all() for x in curve)
    assert jnp.isnan(expected_calibration_error(p, jnp.ones(3)))
    assert jnp.isnan(expected_calibration_error(jnp.full(3, 0.5), p))
    with pytest.raises(ValueError, match="bins must be at least 1"):
        reliability_curve([0.5], [1], bins=0)
    with pytest.raises(ValueError, match="at least one event"):
        brier_score(np.zeros(0), np.zeros(0))
    with pytest.raises(AssertionError):
        brier_score(np.zeros(3), np.zeros((3, 1)))


def test_lanes_of_a_sweep():
    p, y = np.array([[0.2, 0.8], [0.4, 0.9]]), np.array([[0, 1], [1, 1]])
    together = jax.vmap(expected_calibration_error)(p, y)
    np.testing.assert_allclose(together, [expected_calibration_error(a, b) for a, b in zip(p, y, strict=True)])


def test_wilsons_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    low, high = wilson_interval(np.array([0.0, 0.3, 1.0]), np.array([5, 10, 4]))
    for k, n, a, b in zip((0, 3, 4), (5, 10, 4), low, high, strict=True):
        expected = stats.binomtest(k, n).proportion_ci(method="wilson")
        np.testing.assert_allclose([a, b], expected, atol=1e-12)


def test_the_diagram_has_a_point_for_every_bin_that_is_not_empty():
    figure = reliability_diagram(reliability_curve([0.1, 0.2, 0.6, 1.0], [0, 1, 1, 0], bins=4), title="Held out")
    axes = figure.axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 3]
    np.testing.assert_allclose(lines[0].get_ydata(), [0.5, 1.0, 0.0])
    assert figure.get_suptitle() == "Held out"
    sure = reliability_diagram(reliability_curve([0.9, 0.6], [1, 0], bins=10))
    assert sure.axes[0].get_xlim()[0] == pytest.approx(0.48)
