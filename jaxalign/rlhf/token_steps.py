"""Tokens that a policy chose, as its learner sees them, and how the losses of tokens become one number.

Shapes: N rows of T tokens, D hidden size.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel
from jaxalign.preferences.log_probs import chunked_token_log_probs
from jaxalign.types import Array, ArrayLike, Params


class TokenSteps(NamedTuple):
    """N rows of T tokens with what is learned from them; every field [N, T] or None.

    tokens: int32, prompt and completion
    mask: bool, the tokens the policy chose
    log_probs: of those tokens under the policy that chose them, nats
    advantages: of those tokens
    weights, share: from `sequence_mean` and its like; the loss is sum(weights loss) / sum(share)
    reference_log_probs: under the reference policy
    values, targets: of the value function, for PPO
    segments: int, where several sequences are packed into a row
    """

    tokens: Array
    mask: Array
    log_probs: Array
    advantages: Array
    weights: Array
    share: Array
    reference_log_probs: Array | None = None
    values: Array | None = None
    targets: Array | None = None
    segments: Array | None = None


def sequence_mean(mask: Array) -> tuple[Array, Array]:
    """GRPO's aggregation, the mean over sequences of means over tokens: (weights, share) of mask[N, T], both

    mask / sum_t mask.  A token of a long completion counts less than one of a short one.
    Shao et al., arXiv:2402.03300 eq. 3.
    """
    weights = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
    return weights, weights


def token_mean(mask: Array) -> tuple[Array, Array]:
    """DAPO's aggregation, the mean over all tokens of the batch: (weights, share) of mask[N, T], both the mask.

    Yu et al., arXiv:2503.14476 eq. 8.
    """
    weights = jnp.asarray(mask, jnp.float32)
    return weights, weights


def constant_length(mask: Array, *, length: ArrayLike) -> tuple[Array, Array]:
    """Dr. GRPO's aggregation, sum / (N length): weights mask / length, and the share of `sequence_mean`, of mask[N, T].

    With `length` the longest completion possible, no completion's tokens count more for its length.
    Liu et al., arXiv:2503.20783 sec. 3.2.
    """
    return mask / jnp.asarray(length, jnp.float32), sequence_mean(mask)[1]


def token_ratio(log_ratio: Array, mask: Array, segments: Array | None) -> Array:
    """PPO's and GRPO's importance ratio, that of each token by itself: log_ratio [N, T] as it is."""
    return log_ratio


def sequence_ratio(log_ratio: Array, mask: Array, segments: Array | None) -> Array:
    """RLOO's ratio of a whole completion, for each of its tokens: the sum of log_ratio [N, T] over the completion.

    `segments` [N, T] says which tokens belong together where a row holds several. arXiv:2402.14740.
    """
    return _over_sequences(jnp.where(mask, log_ratio, 0.0), segments)


def mean_sequence_ratio(log_ratio: Array, mask: Array, segments: Array | None) -> Array:
    """GSPO's ratio: `sequence_ratio` [N, T] over the completion's length. Zheng et al., arXiv:2507.18071 eq. 7."""
    lengths = _over_sequences(jnp.asarray(mask, log_ratio.dtype), segments)
    return sequence_ratio(log_ratio, mask, segments) / jnp.maximum(lengths, 1.0)


def _over_sequences(x: Array, segments: Array | None) -> Array:
    """At each position the sum of x[N, T] over its row, or over its segment of the row."""
    if segments is None:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)

    def row(values: Array, numbers: Array) -> Array:
        return jax.ops.segment_sum(values, numbers, num_segments=values.shape[0] + 1)[numbers]

    return jax.vmap(row)(x, segments)


class TokenScores(NamedTuple):
    """What a model says of tokens [N, T] it is shown.

    log_probs: [N, T], log p(token t | those before it) in nats where the mask is set, else 0
    entropies: [N, T], of the distribution token t was drawn from, nats; no gradient flows through them
    hidden: [N, T, D], the state that token t was drawn from (at t = 0, where nothing stands before, that after it)
    """

    log_probs: Array
    entropies: Array
    hidden: Array


def token_scores(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    mask: Array,
    *,
    segments: Array | None = None,
    temperature: ArrayLike = 1.0,
    chunk_size: int = 256,
) -> TokenScores:
    """Score the tokens that mask[N, T] marks in tokens[N, T] under softmax(logits / temperature).

    The first token of a row or segment has nothing before it and must not be marked; mask[:, 0] is ignored.
    The vocabulary is visited in chunks of `chunk_size` tokens, so no [N, T, V] array exists.
    Raises AssertionError showing the shapes if they differ.
    """
    chex.assert_equal_shape([tokens, mask] if segments is None else [tokens, mask, segments])
    hidden = model.hidden(params, tokens) if segments is None else model.hidden(params, tokens, segments)
    log_probs, entropies = chunked_token_log_probs(
        hidden / temperature, model.unembedding(params), tokens, mask, chunk_size=chunk_size
    )
    before = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    return TokenScores(*(jnp.pad(x, ((0, 0), (1, 0))) for x in (log_probs, entropies)), before)
