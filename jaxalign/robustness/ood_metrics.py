"""How well a score tells inputs of the training distribution from others, with intervals.

Every score is higher for what is out of distribution; a detector of anything else may be judged the same way.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from jaxalign.statistics import CHUNK_ELEMENTS, probability_of_improvement
from jaxalign.types import Array, ArrayLike, Key


def auroc(in_scores: ArrayLike, out_scores: ArrayLike) -> Array:
    """P(out > in) + P(out = in) / 2, the area under the ROC curve, exact with ties.

    Args:
        in_scores: [N], of inputs in the distribution.
        out_scores: [M], of inputs outside it.

    Returns a scalar in [0, 1], 1/2 for a score that says nothing. A NaN score gives NaN. Raises ValueError if either
    is empty.
    """
    return probability_of_improvement(out_scores, in_scores)


def false_positive_rate_at(
    in_scores: ArrayLike, out_scores: ArrayLike, *, true_positive_rate: ArrayLike = 0.95
) -> Array:
    """The share of outside inputs that pass as inside, at the threshold that passes `true_positive_rate` of the inside.

    threshold = the least t with mean(in_scores <= t) >= true_positive_rate;  result = mean(out_scores <= threshold).
    This is "FPR95" of the literature, where "positive" is what lies in the distribution (Liang et al. 2018,
    arXiv:1706.02690).

    Args:
        in_scores: [N].
        out_scores: [M].
        true_positive_rate: in (0, 1]; may be traced.

    Returns a scalar in [0, 1], NaN where a score is. Raises ValueError if either is empty.
    """
    in_scores, out_scores = jnp.asarray(in_scores), jnp.asarray(out_scores)
    chex.assert_rank([in_scores, out_scores], 1)
    if 0 in (in_scores.size, out_scores.size):
        raise ValueError(f"false_positive_rate_at: needs scores of both, got {in_scores.shape}, {out_scores.shape}")
    n = in_scores.size
    # 0.95 is not a float: without the allowance 0.95 * 20 may be more than 19.
    passed = jnp.ceil(jnp.asarray(true_positive_rate, jnp.float32) * n * (1 - 1e-6)).astype(jnp.int32)
    threshold = jnp.sort(in_scores)[jnp.clip(passed - 1, 0, n - 1)]
    rate = jnp.mean(out_scores <= threshold, dtype=jnp.float32)
    return jnp.where(jnp.isnan(in_scores).any() | jnp.isnan(out_scores).any(), jnp.nan, rate)


def detection_interval(
    key: Key,
    in_scores: ArrayLike,
    out_scores: ArrayLike,
    *,
    statistic: Callable[[Array, Array], Array] = auroc,
    confidence: ArrayLike = 0.95,
    resamples: int = 1000,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of `statistic(in_scores, out_scores)`; the two samples are resampled apart.

    It holds for new inputs and the same trained network; how much another training run would differ is for a
    `jaxalign.statistics.bootstrap_interval` over seeds.

    Args:
        in_scores: [N].
        out_scores: [M].
        statistic: of arrays [N], [M] -> scalar: `auroc`, `false_positive_rate_at`, or your own.
        confidence: in (0, 1); may be traced.
        resamples: how many pairs of resamples.

    Returns (low, high). Raises ValueError if `resamples` < 1 or `confidence` is outside (0, 1).
    """
    in_scores, out_scores = jnp.asarray(in_scores), jnp.asarray(out_scores)
    chex.assert_rank([in_scores, out_scores], 1)
    if resamples < 1 or (isinstance(confidence, int | float) and not 0 < confidence < 1):
        raise ValueError(f"detection_interval: needs resamples >= 1, 0 < confidence < 1; got {resamples}, {confidence}")

    def resampled(draw: Key) -> Array:
        rows = [
            jax.random.choice(each, scores, scores.shape)
            for each, scores in zip(jax.random.split(draw), (in_scores, out_scores), strict=True)
        ]
        return statistic(*rows)

    together = max(1, CHUNK_ELEMENTS // (in_scores.size + out_scores.size))
    values = jax.lax.map(resampled, jax.random.split(key, resamples), batch_size=min(together, resamples))
    tail = (1 - jnp.asarray(confidence, values.dtype)) / 2
    low, high = jnp.quantile(values, jnp.stack([tail, 1 - tail]))
    return low, high
