"""Where the features of a sparse autoencoder fire: the strongest examples and a fair sample, gathered in one pass.

What is kept is [F, n] however many tokens go by, so each function is a step of a scan over batches. A feature fires
where its activation is above zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike, Key


class Examples(NamedTuple):
    """Up to n firings of each of F features, the strongest first.

    value: [F, n] float32, the activation; 0 where there is none
    index: [F, n] int32, which token; -1 where there is none
    """

    value: Array
    index: Array


class FiringSample(NamedTuple):
    """Up to n firings of each feature, every set of n of its firings equally likely.

    priority: [F, n] float32, what they were drawn by; -1 where there is none
    value, index: [F, n] as in `Examples`, in no order
    """

    priority: Array
    value: Array
    index: Array


def no_examples(features: int, count: int) -> Examples:
    """The beginning of `merge_top`: [F, n] places, all empty."""
    return Examples(jnp.zeros((features, count), jnp.float32), jnp.full((features, count), -1, jnp.int32))


def merge_top(examples: Examples, activations: ArrayLike, index: ArrayLike) -> Examples:
    """The n strongest of the firings kept so far and those of a batch; of equals the earlier one.

    Args:
        activations: [B, F].
        index: [B] or [B, F] int32, the number of the token that each stands for, >= 0.
    """
    activations = jnp.asarray(activations, jnp.float32)
    value, place = _largest(examples.value, activations)
    return Examples(value, jnp.where(value > 0, _pick(examples.index, _of_each(index, activations), place), -1))


def row_peaks(activations: ArrayLike, index: ArrayLike) -> tuple[Array, Array]:
    """The strongest activation in each row of text, and which token it is: so no row gives two examples.

    Args:
        activations: [R, T, F].
        index: [R, T] int32.

    Returns (value [R, F], index [R, F]), as `merge_top` takes them.
    """
    activations, index = jnp.asarray(activations), jnp.asarray(index, jnp.int32)
    place = activations.argmax(axis=1)
    return activations.max(axis=1), jnp.take_along_axis(index, place, axis=1)


def no_sample(features: int, count: int) -> FiringSample:
    """The beginning of `merge_sample`: [F, n] places, all empty."""
    return FiringSample(jnp.full((features, count), -1.0, jnp.float32), *no_examples(features, count))


def merge_sample(key: Key, sample: FiringSample, activations: ArrayLike, index: ArrayLike) -> FiringSample:
    """A uniform sample, without replacement, of all firings so far: each draws a priority, the n highest are kept.

    Args:
        activations: [B, F].
        index: [B] or [B, F] int32, as in `merge_top`.
    """
    activations = jnp.asarray(activations, jnp.float32)
    drawn = jnp.where(activations > 0, jax.random.uniform(key, activations.shape), -1.0)
    priority, place = _largest(sample.priority, drawn)
    value = _pick(sample.value, activations.T, place)
    found = priority >= 0
    chosen = _pick(sample.index, _of_each(index, activations), place)
    return FiringSample(priority, jnp.where(found, value, 0.0), jnp.where(found, chosen, -1))


def quantile_groups(sample: FiringSample, groups: int, *, count: int) -> Examples:
    """Firings from each of Q equal shares of a feature's firings by strength: [F, Q, m], strongest share first.

    Of the c sampled firings group q holds the ranks c q / Q to c (q + 1) / Q, of which m = `count` evenly spaced ones
    are returned; fewer where c < Q m. So the groups show what a feature usually means, which its strongest firings
    may not.
    """
    order = jnp.argsort(-sample.value, axis=1)
    fired = (sample.index >= 0).sum(axis=1)
    middle = (jnp.arange(groups * count) + 0.5) / (groups * count)
    rank = jnp.floor(fired[:, None] * middle[None, :]).astype(jnp.int32)
    new = jnp.concatenate([fired[:, None] > 0, rank[:, 1:] > rank[:, :-1]], axis=1)
    place = jnp.take_along_axis(order, jnp.minimum(rank, order.shape[1] - 1), axis=1)
    value = jnp.where(new, jnp.take_along_axis(sample.value, place, axis=1), 0.0)
    index = jnp.where(new, jnp.take_along_axis(sample.index, place, axis=1), -1)
    return Examples(value.reshape(-1, groups, count), index.reshape(-1, groups, count))


def _largest(held: Array, new: Array) -> tuple[Array, Array]:
    """The n largest of held[F, n] and new[B, F], and their places in the two joined."""
    # Held ones come first, and top_k gives equals in order: the earlier firing stays.
    return jax.lax.top_k(jnp.concatenate([held, new.T], axis=1), held.shape[1])


def _pick(held: Array, new: Array, place: Array) -> Array:
    return jnp.take_along_axis(jnp.concatenate([held, new], axis=1), place, axis=1)


def _of_each(index: ArrayLike, activations: Array) -> Array:
    """index [B] or [B, F] as [F, B]."""
    index = jnp.asarray(index, jnp.int32)
    return jnp.broadcast_to(index if index.ndim == 2 else index[:, None], activations.shape).T
