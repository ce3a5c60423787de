"""Log-probabilities of tokens and completions, from logits or, without holding the logits, from hidden states."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


def token_log_probs(logits: ArrayLike, tokens: ArrayLike) -> Array:
    """Log-probability of each token given those before it, in nats.

    out[b, t] = logits[b, t, tokens[b, t+1]] - logsumexp_v logits[b, t, v]

    Args:
        logits: [B, T, V]; position t predicts token t+1, so the last position is not used.
        tokens: [B, T] int, each in [0, V).

    Returns [B, T-1] in float32 (float64 if the logits are), whatever the model's dtype: a log-softmax in bfloat16
    loses about 0.03 nats per token. The value needs no second [B, T, V] array.
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    chex.assert_rank([logits, tokens], [3, 2])
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    logits = logits[:, :-1].astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def sequence_log_probs(logits: ArrayLike, tokens: ArrayLike, mask: ArrayLike, *, average: bool = False) -> Array:
    """Summed log-probability of each completion, in nats.

    out[b] = sum_{t>=1} mask[b, t] log p(tokens[b, t] | tokens[b, :t])
    and, with `average`, that divided by sum_{t>=1} mask[b, t].

    Args:
        logits: [B, T, V].
        tokens: [B, T] int.
        mask: [B, T], nonzero on completion tokens, zero on prompt and padding. Non-binary entries weigh their token
            (see `length_desensitized_masks`). The first token has no context to score it: mask[:, 0] is ignored.
            A constant: no gradient flows to it.
        average: the mean per completion token in place of the sum.

    Returns [B], float32 or float64 as `token_log_probs`. A row whose mask is all zero gives 0, averaged or not.
    """
    return reduce_completion(token_log_probs(logits, tokens), mask, average=average)


def reduce_completion(token_logps: Array, mask: ArrayLike, *, average: bool = False) -> Array:
    """Sum (or mean) of token_logps[B, T-1] over the completion tokens of mask[B, T]: how every path here reduces."""
    mask = jnp.asarray(mask)
    chex.assert_shape(mask, (token_logps.shape[0], token_logps.shape[1] + 1))
    weights = jax.lax.stop_gradient(mask[:, 1:].astype(token_logps.dtype))
    # Where, not a product: a -inf log-probability on a masked token must not turn the row into NaN.
    total = jnp.sum(jnp.where(weights == 0, 0.0, token_logps) * weights, axis=1)
    if not average:
        return total
    count = jnp.sum(weights, axis=1)
    return total / jnp.where(count == 0, 1.0, count)


def chunked_sequence_log_probs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    chunk_size: int,
    average: bool = False,
) -> Array:
    """`sequence_log_probs(hidden @ unembedding.T, tokens, mask)` in the memory of `chunk_size` rows of logits.

    The B (T-1) scored positions are put in order, completion tokens first, and only the chunks that hold one are
    multiplied by the unembedding, so prompt and padding cost nothing. With float32 or float64 operands value and
    gradients equal the unchunked ones to rounding; bfloat16 operands are multiplied as they are and summed in float32.

    Where gradients are asked for, the forward pass also stores d log p / d hidden, [B (T-1), D], which needs no
    upstream cotangent; only the unembedding's gradient computes the logits a second time, and under jit that work
    disappears where nobody differentiates the unembedding (a frozen head).

    Args:
        hidden: [B, T, D]; position t predicts token t+1.
        unembedding: [V, D].
        tokens: [B, T] int, each in [0, V).
        mask: [B, T] as in `sequence_log_probs`. A constant: no gradient flows to it.
        chunk_size: positions per chunk, static; peak extra memory is about two float32 [chunk_size, V] arrays.
        average: the mean per completion token in place of the sum.

    Positions are ordered over the whole batch: where the batch is sharded over devices, call this inside `shard_map`
    (with check_vma=False), or each device will do all of the work.

    Returns [B], float32 (float64 if the operands are). Derivatives are by reverse mode, or forward mode over that.
    Raises ValueError if chunk_size < 1.
    """
    token_logps, _ = _chunked(hidden, unembedding, tokens, mask, chunk_size=chunk_size, with_entropy=False)
    return reduce_completion(token_logps, mask, average=average)


def chunked_log_probs_and_entropy(
    hidden: ArrayLike, unembedding: ArrayLike, tokens: ArrayLike, mask: ArrayLike, *, chunk_size: int
) -> tuple[Array, Array]:
    """`chunked_sequence_log_probs` and, from the same logits, `sequence_entropy`: ([B], [B]), nats.

    Arguments as there. The entropy is for looking at: no gradient flows through it.
    """
    token_logps, entropies = _chunked(hidden, unembedding, tokens, mask, chunk_size=chunk_size, with_entropy=True)
    return reduce_completion(token_logps, mask), reduce_completion(entropies, mask, average=True)


def chunked_token_log_probs(
    hidden: ArrayLike, unembedding: ArrayLike, tokens: ArrayLike, mask: ArrayLike, *, chunk_size: int
) -> tuple[Array, Array]:
    """Of each token that mask[B, T] marks, its log-probability and the entropy it was drawn with: ([B, T-1], [B, T-1]).

    Column t is of tokens[:, t+1], as in `token_log_probs`; nats, 0 where the mask is 0. Arguments and memory as in
    `chunked_sequence_log_probs`; no gradient flows through the entropy.
    """
    log_probs, entropies = _chunked(hidden, unembedding, tokens, mask, chunk_size=chunk_size, with_entropy=True)
    wanted = jnp.asarray(mask)[:, 1:] != 0
    return jnp.where(wanted, log_probs, 0.0), jnp.where(wanted, entropies, 0.0)


def sequence_entropy(logits: ArrayLike, mask: ArrayLike) -> Array:
    """Mean entropy of the next-token distributions that predict a completion's tokens, in nats.

    out[b] = mean_{t>=1: mask[b, t]} -sum_v p[b, t-1, v] log p[b, t-1, v],  p = softmax(logits)

    Args:
        logits: [B, T, V].
        mask: [B, T] as in `sequence_log_probs`.

    Returns [B], float32 or float64; 0 for a row whose mask is all zero.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 3)
    logps = jax.nn.log_softmax(logits[:, :-1].astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return reduce_completion(-jnp.sum(jnp.exp(logps) * logps, axis=-1), mask, average=True)


def _chunked(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    tokens: ArrayLike,
    mask: ArrayLike,
    *,
    chunk_size: int,
    with_entropy: bool,
) -> tuple[Array, Array]:
    """Log-probability and (or zeros for) entropy of each scored position, both [B, T-1]."""
    hidden, unembedding, tokens, mask = (jnp.asarray(x) for x in (hidden, unembedding, tokens, mask))
    chex.assert_rank([hidden, unembedding, tokens, mask], [3, 2, 2, 2])
    chex.assert_equal_shape_prefix([hidden, tokens], 2)
    chex.assert_equal_shape([tokens, mask])
    chex.assert_equal_shape_suffix([hidden, unembedding], 1)
    if chunk_size < 1:
        raise ValueError(f"chunked_sequence_log_probs: chunk_size must be at least 1, got {chunk_size}")

    rows, length, width = hidden.shape
    count = rows * (length - 1)
    if count == 0:
        nothing = jnp.zeros((rows, length - 1), _accumulator(hidden, unembedding))
        return nothing, nothing
    dtype = jnp.promote_types(hidden.dtype, unembedding.dtype)
    token_logps, entropies = _completion_log_probs(
        min(chunk_size, count),
        with_entropy,
        hidden[:, :-1].reshape(count, width).astype(dtype),
        unembedding.astype(dtype),
        tokens[:, 1:].reshape(count),
        mask[:, 1:].reshape(count) != 0,
    )
    shape = (rows, length - 1)
    return token_logps.reshape(shape), jax.lax.stop_gradient(entropies).reshape(shape)


def _accumulator(*operands: Array) -> Any:
    return jnp.promote_types(jnp.result_type(*operands), jnp.float32)


def _chunks(chunk_size: int, wanted: Array) -> tuple[Array, Array]:
    """Positions in the order they are computed, padded with N to whole chunks; and how many chunks to compute."""
    order = jnp.argsort(~wanted, stable=True)
    order = jnp.pad(order, (0, -len(wanted) % chunk_size), constant_values=len(wanted))
    return order, -(-jnp.sum(wanted) // chunk_size)


def _logits(hidden: Array, unembedding: Array) -> Array:
    """[C, D] and [V, D] -> [C, V], summed in float32 or better."""
    dtype = _accumulator(hidden, unembedding)
    return jax.lax.dot_general(hidden, unembedding, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _completion_log_probs(
    chunk_size: int, with_entropy: bool, hidden: Array, unembedding: Array, labels: Array, wanted: Array
) -> tuple[Array, Array]:
    """log softmax(hidden @ unembedding.T)[n, labels[n]] and that row's entropy for the wanted n; others may be 0."""
    order, count = _chunks(chunk_size, wanted)

    # The number of chunks is data, so this is a while loop: under vmap it runs as long as the longest lane needs,
    # where a scan over a `cond` would run every chunk of every lane.
    def chunk(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, entropies = carry
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size)
        logits = _logits(hidden.at[index].get(mode="clip"), unembedding)
        picked = jnp.take_along_axis(logits, labels.at[index].get(mode="clip")[:, None], axis=1)[:, 0]
        lse = jax.nn.logsumexp(logits, axis=1)
        if with_entropy:
            mean = jnp.sum(jnp.exp(logits - lse[:, None]) * logits, axis=1)
            entropies = entropies.at[index].set(lse - mean, mode="drop")
        return out.at[index].set(picked - lse, mode="drop"), entropies

    zeros = jnp.zeros(labels.shape, _accumulator(hidden, unembedding))
    return jax.lax.fori_loop(0, count, chunk, (zeros, zeros))


def _forward(
    chunk_size: int, with_entropy: bool, hidden: Array, unembedding: Array, labels: Array, wanted: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """The value, and slope[n] = d out[n] / d hidden[n] = unembedding[labels[n]] - softmax(logits[n]) @ unembedding."""
    order, count = _chunks(chunk_size, wanted)
    dtype = _accumulator(hidden, unembedding)

    def chunk(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        out, entropies, normalizer, slope = carry
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size)
        label = labels.at[index].get(mode="clip")
        logits = _logits(hidden.at[index].get(mode="clip"), unembedding)
        picked = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        peak = jnp.max(logits, axis=1)
        weights = jnp.exp(logits - peak[:, None])
        mass = jnp.sum(weights, axis=1)
        lse = peak + jnp.log(mass)
        weighted = jax.lax.dot_general(
            weights.astype(unembedding.dtype), unembedding, (((1,), (0,)), ((), ())), preferred_element_type=dtype
        )
        mean = weighted / mass[:, None]
        if with_entropy:
            entropy = lse - jnp.sum(weights * logits, axis=1) / mass
            entropies = entropies.at[index].set(entropy, mode="drop")
        return (
            out.at[index].set(picked - lse, mode="drop"),
            entropies,
            normalizer.at[index].set(lse, mode="drop"),
            slope.at[index].set((unembedding[label] - mean).astype(slope.dtype), mode="drop"),
        )

    zeros = jnp.zeros(labels.shape, dtype)
    start = (zeros, zeros, zeros, jnp.zeros_like(hidden))
    out, entropies, normalizer, slope = jax.lax.fori_loop(0, count, chunk, start)
    return (out, entropies), (hidden, unembedding, labels, wanted, normalizer, slope)


def _backward(
    chunk_size: int, with_entropy: bool, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    cotangent, _ = cotangents  # that of the entropies is zero: they are behind a stop_gradient
    hidden, unembedding, labels, wanted, normalizer, slope = residuals
    order, count = _chunks(chunk_size, wanted)
    words = jnp.arange(unembedding.shape[0], dtype=labels.dtype)

    # d out[n] / d logits[n] = onehot(labels[n]) - softmax(logits[n]); its outer product with hidden[n], summed over n.
    def chunk(i: Array, total: Array) -> Array:
        index = jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size)
        inputs = hidden.at[index].get(mode="clip")
        scale = cotangent.at[index].get(mode="fill", fill_value=0)[:, None]
        probs = jnp.exp(_logits(inputs, unembedding) - normalizer.at[index].get(mode="clip")[:, None])
        hit = labels.at[index].get(mode="clip")[:, None] == words[None, :]
        slopes = (scale * (hit.astype(probs.dtype) - probs)).astype(inputs.dtype)
        return total + jax.lax.dot_general(slopes, inputs, (((0,), (0,)), ((), ())), preferred_element_type=total.dtype)

    total = jnp.zeros(unembedding.shape, cotangent.dtype)
    unembedding_gradient = jax.lax.fori_loop(0, count, chunk, total).astype(unembedding.dtype)
    hidden_gradient = (cotangent[:, None] * slope).astype(hidden.dtype)
    return hidden_gradient, unembedding_gradient, None, None


_completion_log_probs.defvjp(_forward, _backward)
