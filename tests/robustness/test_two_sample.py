"""Two-sample tests: values by hand and by NumPy, p-values uniform where nothing differs, power where something does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.spatial.distance import cdist, pdist

from jaxalign import Network
from jaxalign.robustness.two_sample import (
    biased_mmd_squared,
    classifier_two_sample_test,
    kolmogorov_smirnov_test,
    median_bandwidth,
    mmd_squared,
    mmd_test,
)


@jax.jit
def measures(x, y, bandwidth):
    """Everything that `mmd_squared` and its kin say of one pair, compiled once for x [12, 2] and y [9, 2]."""
    return {
        "median": median_bandwidth(x, y),
        "unbiased": mmd_squared(x, y),
        "biased": biased_mmd_squared(x, y),
        "unbiased at": mmd_squared(x, y, bandwidth=bandwidth),
        "of images": mmd_squared(x.reshape(12, 1, 2), y.reshape(9, 1, 2), bandwidth=bandwidth),
        "gradient": jax.grad(lambda y: mmd_squared(x, y, bandwidth=bandwidth))(y),
    }


def test_two_point_masses_by_hand():
    x, y = jnp.zeros((12, 2)), jnp.tile(jnp.array([[3.0, 4.0]]), (9, 1))
    found = measures(x, y, 2.0)
    np.testing.assert_allclose(found["median"], 5.0, rtol=1e-6)
    for name in ("unbiased", "biased"):
        np.testing.assert_allclose(found[name], 2 - 2 * np.exp(-1 / 2), rtol=1e-5)
    for name in ("unbiased at", "of images"):
        np.testing.assert_allclose(found[name], 2 - 2 * np.exp(-25 / 8), rtol=1e-5)
    together = measures(x, jnp.zeros((9, 2)), 2.0)
    assert together["median"] == 1.0
    np.testing.assert_allclose([together["unbiased"], together["biased"]], 0.0, atol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_mmd_matches_numpy(x64):
    rng = np.random.default_rng(1)
    x, y = 30 + rng.normal(size=(12, 2)), 30.5 + rng.normal(size=(9, 2))
    bandwidth = np.median(pdist(np.concatenate([x, y])))
    kxx, kyy, kxy = (np.exp(-(cdist(*p) ** 2) / (2 * bandwidth**2)) for p in ((x, x), (y, y), (x, y)))
    with jax.enable_x64(x64):
        found = measures(jnp.asarray(x), jnp.asarray(y), bandwidth)
    tolerance = 1e-12 if x64 else 2e-5
    np.testing.assert_allclose(found["median"], bandwidth, rtol=tolerance)
    np.testing.assert_allclose(found["biased"], kxx.mean() + kyy.mean() - 2 * kxy.mean(), atol=tolerance)
    unbiased = (kxx.sum() - 12) / (12 * 11) + (kyy.sum() - 9) / (9 * 8) - 2 * kxy.mean()
    np.testing.assert_allclose(found["unbiased"], unbiased, atol=tolerance)
    np.testing.assert_allclose(found["unbiased at"], unbiased, atol=tolerance)


def test_gradient_moves_the_samples_together():
    rng = np.random.default_rng(2)
    x, y = jnp.asarray(rng.normal(size=(12, 2))), jnp.asarray(rng.normal(size=(9, 2)) + 2)
    gradient = measures(x, y, 2.0)["gradient"]
    assert jnp.isfinite(gradient).all()
    assert (gradient.mean(axis=0) > 0).all()  # x lies on the lower side


TESTS = {
    "mmd": functools.partial(mmd_test, permutations=99),
    "classifier": functools.partial(classifier_two_sample_test, steps=50, optimizer=optax.adam(0.05), permutations=99),
    "kolmogorov_smirnov": lambda key, x, y: kolmogorov_smirnov_test(x, y),
}


def p_values(test, differ, n, m):
    """{how y differs: p-values [repetitions]} of x [n, 2] and y [m, 2], all computed by one program."""
    rng = np.random.default_rng(5)
    x, y = (rng.normal(size=(sum(differ.values()), rows, 2)).astype(np.float32) for rows in (n, m))
    start = dict(zip(differ, np.cumsum([0, *differ.values()]), strict=False))
    for how, count in differ.items():
        rows = y[start[how] : start[how] + count]
        # Either a shift, or each coordinate is distributed as x's and only the signs agree.
        rows[...] = np.abs(rows) * np.sign(rows[..., :1]) if how == "signs" else rows + how
    keys = jax.random.split(jax.random.key(6), len(x))
    run = jax.jit(lambda *data: jax.lax.map(lambda each: TESTS[test](*each).p_value, data, batch_size=30))
    found = np.asarray(run(keys, x, y))
    return {how: found[start[how] : start[how] + count] for how, count in differ.items()}


@pytest.fixture(scope="module")
def found():
    differ = {0.0: 200, 0.5: 30, 1.0: 30, 100.0: 5, np.nan: 2, "signs": 33}
    return {test: p_values(test, differ, 40, 46) for test in TESTS}


@pytest.mark.parametrize("test", TESTS)
def test_no_more_false_alarms_than_promised_and_power(found, test):
    p = dict(found[test])
    assert np.isnan(p.pop(np.nan)).all()
    assert all(((each >= 0) & (each <= 1)).all() for each in p.values())
    for level in (0.05, 0.2, 0.5):
        assert (p[0.0] <= level).sum() <= stats.binom.ppf(0.999, 200, level)
    power = {how: (each <= 0.05).mean() for how, each in p.items()}
    assert power[0.0] < power[0.5] < power[1.0]
    assert power[1.0] > 0.5
    assert power[100.0] == 1.0
    if test == "classifier":
        assert power["signs"] > 0.25
    if test == "kolmogorov_smirnov":  # which looks at one dimension at a time
        assert power["signs"] < 0.2


def test_p_values_of_the_permutation_test_are_uniform(found):
    # On 1/100 ... 1, that is: half a step less makes them continuous enough for this test.
    assert stats.kstest(found["mmd"][0.0] - 0.005, "uniform").pvalue > 0.01


def test_small_samples_have_less_power_and_known_p_values(found):
    few = p_values("mmd", {0.5: 40, 1.0: 40, 100.0: 220}, 5, 5)
    for shift in (0.5, 1.0):
        assert (few[shift] <= 0.05).mean() + 0.3 < (found["mmd"][shift] <= 0.05).mean()
    # Far apart, 2 of the C(10, 5) = 252 splits reach the observed statistic: the split itself and its mirror.
    deviation = np.sqrt(99 * 2 / 252 / 220) / 100
    np.testing.assert_allclose(few[100.0].mean(), (1 + 99 * 2 / 252) / 100, atol=4 * deviation)


def test_a_network_of_your_own_sees_rows_in_their_shape():
    seen = []

    def apply(params, rows):
        seen.append(rows.shape[1:])
        return rows.sum(axis=(1, 2, 3))[:, None] * params[None, :]

    network = Network(lambda key: jnp.zeros(2), apply)
    test = functools.partial(classifier_two_sample_test, network=network)
    found = jax.eval_shape(test, jax.random.key(0), jnp.zeros((9, 4, 4, 1)), jnp.zeros((6, 4, 4, 1)))
    assert found.statistic.shape == found.p_value.shape == ()
    assert set(seen) == {(4, 4, 1)}


def test_kolmogorov_smirnov_matches_scipy():
    test, rng = jax.jit(kolmogorov_smirnov_test), np.random.default_rng(7)
    for shift in (0.0, 0.1, 0.4, 1.0):  # on both sides of where one series gives way to the other
        x, y = (rng.normal(size=(rows, 3)).astype(np.float32) for rows in (40, 25))
        y += shift
        found = test(x, y)
        gap = max(stats.ks_2samp(x[:, d], y[:, d]).statistic for d in range(3))
        np.testing.assert_allclose(found.statistic, gap, rtol=1e-6)
        expected = min(1, 3 * stats.kstwobign.sf(np.sqrt(40 * 25 / 65) * gap))
        np.testing.assert_allclose(found.p_value, expected, rtol=1e-4)
    same = test(np.ones((40, 3)), np.ones((25, 3)))
    assert (same.statistic, same.p_value) == (0.0, 1.0)


@pytest.mark.parametrize("y", [(4, 3), (1, 2), (4,)])
def test_what_does_not_compare_is_named(y):
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        mmd_squared(jnp.zeros((5, 2)), jnp.zeros(y))


def test_no_permutations_are_no_test():
    with pytest.raises(ValueError, match="at least one permutation"):
        jax.eval_shape(
            functools.partial(mmd_test, permutations=0), jax.random.key(0), jnp.zeros((5, 2)), jnp.zeros((5, 2))
        )
