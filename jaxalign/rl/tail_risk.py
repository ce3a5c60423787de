"""The lower tail of measured returns, each number with an interval; and a model of the tail beyond the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.rl.risk import cvar, value_at_risk
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array, ArrayLike, Key


class Interval(NamedTuple):
    """A number [...] and the ends of its confidence interval [...]."""

    value: Array
    low: Array
    high: Array


class TailRisk(NamedTuple):
    """What `tail_risk` finds, in the unit of the returns.

    mean: Interval []
    value_at_risk, cvar: Interval [K], for each of alphas
    below: Interval [], the probability of a return below the threshold
    worst: [], the lowest return seen: no interval, as no resampling shows what was never seen
    alphas: [K]; threshold, confidence: []
    returns: [N] or [seeds, N], as they were given
    """

    mean: Interval
    value_at_risk: Interval
    cvar: Interval
    below: Interval
    worst: Array
    alphas: Array
    threshold: Array
    confidence: Array
    returns: Array


def tail_risk(
    key: Key,
    returns: ArrayLike,
    *,
    alphas: ArrayLike = (0.01, 0.05, 0.1),
    threshold: ArrayLike = 0.0,
    confidence: ArrayLike = 0.95,
    resamples: int = 2000,
) -> TailRisk:
    """Mean, value at risk, CVaR, the worst and Pr(return < threshold) of returns, with bootstrap intervals.

    Args:
        returns: [N] independent returns; or [seeds, N], of N episodes of each trained policy, which belong together:
            all are pooled, and whole seeds are resampled.
        alphas: [K] in (0, 1], shares of the tail. An interval says little where alpha N is below about 5: a
            bootstrap knows nothing beyond the worst return. `pareto_tail` extrapolates.
        threshold: in the unit of the returns.
        resamples: as in `bootstrap_interval`.

    The interval of the probability is that of the bootstrap, widened to Wilson's (1927), which is right also where no
    return is below. A NaN return makes every number NaN.
    Raises ValueError on another shape, no return, or as `bootstrap_interval`.
    """
    returns, alphas = jnp.asarray(returns), jnp.asarray(alphas)
    if returns.ndim not in (1, 2) or returns.size == 0 or alphas.ndim != 1:
        raise ValueError(
            f"tail_risk: returns must be [N] or [seeds, N], not empty, and alphas [K]; "
            f"got {returns.shape} and {alphas.shape}"
        )
    returns = returns.astype(jnp.result_type(returns, 0.0))
    threshold, confidence = (jnp.asarray(x, returns.dtype) for x in (threshold, confidence))
    failed, tails = jnp.any(jnp.isnan(returns)), alphas.size

    def numbers(returns: Array) -> Array:
        pooled = returns.reshape(-1)
        each = [jax.vmap(measure, (None, 0))(pooled, alphas) for measure in (value_at_risk, cvar)]
        ends = jnp.stack([jnp.mean(pooled), jnp.mean(pooled < threshold)])
        return jnp.where(failed, jnp.nan, jnp.concatenate([*each, ends]))

    value = numbers(returns)
    low, high = bootstrap_interval(key, returns, statistic=numbers, confidence=confidence, resamples=resamples)
    at_risk, tail = (Interval(*(x[at] for x in (value, low, high))) for at in (slice(tails), slice(tails, 2 * tails)))
    mean, below = (Interval(value[i], low[i], high[i]) for i in (-2, -1))
    wilson_low, wilson_high = _wilson_interval(below.value, returns.size, confidence)
    below = Interval(below.value, jnp.minimum(below.low, wilson_low), jnp.maximum(below.high, wilson_high))
    return TailRisk(mean, at_risk, tail, below, jnp.min(returns), alphas, threshold, confidence, returns)


class ParetoTail(NamedTuple):
    """A generalised Pareto tail of returns below a threshold.

    shape: [], xi; above 0 the tail is heavier than exponential, from 1 on it has no mean
    scale: [], sigma; threshold: [], the return below which the tail begins, both in the unit of the returns
    value_at_risk, cvar: [K]
    """

    shape: Array
    scale: Array
    threshold: Array
    value_at_risk: Array
    cvar: Array


def pareto_tail(samples: ArrayLike, *, alphas: ArrayLike, exceedances: int) -> ParetoTail:
    """Extrapolate the tail of returns from the `exceedances` lowest of them: with y how far below the threshold,
    Pr(Y > y) = (1 + shape y / scale)^(-1 / shape).

    Fitted by probability-weighted moments, in closed form: a0 = mean(y), a1 = mean(y (1 - p)) with p the plotting
    position of y, shape = 2 - a0 / (a0 - 2 a1), scale = 2 a0 a1 / (a0 - 2 a1); good for shapes below 1/2. Then with
    f = exceedances / N and g = (alpha / f)^(-shape),
    value_at_risk = threshold - scale (g - 1) / shape, cvar = threshold - scale (1 + (g - 1) / shape) / (1 - shape).
    Hosking & Wallis (1987), "Parameter and quantile estimation for the generalized Pareto distribution"; McNeil & Frey
    (2000). cvar is minus infinity where shape >= 1.

    Args:
        samples: [N] returns.
        alphas: [K] in (0, f], shares of the tail; they may be far below 1 / N.
        exceedances: static, 10 or more, a tenth of N or less.

    Raises ValueError if `exceedances` is not in 2..N-1 and, outside jit, on an alpha not in (0, f].
    """
    samples, alphas = jnp.asarray(samples), jnp.asarray(alphas)
    samples = samples.astype(jnp.result_type(samples, 0.0))
    if samples.ndim != 1 or not 2 <= exceedances < samples.size:
        raise ValueError(f"pareto_tail: needs samples [N] and 2 <= exceedances < N, got {samples.shape}, {exceedances}")
    share = exceedances / samples.size
    if not isinstance(alphas, jax.core.Tracer) and not ((np.asarray(alphas) > 0) & (np.asarray(alphas) <= share)).all():
        raise ValueError(f"pareto_tail: alphas must be in (0, exceedances / N = {share:g}], got {np.asarray(alphas)}")
    lowest = jnp.sort(samples)[: exceedances + 1]
    threshold = lowest[-1]
    below = threshold - lowest[-2::-1]  # ascending
    position = (jnp.arange(1, exceedances + 1, dtype=samples.dtype) - 0.35) / exceedances
    a0, a1 = jnp.mean(below), jnp.mean(below * (1.0 - position))
    shape, scale = 2.0 - a0 / (a0 - 2.0 * a1), 2.0 * a0 * a1 / (a0 - 2.0 * a1)
    times = jnp.log(share / alphas.astype(samples.dtype))
    flat = jnp.abs(shape) < 1e-6  # (g - 1) / shape tends to -log(alpha / f)
    grown = jnp.where(flat, times, jnp.expm1(shape * times) / jnp.where(flat, 1.0, shape))
    beyond = jnp.where(shape < 1.0, scale * (1.0 + grown) / jnp.where(shape < 1.0, 1.0 - shape, 1.0), jnp.inf)
    found = ParetoTail(shape, scale, threshold, threshold - scale * grown, threshold - beyond)
    return jax.tree.map(lambda x: jnp.where(jnp.any(jnp.isnan(samples)), jnp.nan, x), found)


def _wilson_interval(share: Array, number: int, confidence: Array) -> tuple[Array, Array]:
    """Of a probability, from the share of `number` independent trials: Wilson (1927)."""
    z = jax.scipy.special.ndtri(0.5 + confidence / 2.0)
    middle = (share + z**2 / (2.0 * number)) / (1.0 + z**2 / number)
    half = z / (1.0 + z**2 / number) * jnp.sqrt(share * (1.0 - share) / number + z**2 / (4.0 * number**2))
    return jnp.maximum(middle - half, 0.0), jnp.minimum(middle + half, 1.0)
