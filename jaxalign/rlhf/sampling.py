"""Filters on next-token logits [B, V]: what they leave out is set to -inf, and the rest is drawn from as it is."""

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


def top_k_filter(logits: ArrayLike, k: ArrayLike) -> Array:
    """Keep the k largest of logits [B, V] in each row, and -inf elsewhere.

    out[b, v] = logits[b, v] where logits[b, v] >= the k-th largest of logits[b], else -inf

    Logits tied with the k-th are all kept; k above V keeps all. k may be traced. Fan et al. 2018 (arXiv 1805.04833),
    section 5.4.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 2)
    ordered = -jnp.sort(-logits, axis=1)
    last = jnp.clip(jnp.asarray(k, jnp.int32), 1, logits.shape[1]) - 1
    return _keep(logits, logits >= jax.lax.dynamic_slice_in_dim(ordered, last, 1, axis=1))


def top_p_filter(logits: ArrayLike, p: ArrayLike) -> Array:
    """Keep the nucleus of softmax(logits) [B, V]: in each row the fewest tokens whose probabilities sum to p or more.

    The most probable token is always kept, and so are those tied with the nucleus' last; p = 1 keeps all. p may be
    traced. Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 2)
    ordered = -jnp.sort(-logits, axis=1)
    probabilities = jax.nn.softmax(ordered, axis=1)
    # What stands before a token: it is needed as long as that is short of p.
    before = jnp.cumsum(probabilities, axis=1) - probabilities
    needed = (before < p).at[:, 0].set(True) | (jnp.asarray(p) >= 1.0)
    return _keep(logits, logits >= jnp.min(jnp.where(needed, ordered, jnp.inf), axis=1, keepdims=True))


def min_p_filter(logits: ArrayLike, p: ArrayLike) -> Array:
    """Keep the tokens of logits [B, V] at least p times as probable as the row's most probable one.

    out[b, v] = logits[b, v] where logits[b, v] - max_u logits[b, u] >= log p, else -inf

    p = 0 keeps all. p may be traced. Nguyen et al. 2024 (arXiv 2407.01082), section 3.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 2)
    return _keep(logits, logits - jnp.max(logits, axis=1, keepdims=True) >= jnp.log(jnp.asarray(p, logits.dtype)))


def _keep(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)
