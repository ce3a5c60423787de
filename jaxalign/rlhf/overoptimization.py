"""Best-of-n sampling and the curves of over-optimisation: gold reward against distance from the reference policy."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array, ArrayLike, Key


def best_of_n_kl(n: ArrayLike) -> Array:
    """KL(best of n || reference) = log n - (n - 1) / n, in nats; n [...] >= 1, may be traced.

    Exact for rewards without ties, whatever the policy: the best of n has density n F^(n-1) times the reference's, F
    the reward's distribution function. With ties it is an upper bound. Stiennon et al., arXiv:2009.01325 app. G.3.

    >>> round(float(best_of_n_kl(4)), 4)
    0.6363
    """
    n = jnp.asarray(n, jnp.result_type(float))
    return jnp.log(n) - (n - 1.0) / n


def best_of_n(proxy: ArrayLike, gold: ArrayLike, ns: ArrayLike) -> tuple[Array, Array]:
    """What the sample that the proxy likes best of n is worth, averaged over all subsets of size n of N samples.

    With samples in ascending order of proxy, i = 1..N, the i-th is the best of a random subset with probability
    w_i = C(i-1, n-1) / C(N, n); proxy_of_best = sum_i w_i proxy_i, gold_of_best = sum_i w_i gold_i.

    Args:
        proxy, gold: [N], the samples' rewards by the model that chooses and by the one that is meant.
        ns: [K] int, each in 1..N; may be traced.

    Returns (proxy_of_best [K], gold_of_best [K]), unbiased for fresh subsets of size n, and of less variance than one
    split of the N samples. Of tied proxies each is as likely to be taken as another.
    Raises ValueError for an n outside 1..N (not under jit: there the result is NaN). Nakano et al., arXiv:2112.09332
    app. I.

    >>> [x.tolist() for x in best_of_n(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 6.0, 3.0]), jnp.array([1, 3]))]
    [[2.0, 3.0], [3.0, 3.0]]
    """
    proxy, gold = as_float(proxy, gold)
    ns = jnp.asarray(ns)
    chex.assert_rank([proxy, ns], 1)
    size = proxy.shape[0]
    valid = (ns >= 1) & (ns <= size)
    if not isinstance(valid, jax.core.Tracer) and not bool(jnp.all(valid)):
        raise ValueError(f"best_of_n: ns must be in 1..{size}, the number of samples, got {ns.tolist()}")
    order = jnp.argsort(proxy)
    proxy, gold = proxy[order], gold[order]
    new_value = jnp.concatenate([jnp.zeros(1, bool), proxy[1:] != proxy[:-1]])
    tie = jnp.cumsum(new_value)
    count = jax.ops.segment_sum(jnp.ones_like(gold), tie, size)
    gold = (jax.ops.segment_sum(gold, tie, size) / jnp.maximum(count, 1.0))[tie]
    weights = jax.vmap(lambda n: _weights_of_best(n, size, proxy.dtype))(ns)
    weights = jnp.where(valid[:, None], weights, jnp.nan)
    return weights @ proxy, weights @ gold


def _weights_of_best(n: Array, size: int, dtype: jnp.dtype) -> Array:
    """w_i = C(i-1, n-1) / C(N, n), [N], from w_N = n / N and w_{i-1} / w_i = (i - n) / (i - 1).

    Differences of log-gammas would lose three digits in float32 at N = 4096: each is about 30,000.
    """
    i = jnp.arange(1, size + 1)
    above = i > n
    ratio = jnp.where(above, (n - 1.0) / jnp.maximum(i - 1.0, 1.0), 0.0).astype(dtype)
    steps = jnp.log1p(-ratio)
    log_rest = jax.lax.cumsum(steps, reverse=True) - steps  # over j > i
    return jnp.where(i >= n, jnp.exp(log_rest) * (n / size), 0.0).astype(dtype)


class ScalingLaw(NamedTuple):
    """gold(d) - gold(0) as a function of d = sqrt(KL), sqrt(nats): d (alpha - beta d), or d (alpha - beta log d).

    alpha: [], gain per unit of distance at first (best-of-n), or at d = 1 (reinforcement)
    beta: [], how fast over-optimisation takes it away
    peak_distance, peak_gain: [], where the fitted law is highest and how high; infinite if beta <= 0, and 0 if
        best-of-n's alpha <= 0: then it only falls
    """

    alpha: Array
    beta: Array
    peak_distance: Array
    peak_gain: Array


def fit_best_of_n_law(distance: ArrayLike, gain: ArrayLike) -> ScalingLaw:
    """Least squares of gain = d (alpha - beta d) over all points of distance, gain [...], pooled.

    Gao et al., arXiv:2210.10760 eq. 1. The peak is at alpha / (2 beta).
    """
    d, gain = (x.ravel() for x in as_float(distance, gain))
    alpha, beta = _two_coefficients(d, -jnp.square(d), gain)
    turns = beta > 0
    where = jnp.where(turns, jnp.maximum(alpha, 0.0) / (2.0 * jnp.where(turns, beta, 1.0)), jnp.inf)
    height = jnp.where(turns, where * (alpha - beta * jnp.where(turns, where, 0.0)), jnp.inf)
    return ScalingLaw(alpha, beta, where, height)


def fit_reinforcement_law(distance: ArrayLike, gain: ArrayLike) -> ScalingLaw:
    """Least squares of gain = d (alpha - beta log d) over all points of distance, gain [...], pooled.

    Gao et al., arXiv:2210.10760 eq. 1; at d = 0 the gain is 0. The peak is at exp(alpha / beta - 1).
    """
    d, gain = (x.ravel() for x in as_float(distance, gain))
    d_log_d = jnp.where(d > 0, d * jnp.log(jnp.where(d > 0, d, 1.0)), 0.0)
    alpha, beta = _two_coefficients(d, -d_log_d, gain)
    turns = beta > 0
    where = jnp.where(turns, jnp.exp(alpha / jnp.where(turns, beta, 1.0) - 1.0), jnp.inf)
    return ScalingLaw(alpha, beta, where, jnp.where(turns, beta * where, jnp.inf))


def law_intervals(
    key: Key,
    law: Callable[[ArrayLike, ArrayLike], ScalingLaw],
    distance: ArrayLike,
    gain: ArrayLike,
    *,
    confidence: ArrayLike = 0.95,
    resamples: int = 1000,
) -> tuple[ScalingLaw, ScalingLaw]:
    """Bootstrap intervals (low, high) of a law fitted to S seeds, each resampled with its whole curve.

    Args:
        law: `fit_best_of_n_law` or `fit_reinforcement_law`.
        distance, gain: [S, K].
    """
    distance, gain = as_float(distance, gain)
    chex.assert_rank(distance, 2)

    def refitted(points: Array) -> Array:
        return jnp.stack(law(points[:, 0], points[:, 1]))

    low, high = bootstrap_interval(
        key, jnp.stack([distance, gain], axis=1), statistic=refitted, confidence=confidence, resamples=resamples
    )
    return ScalingLaw(*low), ScalingLaw(*high)


def _two_coefficients(x: Array, y: Array, target: Array) -> tuple[Array, Array]:
    """(a, b) of the least squares a x + b y = target, all [P]; NaN where x and y [P] do not tell them apart."""
    xx, xy, yy = x @ x, x @ y, y @ y
    determinant = xx * yy - xy * xy
    distinct = determinant > 1e-6 * xx * yy
    safe = jnp.where(distinct, determinant, 1.0)
    a, b = (yy * (x @ target) - xy * (y @ target)) / safe, (xx * (y @ target) - xy * (x @ target)) / safe
    return jnp.where(distinct, a, jnp.nan), jnp.where(distinct, b, jnp.nan)
