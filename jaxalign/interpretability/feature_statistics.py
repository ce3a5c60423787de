"""How often and how strongly features fire, which fire together, and what they write to the output: in one pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike

FEATURES_AT_ONCE = 64  # whose effects on all logits are in memory together


class FeatureStatistics(NamedTuple):
    """Sums over the tokens seen so far.

    tokens: [] int32, how many
    fired: [F] int32, on how many of them the feature was above zero
    total, squares: [F] float32, the sums of the activation and of its square
    maximum: [F] float32
    """

    tokens: Array
    fired: Array
    total: Array
    squares: Array
    maximum: Array

    @property
    def density(self) -> Array:
        """[F], the share of tokens on which each feature fires."""
        return self.fired / jnp.maximum(self.tokens, 1)

    @property
    def mean_when_firing(self) -> Array:
        """[F], 0 for a feature that never fired."""
        return self.total / jnp.maximum(self.fired, 1)


class LogitEffects(NamedTuple):
    """What each feature raises and lowers most: values [F, n] (per unit of activation) and token ids [F, n] int32."""

    top: Array
    top_tokens: Array
    bottom: Array
    bottom_tokens: Array


def no_statistics(features: int) -> FeatureStatistics:
    """The beginning of `merge_statistics`: zeros [F]."""
    zeros = jnp.zeros(features, jnp.float32)
    return FeatureStatistics(jnp.zeros((), jnp.int32), jnp.zeros(features, jnp.int32), zeros, zeros, zeros)


def merge_statistics(
    statistics: FeatureStatistics, activations: ArrayLike, mask: ArrayLike | None = None
) -> FeatureStatistics:
    """The sums with a batch of activations[B, F] added; rows with mask[B] False are left out."""
    f = jnp.asarray(activations, jnp.float32)
    kept = jnp.ones(f.shape[0], bool) if mask is None else jnp.asarray(mask, bool)
    f = jnp.where(kept[:, None], f, 0.0)
    return FeatureStatistics(
        statistics.tokens + kept.sum(dtype=jnp.int32),
        statistics.fired + (f > 0).sum(axis=0, dtype=jnp.int32),
        statistics.total + f.sum(axis=0),
        statistics.squares + jnp.square(f).sum(axis=0),
        jnp.maximum(statistics.maximum, f.max(axis=0)),
    )


def merge_histogram(counts: ArrayLike, activations: ArrayLike, maximum: ArrayLike) -> Array:
    """counts[F, bins] int32 with the firings of a batch added; the bins part (0, maximum[F]] evenly.

    Bin b holds b maximum / bins < f <= (b + 1) maximum / bins. A second pass, since `maximum` comes out of the first.

    Args:
        activations: [B, F]; zeros are not counted.
    """
    counts, f = jnp.asarray(counts), jnp.asarray(activations, jnp.float32)
    bins = counts.shape[1]
    edges = jnp.arange(bins) / bins

    def above(share: Array) -> Array:
        return (f > share * jnp.asarray(maximum, jnp.float32)[None, :]).sum(axis=0, dtype=jnp.int32)

    # Counting by comparison, since a scatter of B F elements runs serially on a CPU.
    exceed = jax.lax.map(above, edges)
    return counts + (exceed - jnp.concatenate([exceed[1:], jnp.zeros_like(exceed[:1])])).T


def correlations(products: ArrayLike, chosen: ArrayLike, statistics: FeatureStatistics) -> Array:
    """Pearson's correlation over tokens of S chosen features with all F: [S, F]; 0 where either never varies.

    (E[f_s f] - E[f_s] E[f]) / (sd_s sd), products [S, F] the sum of f[:, chosen].T @ f over the batches that
    `statistics` has seen, chosen [S] int32.
    """
    n = jnp.maximum(statistics.tokens, 1)
    mean = statistics.total / n
    variance = jnp.maximum(statistics.squares / n - jnp.square(mean), 0.0)
    chosen = jnp.asarray(chosen)
    covariance = jnp.asarray(products) / n - mean[chosen][:, None] * mean[None, :]
    scale = jnp.sqrt(variance[chosen])[:, None] * jnp.sqrt(variance)[None, :]
    return jnp.where(scale > 0, covariance / jnp.where(scale > 0, scale, 1.0), 0.0)


def most_correlated(correlation: ArrayLike, chosen: ArrayLike, count: int) -> tuple[Array, Array]:
    """Of correlation[S, F] the highest of each row, without the feature itself: (values, features) [S, count]."""
    correlation = jnp.asarray(correlation)
    itself = jnp.asarray(chosen)[:, None] == jnp.arange(correlation.shape[1])[None, :]
    return jax.lax.top_k(jnp.where(itself, -jnp.inf, correlation), count)


def logit_effects(w_dec: ArrayLike, unembedding: ArrayLike, norm_scale: ArrayLike, *, count: int) -> LogitEffects:
    """What a feature writes straight to the logits: e = (W_dec * norm_scale) @ unembedding.T, its mean subtracted.

    The final norm's division by the residual's size is left out, as it scales all of them alike, and so is all that
    later layers make of it. The mean is of no effect on probabilities.

    Args:
        w_dec: [F, D]; unembedding: [V, D]; norm_scale: [D], the final norm's.
        count: n <= V tokens at each end.
    """
    rows = jnp.asarray(w_dec) * jnp.asarray(norm_scale)[None, :]
    # The mean is subtracted from the vectors, which is the same and does not touch [F, V].
    vectors = jnp.asarray(unembedding)
    vectors = vectors - vectors.mean(axis=0)[None, :]

    def ends(row: Array) -> LogitEffects:
        effect = vectors @ row
        top, top_tokens = jax.lax.top_k(effect, count)
        bottom, bottom_tokens = jax.lax.top_k(-effect, count)
        return LogitEffects(top, top_tokens, -bottom, bottom_tokens)

    return jax.lax.map(ends, rows, batch_size=FEATURES_AT_ONCE)
