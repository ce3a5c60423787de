"""Moments merged batch by batch equal those of everything at once, also where float32 is nearly used up."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments import running_moments
from jaxalign.environments.running_moments import init_moments, normalize, update_moments

update = jax.jit(update_moments)


def test_by_hand():
    assert doctest.testmod(running_moments).failed == 0
    moments = update(init_moments(), jnp.array([1.0, 3.0]))
    moments = update(moments, jnp.array([8.0]))  # members 1, 3, 8
    np.testing.assert_allclose((moments.count, moments.mean, moments.variance), (3.0, 4.0, 26.0 / 3.0), rtol=1e-6)
    np.testing.assert_allclose(normalize(moments, 8.0), 4.0 / np.sqrt(26.0 / 3.0), rtol=1e-6)
    assert normalize(moments, 1e6) == 10.0
    assert normalize(moments, -1e6, clip=2.0) == -2.0


@pytest.mark.parametrize("axes", [(), (3, 2)])
def test_any_leading_axes_agree_with_numpy_in_float64(axes):
    data = np.random.default_rng(0).normal(2.0, 3.0, (7, *axes, 2, 3)).astype(np.float32)
    moments = init_moments((2, 3))
    for batch in data:
        moments = update(moments, batch)
    rows = data.reshape(-1, 2, 3).astype(np.float64)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, rows.var(0), rtol=1e-5)
    z = np.asarray(normalize(moments, data, clip=jnp.inf), np.float64).reshape(-1, 2, 3)
    np.testing.assert_allclose(z.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(z.var(0), 1.0, rtol=1e-5)


def test_large_means_keep_the_variance_in_float32():
    # Sums of squares near 1e12 would have no digit left for a variance of 1.
    data = (1e6 + np.random.default_rng(1).normal(size=(50, 256))).astype(np.float32)
    moments = init_moments()
    for batch in data:
        moments = update(moments, batch)
    exact = data.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(), atol=0.1)
    np.testing.assert_allclose(moments.variance, exact.var(), rtol=0.01)


def test_a_long_scan_one_by_one_stays_exact():
    data = np.random.default_rng(0).normal((100.0, 0.0), size=(20_000, 2)).astype(np.float32)
    moments, _ = jax.lax.scan(lambda m, x: (update_moments(m, x), None), init_moments((2,)), data)
    at_once = update(init_moments((2,)), data)
    np.testing.assert_allclose(moments.mean, at_once.mean, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(moments.variance, at_once.variance, rtol=1e-3)
    np.testing.assert_allclose(at_once.variance, np.var(data.astype(np.float64), axis=0), rtol=1e-5)


def test_masked_members_do_not_count_whatever_they_hold():
    data = np.array([[1.0, np.nan, 3.0], [np.inf, 8.0, 0.0]], np.float32)
    mask = np.array([[True, False, True], [False, True, False]])
    moments = update(init_moments(), data, mask)
    kept = update(init_moments(), data[mask])
    np.testing.assert_allclose(jax.tree.leaves(moments), jax.tree.leaves(kept), rtol=1e-6)
    unchanged = update(moments, data, np.zeros_like(mask))
    np.testing.assert_array_equal(jax.tree.leaves(unchanged), jax.tree.leaves(moments))


def test_nothing_seen_changes_nothing_and_what_is_constant_is_zero():
    x = jnp.array([0.5, -3.0])
    np.testing.assert_allclose(normalize(init_moments((2,)), x), x, rtol=1e-6)
    constant = update(init_moments((2,)), np.tile(x, (5, 1)))
    np.testing.assert_array_equal(normalize(constant, x), 0.0)


def test_vmap_float64_and_integers():
    data = np.random.default_rng(2).normal(size=(3, 5, 2)).astype(np.float32)
    lanes = jax.jit(jax.vmap(lambda x: update_moments(init_moments((2,)), x)))(data)
    alone = update(init_moments((2,)), data[1])
    np.testing.assert_allclose(lanes.variance[1], alone.variance, rtol=1e-6)
    integers = update(init_moments(), np.array([1, 3]))
    assert integers.mean == 2.0
    with jax.enable_x64(True):
        exact = 1e9 + np.random.default_rng(1).normal(size=100)
        moments = update(init_moments(), exact)
        assert moments.variance.dtype == jnp.float64
        np.testing.assert_allclose(moments.variance, exact.var(), rtol=1e-6)


@pytest.mark.parametrize(("batch", "mask"), [((4, 2), None), ((3,), (3,)), ((4, 3), (3,))])
def test_wrong_shapes_are_named(batch, mask):
    with pytest.raises(ValueError, match=r"update_moments: (batch|mask) must be"):
        update_moments(init_moments((3,)), jnp.zeros(batch), None if mask is None else jnp.ones(mask, bool))
