"""Faults in weights and activations, what they cost, and ensembles that vote them down.

Each fault takes any pytree with leaves [...]: a network's parameters, or the activations between two halves of it. What
is not a float is left alone; shapes and dtypes stay.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike, Key, Params


def flip_bits(key: Key, params: Params, *, rate: ArrayLike) -> Params:
    """Flip every bit of every float of leaves [...], each with probability `rate`, as in faulty memory.

    A flipped exponent bit may turn a weight into a huge one, an infinity or a NaN: that is the fault, and stays.
    """

    def flip(key: Key, x: Array) -> Array:
        width = 8 * x.dtype.itemsize
        unsigned = jnp.dtype(f"uint{width}")

        def one(flips: Array, place_and_key: tuple[Array, Key]) -> tuple[Array, None]:
            place, key = place_and_key
            return flips | (jax.random.bernoulli(key, rate, x.shape).astype(unsigned) << place), None

        # Bit by bit, so that the draws of one bit are alive and not those of all.
        places = (jnp.arange(width, dtype=unsigned), jax.random.split(key, width))
        flips = jax.lax.scan(one, jnp.zeros(x.shape, unsigned), places)[0]
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, unsigned) ^ flips, x.dtype)

    return _each_float(key, params, flip)


def gaussian_noise(key: Key, params: Params, *, scale: ArrayLike) -> Params:
    """x + scale * sqrt(mean(x^2)) * Normal(0, 1) for each leaf x [...]: noise relative to the leaf's size."""

    def add(key: Key, x: Array) -> Array:
        size = jnp.sqrt(jnp.mean(jnp.square(x)))
        return x + (scale * size * jax.random.normal(key, x.shape, x.dtype)).astype(x.dtype)

    return _each_float(key, params, add)


def stuck_at_zero(key: Key, params: Params, *, rate: ArrayLike) -> Params:
    """Set every float of leaves [...] to 0, each with probability `rate`."""
    return _each_float(key, params, lambda key, x: jnp.where(jax.random.bernoulli(key, rate, x.shape), 0, x))


def majority_vote(logits: ArrayLike) -> Array:
    """The class that most of E members put first; of classes with as many votes, the one with more probability.

    Args:
        logits: [E, B, C]. A member with a NaN in a row has no vote on it.

    Returns [B] int32, -1 where no member has a vote.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 3)
    able = ~jnp.isnan(logits).any(axis=2, keepdims=True)
    votes = jnp.sum(able * jax.nn.one_hot(jnp.argmax(logits, axis=2), logits.shape[2]), axis=0)
    # A NaN or an infinite logit leaves no softmax, and then no say where votes are equal.
    probability = jnp.nan_to_num(jax.nn.softmax(logits, axis=2)).mean(axis=0)
    return jnp.where(able.any(axis=0)[:, 0], jnp.argmax(votes + probability / 2, axis=1), -1).astype(jnp.int32)


def median_logits(logits: ArrayLike) -> Array:
    """The median over E members of each logit, NaN members left out: [E, B, C] -> [B, C].

    Fewer than half of the members, however wrong, cannot move it beyond the others' range.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 3)
    return jnp.nanmedian(logits, axis=0)


def degradation_curve(
    key: Key, predict: Callable[[Key, Array], Array], y: ArrayLike, rates: ArrayLike, *, draws: int
) -> Array:
    """Accuracy at each fault rate, over several draws of the faults; a row with a NaN logit counts as wrong.

    Args:
        predict: `(key, rate) -> logits [B, C]` with faults drawn at that rate. In weights:
            `lambda key, rate: apply(flip_bits(key, params, rate=rate), x)`; in activations:
            `lambda key, rate: head(params, flip_bits(key, features(params, x), rate=rate))`.
        y: [B] int.
        rates: [R], or scales.
        draws: static; all rates see the same keys, so differences between rates are paired.

    Returns [R, draws], computed one after another in the memory of one.
    """
    y, rates = jnp.asarray(y), jnp.asarray(rates)
    chex.assert_rank([y, rates], 1)

    def accuracy(rate_and_key: tuple[Array, Key]) -> Array:
        rate, key = rate_and_key
        logits = predict(key, rate)
        right = (jnp.argmax(logits, axis=1) == y) & ~jnp.isnan(logits).any(axis=1)
        return jnp.mean(right, dtype=jnp.float32)

    keys = jnp.tile(jax.random.split(key, draws), rates.size)
    return jax.lax.map(accuracy, (jnp.repeat(rates, draws), keys)).reshape(rates.size, draws)


def _each_float(key: Key, params: Params, fault: Callable[[Key, Array], Array]) -> Params:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, max(1, len(leaves)))
    floats = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]
    faulty = [
        fault(each, jnp.asarray(leaf)) if floating else leaf
        for each, leaf, floating in zip(keys, leaves, floats, strict=False)
    ]
    return treedef.unflatten(faulty)
