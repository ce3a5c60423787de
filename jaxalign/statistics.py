"""Intervals and aggregates for a handful of noisy runs: interquartile mean, bootstrap, probability of improvement.

Wilson's interval is for trials that either succeed or do not; the rest is for scores.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv:2108.13264).
A NaN score gives a NaN result everywhere: a run that failed is never dropped unsaid.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike, Key

# Resampled elements alive at a time: 4 MB in float32, so the memory of a bootstrap does not grow with `resamples`.
CHUNK_ELEMENTS = 1 << 20


def interquartile_mean(scores: ArrayLike) -> Array:
    """Mean of the middle half of the scores: `mean(sort(scores)[cut : N - cut])` with `cut = floor(N / 4)`.

    The same as `scipy.stats.trim_mean(scores, 0.25, axis=-1)`: a quarter of the scores is left out at each end,
    so it resists outliers like the median and uses more of the data (arXiv:2108.13264, section 4.3).

    Args:
        scores: [..., N].

    Returns [...] in the unit of the scores. Raises ValueError if N is 0.
    """
    scores = _floating(scores)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"interquartile_mean: needs scores [..., N] with N >= 1, got shape {scores.shape}")
    n = scores.shape[-1]
    cut = n // 4
    middle = jnp.mean(jnp.sort(scores, axis=-1)[..., cut : n - cut], axis=-1)
    # NaN sorts last, where the cut would hide it.
    return jnp.where(jnp.any(jnp.isnan(scores), axis=-1), jnp.nan, middle)


def _mean_of_runs(scores: Array) -> Array:
    return jnp.mean(scores, axis=0)


def bootstrap_interval(
    key: Key,
    scores: ArrayLike,
    *,
    statistic: Callable[[Array], Array] = _mean_of_runs,
    confidence: ArrayLike = 0.95,
    resamples: int = 2000,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of a statistic of N independent runs.

    With R = `resamples` draws of N rows with replacement and `alpha = 1 - confidence`,
    `low, high = quantile([statistic(scores[rows_r]) for r in range(R)], [alpha / 2, 1 - alpha / 2])`
    (Efron & Tibshirani 1993, chapter 13). Below about 10 runs it is narrower than its confidence says.

    Args:
        scores: [N, ...]; rows are resampled whole, so what belongs to one run stays together.
        statistic: maps [N, ...] to [...]; the default is the mean over axis 0.
        confidence: in (0, 1); may be traced.
        resamples: R; they are computed a chunk at a time, in memory that does not depend on R.

    Returns (low, high), each of the shape of the statistic.
    Raises ValueError if N is 0, `resamples` < 1, or `confidence` is outside (0, 1).
    """
    scores = _floating(scores)
    if scores.ndim == 0 or scores.shape[0] == 0:
        raise ValueError(f"bootstrap_interval: needs scores [N, ...] with N >= 1, got shape {scores.shape}")
    n = scores.shape[0]

    def resampled(draw: Key) -> Array:
        return statistic(scores[jax.random.randint(draw, (n,), 0, n)])

    return _percentile_interval(key, resampled, scores.size, confidence, resamples)


def _interquartile_mean_of_all(scores: Array) -> Array:
    return interquartile_mean(jnp.moveaxis(scores.reshape(-1, *scores.shape[2:]), 0, -1))


def stratified_bootstrap_interval(
    key: Key,
    scores: ArrayLike,
    *,
    statistic: Callable[[Array], Array] = _interquartile_mean_of_all,
    confidence: ArrayLike = 0.95,
    resamples: int = 2000,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval over runs and tasks, with the runs of each task resampled within that task.

    Every resample keeps each task's weight: `resample[i, t] = scores[rows[i, t], t]` with independent rows
    (arXiv:2108.13264, section 4.1).

    Args:
        scores: [runs, tasks, ...], normalised so that tasks may be averaged.
        statistic: maps [runs, tasks, ...] to [...]; the default is the interquartile mean over all runs and tasks.
        confidence: in (0, 1); may be traced.
        resamples: how many, a chunk at a time as in `bootstrap_interval`.

    Returns (low, high), each of the shape of the statistic.
    Raises ValueError if there is no run or no task, `resamples` < 1, or `confidence` is outside (0, 1).
    """
    scores = _floating(scores)
    if scores.ndim < 2 or 0 in scores.shape[:2]:
        raise ValueError(f"stratified_bootstrap_interval: needs scores [runs, tasks, ...], got shape {scores.shape}")
    runs, tasks = scores.shape[:2]
    task = jnp.broadcast_to(jnp.arange(tasks)[None, :], (runs, tasks))

    def resampled(draw: Key) -> Array:
        return statistic(scores[jax.random.randint(draw, (runs, tasks), 0, runs), task])

    return _percentile_interval(key, resampled, scores.size, confidence, resamples)


def paired_difference_interval(
    key: Key,
    after: ArrayLike,
    before: ArrayLike,
    *,
    statistic: Callable[[Array], Array] = _mean_of_runs,
    confidence: ArrayLike = 0.95,
    resamples: int = 2000,
) -> tuple[Array, Array]:
    """Bootstrap interval of the mean difference `mean(after - before)` of runs paired by seed or example.

    Pairs are resampled together, so the spread the two share cancels; use it where `after[i]` and `before[i]` saw
    the same seed, as `sweep` gives them.

    Args:
        after, before: [N, ...], of one shape.
        statistic: maps the differences [N, ...] to [...]; the default is the mean over axis 0.
        confidence, resamples: as in `bootstrap_interval`.

    Returns (low, high); the difference is told from zero at this confidence where the interval leaves zero out.
    Raises ValueError if the shapes differ, and as `bootstrap_interval` does.
    """
    after, before = _floating(after), _floating(before)
    if after.shape != before.shape:
        raise ValueError(f"paired_difference_interval: after is {after.shape}, before is {before.shape}")
    return bootstrap_interval(key, after - before, statistic=statistic, confidence=confidence, resamples=resamples)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> Array:
    """P(X > Y) + P(X = Y) / 2 for a random run of x against a random run of y.

    `mean over i, j of (x[i] > y[j]) + (x[i] == y[j]) / 2`, the Mann-Whitney U statistic over N M
    (arXiv:2108.13264, section 4.3), by sorting: O((N + M) log M) time and no [N, M] array.

    Args:
        x: [N].
        y: [M].

    Returns a scalar in [0, 1]; its gradient is zero. Raises ValueError if N or M is 0.
    """
    x, y = _floating(x), _floating(y)
    chex.assert_rank([x, y], 1)
    if 0 in (x.size, y.size):
        raise ValueError(f"probability_of_improvement: needs at least one run on each side, got {x.shape}, {y.shape}")
    # A count is flat, so the gradient is zero; stopping it here spares autodiff the binary search.
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = jax.lax.stop_gradient(x.astype(dtype)), jax.lax.stop_gradient(y.astype(dtype))
    ordered = jnp.sort(y)
    below = jnp.searchsorted(ordered, x, side="left")
    not_above = jnp.searchsorted(ordered, x, side="right")
    # The mean of fractions: the count itself may pass 2^24, float32's last exact integer.
    probability = jnp.mean((below + not_above).astype(dtype) / (2 * y.size))
    return jnp.where(jnp.any(jnp.isnan(x)) | jnp.any(jnp.isnan(y)), jnp.nan, probability)


def rank_correlation(x: ArrayLike, y: ArrayLike) -> Array:
    """Spearman's rank correlation of x[N] and y[N], ties sharing their mean rank; NaN where one of them is constant."""
    ranks = [jax.scipy.stats.rankdata(_floating(values)) for values in (x, y)]
    a, b = (rank - rank.mean() for rank in ranks)
    return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum())


def wilson_interval(successes: ArrayLike, trials: ArrayLike, *, confidence: ArrayLike = 0.95) -> tuple[Array, Array]:
    """Wilson's score interval for a probability of which `successes` out of `trials` were seen.

    With p = successes / trials and z the standard normal quantile of (1 + confidence) / 2,
    `(p + z^2 / (2 n) -+ z sqrt(p (1 - p) / n + z^2 / (4 n^2))) / (1 + z^2 / n)`, n = trials: all probabilities that a
    score test at this level would not reject (Wilson 1927; Brown, Cai & DasGupta 2001 recommend it).

    Args:
        successes, trials: [...], broadcast together; counts.
        confidence: in (0, 1); may be traced.

    Returns (low, high), each [...] in [0, 1]; NaN where there was no trial.
    Raises ValueError, outside jit, on successes outside [0, trials], and on a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    if not any(isinstance(count, jax.core.Tracer) for count in (successes, trials)):
        wrong = ~((np.asarray(successes) >= 0) & (np.asarray(successes) <= np.asarray(trials)))
        if wrong.any():
            raise ValueError(f"wilson_interval: successes must lie in [0, trials], got {successes} of {trials}")
    successes, trials = jnp.broadcast_arrays(_floating(successes), _floating(trials))
    z = jax.scipy.special.ndtri((1 + jnp.asarray(confidence, successes.dtype)) / 2)
    p, failed = successes / trials, (trials - successes) / trials
    centre = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * jnp.sqrt(p * failed / trials + z**2 / (4 * trials**2))
    # Both ends are exact where all trials agree; there rounding would leave the interval off its own estimate.
    low = jnp.where(successes == 0, 0.0, centre - half)
    high = jnp.where(successes == trials, 1.0, centre + half)
    seen = trials > 0
    return jnp.where(seen, low, jnp.nan), jnp.where(seen, high, jnp.nan)


def _percentile_interval(
    key: Key, resampled: Callable[[Key], Array], elements: int, confidence: ArrayLike, resamples: int
) -> tuple[Array, Array]:
    """The central `confidence` of the distribution of `resampled(draw) -> [...]`; one draw holds `elements`."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _check_confidence(confidence)
    chunks = -(-resamples // max(1, CHUNK_ELEMENTS // elements))
    chunk = -(-resamples // chunks)
    # Full chunks only, the surplus dropped: a remainder would be compiled as a second program.
    draws = jax.random.split(key, (chunks, chunk))
    values = jax.lax.map(jax.vmap(resampled), draws)
    values = values.reshape(chunks * chunk, *values.shape[2:])[:resamples]
    tail = (1 - jnp.asarray(confidence, values.dtype)) / 2
    low, high = jnp.quantile(values, jnp.stack([tail, 1 - tail]), axis=0)
    return low, high


def _check_confidence(confidence: ArrayLike) -> None:
    if isinstance(confidence, int | float) and not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")


def _floating(scores: ArrayLike) -> Array:
    """Counts and successes become floats; half precision is raised to float32, in which means are taken."""
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores.astype(jnp.result_type(float))
    return scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
