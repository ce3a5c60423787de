"""Exact binomial bounds, whose trap is float32 at a hundred thousand trials."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxalign.certification.clopper_pearson import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    fair_coin_p_value,
)

TRIALS = (1, 10, 100, 10_000, 100_000)


@pytest.fixture(scope="module")
def grid():
    """(successes, trials, alpha), flat: both ends and the middle at every number of trials, and all outcomes of 30."""
    rows = [(k, 30, 0.1) for k in range(31)]
    for n in TRIALS:
        ends = np.unique(np.clip(np.r_[0:8, n - 8 : n + 1, np.linspace(0, n, 20).round()], 0, n))
        rows += [(k, n, alpha) for k in ends for alpha in (1e-6, 0.001, 0.125, 0.5)]
    return tuple(np.array(column) for column in zip(*rows, strict=True))


@pytest.fixture(scope="module")
def found(grid):
    both = jax.jit(lambda k, n, alpha: (clopper_pearson_lower(k, n, alpha), clopper_pearson_upper(k, n, alpha)))
    return tuple(np.asarray(v, np.float64) for v in both(*grid))


def exact(k, n, alpha):
    with np.errstate(invalid="ignore"):
        lower = np.where(k == 0, 0.0, stats.beta.ppf(alpha, np.maximum(k, 1), n - k + 1))
        upper = np.where(k == n, 1.0, stats.beta.isf(alpha, k + 1, np.maximum(n - k, 1)))
    return lower, upper


def test_equal_to_scipy_and_never_on_the_wrong_side_in_float32(grid, found):
    (low, high), (lower, upper) = found, exact(*grid)
    assert np.all(low <= lower)
    assert np.all(high >= upper)
    np.testing.assert_allclose(low, lower, rtol=0, atol=1e-6)
    np.testing.assert_allclose(high, upper, rtol=0, atol=1e-6)
    np.testing.assert_allclose(high, upper, rtol=5e-5)  # small bounds keep their digits


def test_by_hand_and_at_the_ends(grid, found):
    k, n, alpha = grid
    low, high = found
    none, every = (k == 0) & (alpha == 0.125), (k == n) & (alpha == 0.125)
    np.testing.assert_allclose(low[every], 0.125 ** (1 / n[every]), atol=1e-6)
    np.testing.assert_allclose(high[none], 1 - 0.125 ** (1 / n[none]), atol=1e-6)
    assert np.all(low[none] == 0)
    assert np.all(high[every] == 1)


def test_bounds_miss_the_truth_no_more_often_than_alpha(grid, found):
    """The tail at the bound is alpha, so over all outcomes of a true p the bound fails with probability <= alpha."""
    low, high = (v[:31] for v in found)
    for p in (0.05, 0.5, 0.9):
        weights = stats.binom.pmf(np.arange(31), 30, p)
        assert weights[low > p].sum() <= 0.1
        assert weights[high < p].sum() <= 0.1
    assert np.all(np.diff(low) > 0)


def test_under_vmap_and_in_double_precision(grid):
    k, n, alpha = (column[-40:] for column in grid)
    with jax.enable_x64(True):
        wide = jax.jit(jax.vmap(clopper_pearson_lower, in_axes=(0, None, 0)))(k, n[0], alpha)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, exact(k, n, alpha)[0], rtol=0, atol=1e-13)


def test_fair_coin_equals_the_binomial_test():
    n = np.array([0, 1, 2, 7, 10, 10, 1000, 1000, 1000, 100_000])
    k = np.array([0, 0, 1, 7, 3, 5, 500, 530, 1000, 49_500])
    expected = [1.0, *(stats.binomtest(int(a), int(b)).pvalue for a, b in zip(k[1:], n[1:], strict=True))]
    fair_coin = jax.jit(fair_coin_p_value)
    p = fair_coin(k, n)
    np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(p[3], 2 / 128, rtol=1e-6)
    np.testing.assert_array_equal(p[4], fair_coin(n - k, n)[4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2, 0.1), "successes <= trials"),
        ((-1, 2, 0.1), "0 <= successes"),
        ((0.5, 2, 0.1), "whole numbers"),
        ((0, 0, 0.1), "trials >= 1"),
        ((1, 2, 0.0), r"alpha must lie in \(0, 1\)"),
        ((1, 2, np.array([0.5, np.nan])), r"alpha must lie in \(0, 1\)"),
    ],
)
def test_bad_input_is_named(arguments, message):
    for bound in (clopper_pearson_lower, clopper_pearson_upper):
        with pytest.raises(ValueError, match=message):
            bound(*arguments)


@pytest.mark.peer
def test_equal_to_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    k = np.array([60, 990, 99_990])
    n = np.array([100, 1000, 100_000])
    theirs = [proportion.proportion_confint(a, b, alpha=0.002, method="beta")[0] for a, b in zip(k, n, strict=True)]
    np.testing.assert_allclose(jax.jit(clopper_pearson_lower)(k, n, 0.001), theirs, atol=1e-6)
