"""How good generated samples are, by measure: against data, in the eyes of a classifier of the data.

All take rows of samples, so that `jackknife` gives any of them (and `two_sample.mmd_squared`) an interval. None is a
number by itself: read it beside the same measure of noise and of held-out data, with as many rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student_t

from jaxalign.types import Array, ArrayLike


class ClassCoverage(NamedTuple):
    """covered: the share of the C classes that some sample is taken for; entropy: of their histogram, in nats."""

    covered: Array
    entropy: Array


class PrecisionRecall(NamedTuple):
    """precision: the share of fakes among the data; recall: the share of the data among the fakes."""

    precision: Array
    recall: Array


class JackknifeEstimate(NamedTuple):
    """A statistic with its bias of order 1/N taken out, and its interval; arrays of the statistic's shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def classifier_score(logits: ArrayLike) -> Array:
    """exp(mean_i KL(p_i || mean_j p_j)), p_i = softmax(logits_i): the Inception Score with a classifier of the data.

    From 1 (all samples look alike to the classifier, or it is never sure) to C (sure of each, all classes equally
    often). Salimans et al. 2016, arXiv:1606.03498, section 4.

    Args:
        logits: [N, C], the classifier's, of the samples.

    Returns a scalar.
    """
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 2)
    log_p = jax.nn.log_softmax(logits)
    log_mean = jax.nn.logsumexp(log_p, axis=0, keepdims=True) - jnp.log(logits.shape[0])
    p = jnp.exp(log_p)
    # Both logarithms can be -inf where p is 0: that class adds nothing.
    return jnp.exp(jnp.mean(jnp.sum(jnp.where(p > 0, p * (log_p - log_mean), 0.0), axis=1)))


def class_coverage(logits: ArrayLike) -> ClassCoverage:
    """Which classes the samples are taken for: a generator that has lost modes leaves some out. Args: logits [N, C]."""
    logits = jnp.asarray(logits)
    chex.assert_rank(logits, 2)
    shares = jnp.mean(jax.nn.one_hot(jnp.argmax(logits, axis=1), logits.shape[1]), axis=0)
    return ClassCoverage(jnp.mean(shares > 0, dtype=shares.dtype), -jnp.sum(jax.scipy.special.xlogy(shares, shares)))


def frechet_distance(real: ArrayLike, fake: ArrayLike) -> float:
    """|m_r - m_f|^2 + tr(S_r + S_f - 2 (S_r S_f)^(1/2)), the squared Frechet distance of two Gaussians fitted to rows.

    m and S are means and (N - 1) covariances of features, FID with features of any kind (Heusel et al. 2017,
    arXiv:1706.08500, equation 6). With few rows it is too large, by the order of D / N: `jackknife` takes the bias of
    order 1/N out. In float64 on the host: not for jit.

    Args:
        real: [N, D].
        fake: [M, D].

    Raises ValueError if the shapes do not match or a side has fewer than two rows.
    """
    real, fake = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"frechet_distance: needs [N, D] and [M, D], N, M >= 2, got {real.shape} and {fake.shape}")
    covariances = [np.cov(rows, rowvar=False).reshape(real.shape[1], -1) for rows in (real, fake)]
    # The eigenvalues of S_r S_f are those of R S_f R with R = S_r^(1/2), which is symmetric.
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariances[1] @ root), 0.0)).sum()
    apart = np.sum((real.mean(axis=0) - fake.mean(axis=0)) ** 2)
    return float(apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * overlap)


def precision_and_recall(real: ArrayLike, fake: ArrayLike, *, k: int = 3) -> PrecisionRecall:
    """Do the samples look like data, and do they cover it, with data's extent taken as balls around its points.

    precision = mean_j any_i |fake_j - real_i| <= radius(real)_i, and recall the same with the sides exchanged;
    radius(x)_i is the distance of x_i to its k-th nearest neighbour in x. Both are below 1 for equal distributions too.
    Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1 and 2.

    Args:
        real: [N, D] features, N > k.
        fake: [M, D], M > k.
        k: of the neighbours, static.

    Raises ValueError if a side has no k neighbours.
    """
    real, fake = jnp.asarray(real), jnp.asarray(fake)
    chex.assert_rank([real, fake], 2)
    if not 1 <= k < min(real.shape[0], fake.shape[0]):
        raise ValueError(f"precision_and_recall: k = {k} neighbours of {real.shape[0]} and {fake.shape[0]} rows")
    between = _squared_distances(real, fake)
    inside_real = between <= _radii(real, k)[:, None]
    inside_fake = between <= _radii(fake, k)[None, :]
    shares = (jnp.mean(jnp.any(inside, axis=axis)) for inside, axis in ((inside_real, 0), (inside_fake, 1)))
    return PrecisionRecall(*shares)


def jackknife(
    statistic: Callable[..., Any], *samples: ArrayLike, groups: int = 20, confidence: float = 0.95
) -> JackknifeEstimate:
    """A statistic of samples [N, ...], [M, ...], ... without its bias of order 1/N, with an interval.

    With s the statistic of all rows and s_j that of all but group j (of `groups` g; row i of each sample is in group
    i mod g), value = g s - (g - 1) mean_j s_j and low, high = value -+ t_{g-1} sqrt((g - 1) / g sum_j (s_j - mean s)^2)
    (Quenouille 1956; Tukey 1958). It is for statistics that change smoothly with the sample, which bootstraps of a
    biased one are not: they add its bias a second time.

    Args:
        statistic: `(*samples) -> numbers`; called g + 1 times, with at most three shapes per sample.
        samples: rows in no particular order.

    Raises ValueError if a sample has fewer rows than two groups' worth.
    """
    arrays = [np.asarray(sample) for sample in samples]
    if groups < 2 or min(len(rows) for rows in arrays) < 2 * groups:
        raise ValueError(f"jackknife: {groups} groups need {2 * groups} rows, got {[len(rows) for rows in arrays]}")
    without = np.stack(
        [
            np.asarray(statistic(*(rows[np.arange(len(rows)) % groups != j] for rows in arrays)), np.float64)
            for j in range(groups)
        ]
    )
    value = groups * np.asarray(statistic(*arrays), np.float64) - (groups - 1) * without.mean(axis=0)
    error = np.sqrt((groups - 1) / groups * np.sum((without - without.mean(axis=0)) ** 2, axis=0))
    reach = student_t.ppf(0.5 + confidence / 2, groups - 1) * error
    return JackknifeEstimate(value, value - reach, value + reach)


def _squared_distances(x: Array, y: Array) -> Array:
    """[N, D], [M, D] -> [N, M], a row at a time: differences are exact where squares of norms would cancel."""
    return jax.lax.map(lambda row: jnp.sum(jnp.square(y - row[None, :]), axis=1), x, batch_size=32)


def _radii(x: Array, k: int) -> Array:
    """The squared distance [N] of each row of [N, D] to its k-th nearest other row."""
    apart = _squared_distances(x, x)
    others = jnp.where(jnp.eye(x.shape[0], dtype=bool), jnp.inf, apart)
    return -jax.lax.top_k(-others, k)[0][:, -1]
