"""Means and whitening over the valid positions of padded arrays; what is masked is never read, not even a NaN."""

import chex
import jax.numpy as jnp
from jax import lax

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.types import Array, ArrayLike

Axis = int | tuple[int, ...] | None


def masked_mean(x: ArrayLike, mask: ArrayLike, axis: Axis = None) -> Array:
    """sum(x where mask) / sum(mask) along `axis` (None: all axes): x, mask [...] -> [...] without those axes.

    mask: bool or 0/1, of the shape of `x`. Over all of a batch [B, T] this is a mean per token; with axis=1 it is one
    mean per sequence. Where nothing is valid the mean is NaN, for 0 would be a measurement; the gradient there is 0, so
    an empty row that is left out by `where` afterwards does no harm.
    Raises AssertionError showing the shapes if they differ.

    >>> masked_mean(jnp.array([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]]), jnp.array([[1, 1, 0], [1, 0, 0]]), axis=1).tolist()
    [2.0, 5.0]
    """
    x, valid = _with_mask(x, mask)
    count = jnp.sum(valid, axis=axis, dtype=x.dtype)
    mean = jnp.sum(jnp.where(valid, x, 0.0), axis=axis) / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, mean, jnp.nan)


def masked_whiten(x: ArrayLike, mask: ArrayLike, *, shift_mean: bool = True) -> Array:
    """(x - mean) / sqrt(variance + 1e-8) over all valid positions together, [...]; 0 at masked ones.

    variance is the unbiased one, sum (x - mean)^2 / (n - 1) of n valid positions, and 0 where n is 1. With shift_mean
    False the mean is added again, so that only the scale changes (rewards, whose sign means something). A batch with
    nothing valid gives zeros. x, mask [...] of one shape, bool or 0/1; `vmap` for rows of their own.
    Raises AssertionError showing the shapes if they differ.

    >>> [round(float(x), 4) for x in masked_whiten(jnp.array([1.0, 3.0, 50.0]), jnp.array([True, True, False]))]
    [-0.7071, 0.7071, 0.0]
    """
    x, valid = _with_mask(x, mask)
    x, count = jnp.where(valid, x, 0.0), jnp.sum(valid, dtype=x.dtype)
    mean = jnp.sum(x) / jnp.maximum(count, 1.0)
    centered = jnp.where(valid, x - mean, 0.0)
    variance = jnp.sum(jnp.square(centered)) / jnp.maximum(count - 1.0, 1.0)
    whitened = centered * lax.rsqrt(variance + 1e-8)
    return whitened if shift_mean else jnp.where(valid, whitened + mean, 0.0)


def _with_mask(x: ArrayLike, mask: ArrayLike) -> tuple[Array, Array]:
    (x,), valid = as_float(x), jnp.asarray(mask).astype(bool)
    chex.assert_equal_shape([x, valid])
    return x, valid
