"""Masked mean and whitening: hand numbers, NumPy on what is valid, nothing valid, and gradients past NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.rl import masking

masked_mean = jax.jit(masking.masked_mean, static_argnums=2)
masked_whiten = jax.jit(masking.masked_whiten, static_argnames="shift_mean")


def rows(seed=0):
    rng = np.random.default_rng(seed)
    x, mask = 5 + 2 * rng.normal(size=(4, 9)), rng.random((4, 9)) < 0.6
    return x, np.where(mask, x, np.nan), mask


def test_mean_is_over_what_is_valid_and_padding_is_never_read():
    x, spoiled, mask = rows()
    np.testing.assert_allclose(masked_mean(spoiled, mask), x[mask].mean(), rtol=1e-6)
    np.testing.assert_allclose(masked_mean(spoiled, mask.astype(float)), x[mask].mean(), rtol=1e-6)
    for axis in (0, 1, (0, 1)):
        np.testing.assert_allclose(masked_mean(spoiled, mask, axis), np.nanmean(spoiled, axis), rtol=1e-6)
    assert masked_mean(np.array([1, 2, 9]), np.array([1, 1, 0])) == 1.5
    everything = np.ones_like(mask)
    np.testing.assert_allclose(masked_mean(x, everything), x.mean(), rtol=1e-6)
    with jax.enable_x64(True):
        per_row = jax.jit(jax.vmap(masked_mean))(spoiled, mask)
        assert per_row.dtype == jnp.float64
        np.testing.assert_allclose(per_row, np.nanmean(spoiled, axis=1), rtol=1e-13)


def test_the_mean_of_nothing_is_nan_with_gradient_zero():
    x, mask = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, False], [False, False]])
    np.testing.assert_array_equal(masked_mean(x, mask, 1), [1.0, np.nan])
    assert np.isnan(masked_mean(x, jnp.zeros_like(mask)))

    def of_measured_rows(x):
        means = masked_mean(x, mask, 1)
        return jnp.sum(jnp.where(mask.any(axis=1), means, 0.0))

    value, gradient = jax.jit(jax.value_and_grad(of_measured_rows))(x)
    assert value == 1.0
    np.testing.assert_array_equal(gradient, [[1, 0], [0, 0]])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_values_have_unbiased_variance_one(shift_mean):
    x, spoiled, mask = rows(1)
    white = masked_whiten(spoiled, mask, shift_mean=shift_mean)
    mean = x[mask].mean()
    expected = (x[mask] - mean) / np.sqrt(x[mask].var(ddof=1) + 1e-8) + (0.0 if shift_mean else mean)
    np.testing.assert_allclose(white[mask], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(white[~mask], 0.0)
    np.testing.assert_allclose(np.var(white[mask], ddof=1), 1.0, rtol=1e-5)
    with jax.enable_x64(True):
        each = jax.vmap(lambda a, m: masked_whiten(a, m, shift_mean=shift_mean))(spoiled[None], mask[None])
        np.testing.assert_allclose(each[0][mask], expected, rtol=1e-13)


def test_whitening_by_hand_and_its_degenerate_batches():
    half = np.sqrt(0.5)
    np.testing.assert_allclose(masked_whiten(np.array([1.0, 3, 8]), np.array([1, 1, 0])), [-half, half, 0], rtol=1e-6)
    x = np.array([4.0, 3.0, np.nan])
    np.testing.assert_array_equal(masked_whiten(x, np.array([1, 0, 0])), [0, 0, 0])
    np.testing.assert_array_equal(masked_whiten(x, np.array([1, 0, 0]), shift_mean=False), [4, 0, 0])
    np.testing.assert_array_equal(masked_whiten(x, np.array([0, 0, 0])), [0, 0, 0])
    np.testing.assert_array_equal(masked_whiten(np.full(3, 4.0), np.array([1, 1, 1])), [0, 0, 0])


def test_gradients_pass_by_what_is_masked():
    _, spoiled, mask = rows(2)
    total = lambda x: jnp.sum(masked_whiten(x, mask) ** 3) + masked_mean(x, mask)  # noqa: E731
    gradient = jax.jit(jax.grad(total))(spoiled)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~mask], 0.0)
    assert (gradient[mask] != 0).all()


@pytest.mark.parametrize("function", [masked_mean, masked_whiten])
def test_other_shapes_raise(function):
    with pytest.raises(AssertionError):
        function(jnp.ones((2, 3)), jnp.ones((2, 1)))
