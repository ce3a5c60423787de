"""Exact confidence bounds for a probability, and the exact test of a fair coin, from counts of successes.

Both need the tail of a binomial, `P(X >= k) = I_p(k, n - k + 1)`. `jax.scipy.special.betainc` takes it from log-gamma
functions, whose rounding in float32 is 6% of the tail at n = 100,000; here no large numbers cancel.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike

# log(n!) minus Stirling's n log n - n + log(2 pi n) / 2, for n < 16; the series below is exact to rounding from there.
STIRLING_ERRORS = [0.0] + [
    math.lgamma(n + 1) - (n + 0.5) * math.log(n) + n - 0.5 * math.log(2 * math.pi) for n in range(1, 16)
]
SERIES_TERMS = 12
MOST_FRACTIONS, MOST_STEPS = 10_000, 100


def clopper_pearson_lower(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> Array:
    """The largest p with P(Binomial(trials, p) >= successes) <= alpha: a lower confidence bound at level 1 - alpha.

    The alpha-quantile of Beta(successes, trials - successes + 1), and 0 without a success (Clopper & Pearson 1934, "The
    use of confidence or fiducial limits illustrated in the case of the binomial"). With no failure it is
    alpha^(1 / trials). It is found by Newton's method on log I_p(k, n - k + 1) as a function of log(p / (1 - p)): that
    is concave and rising, so from the left each step ends left of the root, on the safe side.

    Rounding goes down, by 6 epsilons of log(p / (1 - p)) and 2 of p, where the largest error met is below 4: in float32
    the result is never above the exact bound, and for alpha <= 1/2 less than 1e-6 below it (measured to a million
    trials); in float64 it is SciPy's to 1e-13.

    Args:
        successes, trials: [...] counts, broadcast together; trials >= 1.
        alpha: in (0, 1), broadcast too; may be traced.

    Returns [...] in [0, 1). Raises ValueError, outside jit, on counts or an alpha out of range.
    """
    _check("clopper_pearson_lower", successes, trials, alpha)
    return _lower(successes, trials, alpha)[0]


def clopper_pearson_upper(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> Array:
    """The smallest p with P(Binomial(trials, p) <= successes) <= alpha: an upper confidence bound at level 1 - alpha.

    One minus the lower bound for the failures, and 1 without a failure; close to 0 it keeps its digits, which
    1 - clopper_pearson_lower would lose. Arguments [...] as there; rounding goes up.
    """
    _check("clopper_pearson_upper", successes, trials, alpha)
    return _lower(jnp.asarray(trials) - jnp.asarray(successes), trials, alpha)[1]


def fair_coin_p_value(successes: ArrayLike, trials: ArrayLike) -> Array:
    """The two-sided p-value of "heads and tails are equally likely": min(1, 2 P(X >= max(k, n - k))).

    X ~ Binomial(n, 1/2); [...] counts, broadcast together. What `scipy.stats.binomtest(k, n).pvalue` gives; 1 where
    there was no trial. Raises ValueError, outside jit, on counts out of range.
    """
    _check("fair_coin_p_value", successes, trials, least=0)
    successes, trials = _counts(successes, trials)
    more = jnp.maximum(successes, trials - successes)
    log_tail, _ = _log_binomial_tail(jnp.zeros_like(more), jnp.maximum(more, 1), jnp.maximum(trials, 1))
    return jnp.where(2 * more == trials, 1.0, jnp.minimum(1.0, 2 * jnp.exp(log_tail)))


def _lower(successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike) -> tuple[Array, Array]:
    """(p, 1 - p) at the lower bound, the first rounded down and the second up, each with all its digits."""
    successes, trials, alpha = _counts(successes, trials, alpha)
    some = jnp.maximum(successes, 1)
    epsilon = jnp.finfo(some.dtype).eps
    target = jnp.log(alpha) - 2 * epsilon

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        count, logit, step = state
        return (count < MOST_STEPS) & jnp.any(jnp.abs(step) > 4 * epsilon * (1 + jnp.abs(logit)))

    def newton(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, logit, _ = state
        log_tail, slope = _log_binomial_tail(logit, some, trials)
        step = (target - log_tail) / slope
        return count + 1, logit + step, step

    # P(X >= k) <= n p, so p = alpha / n is left of the root.
    start = jnp.log(alpha / trials)
    _, logit, _ = jax.lax.while_loop(unfinished, newton, (jnp.zeros((), jnp.int32), start, jnp.ones_like(start)))
    # n p is rounded in the tail, which is as if p were another by a few parts in 1 / epsilon.
    logit = logit - 6 * epsilon * (1 + jnp.abs(logit))
    lower = jnp.where(successes > 0, jax.nn.sigmoid(logit) * (1 - 2 * epsilon), 0.0)
    upper = jnp.where(successes > 0, jnp.minimum(jax.nn.sigmoid(-logit) * (1 + 2 * epsilon), 1.0), 1.0)
    return lower, upper


def _log_binomial_tail(logit: Array, k: Array, n: Array) -> tuple[Array, Array]:
    """(log P(X >= k), its derivative in `logit`) for X ~ Binomial(n, sigmoid(logit)) and 1 <= k <= n, all [...].

    P(X >= k) = I_p(k, n - k + 1) = w F, w = p^k q^(n - k + 1) / B(k, n - k + 1) = k q P(X = k), F the continued
    fraction of DiDonato & Morris 1992 ("Algorithm 708", equation 9), or 1 - w F' from the other side: whichever has
    positive terms. The derivative is w / P(X >= k).
    """
    p, q = jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)
    failures = n - k
    excess = jnp.where(p <= q, k - n * p, n * q - failures)  # k - n p, from the product that rounds less
    log_weight = jnp.log(k) + jax.nn.log_sigmoid(-logit) + _log_binomial(k, n, p, q, excess, logit)
    above = excess >= p  # k is above the mean of the beta distribution, times n + 1
    a, b = jnp.where(above, k, failures + 1), jnp.where(above, failures + 1, k)
    x, y = jnp.where(above, p, q), jnp.where(above, q, p)
    fraction = _beta_fraction(a, b, x, y, jnp.abs(excess - p))
    near = log_weight + jnp.log(fraction)  # log I_x(a, b)
    far = jnp.log1p(-jnp.exp(jnp.where(above, -1.0, near)))
    # Far from the mean both logarithms are large, and their difference is rounding: there the slope is the fraction's.
    return jnp.where(above, near, far), jnp.where(above, 1 / fraction, jnp.exp(log_weight - far))


def _log_binomial(k: Array, n: Array, p: Array, q: Array, excess: Array, logit: Array) -> Array:
    """log P(X = k) by Loader's saddle-point expansion, in which nothing large cancels; [...] with 1 <= k <= n.

    -n KL(k/n || p) + s(n) - s(k) - s(n - k) + log(n / (2 pi k (n - k))) / 2, s Stirling's errors (Loader 2000, "Fast
    and accurate computation of binomial probabilities").
    """
    some = jnp.maximum(n - k, 1)
    divergence = jnp.sum(_deviance(jnp.stack([k, some]), jnp.stack([n * p, n * q]), jnp.stack([excess, -excess])), 0)
    of_n, of_k, of_rest = _stirling_error(jnp.stack([n, k, some]))
    inner = of_n - of_k - of_rest - divergence + 0.5 * jnp.log(n / (2 * jnp.pi * k * some))
    return jnp.where(n > k, inner, n * jax.nn.log_sigmoid(logit))


def _deviance(count: Array, mean: Array, difference: Array) -> Array:
    """count log(count / mean) - difference, for count >= 1 and difference = count - mean, all [...]."""
    mean = jnp.maximum(mean, jnp.finfo(mean.dtype).tiny)
    ratio = difference / (count + mean)
    near = jnp.abs(ratio) < 0.2
    square = jnp.where(near, ratio, 0.0) ** 2
    series = jnp.zeros_like(square)
    for j in range(SERIES_TERMS, 0, -1):  # atanh(r) / r - 1 = r^2 / 3 + r^4 / 5 + ..., by Horner's rule
        series = square * (1 / (2 * j + 1) + series)
    return jnp.where(near, ratio * (difference + 2 * count * series), count * jnp.log(count / mean) - difference)


def _stirling_error(n: Array) -> Array:
    """log(n!) - (n log n - n + log(2 pi n) / 2) for whole n >= 1, [...]."""
    table = jnp.asarray(STIRLING_ERRORS, n.dtype)[jnp.minimum(n, 15).astype(jnp.int32)]
    square = 1 / n**2
    series = (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188)))) / n
    return jnp.where(n < 16, table, series)


def _beta_fraction(a: Array, b: Array, x: Array, y: Array, gap: Array) -> Array:
    """I_x(a, b) B(a, b) / (x^a y^b) for whole a, b >= 1 and gap = a - (a + b) x >= 0, all [...]: a continued fraction.

    Its m-th numerator is zero at m = b, where it ends; the numerators before are positive. Successive convergents are
    kept as ratios, so nothing overflows.
    """
    c, c0, c1 = 1 + gap, b / a, 1 + 1 / a
    tolerance = jnp.finfo(x.dtype).eps

    def unfinished(state: tuple[Array, ...]) -> Array:
        m, *_, done = state
        return (m < MOST_FRACTIONS) & jnp.any(~done)

    def turn(state: tuple[Array, ...]) -> tuple[Array, ...]:
        m, last, scale, value, done = state
        m = m + 1
        count = m.astype(x.dtype)
        t, s = count / a, a + 2 * count - 1
        before, w = 1 + (count - 1) / a, count * (b - count) * x
        numerator = before * (before + c0) * (a / s) ** 2 * w * x
        denominator = count + w / s + (1 + t) / (c1 + 2 * t) * (c + count * (1 + y))
        bottom = numerator * scale + denominator
        new = (numerator * last + denominator * value) / bottom
        settled = done | (jnp.abs(new - value) <= tolerance * new) | (count >= b)
        # A finished element keeps its value: past m = b its terms mean nothing.
        kept = [jnp.where(done, old, new) for old, new in ((last, value / bottom), (scale, 1 / bottom), (value, new))]
        return m, *kept, settled

    start = (jnp.zeros((), jnp.int32), jnp.zeros_like(x), c1 / c, c1 / c, jnp.zeros(x.shape, bool))
    return jax.lax.while_loop(unfinished, turn, start)[3]


def _counts(*values: ArrayLike) -> list[Array]:
    dtype = jnp.result_type(float)
    return jnp.broadcast_arrays(*(jnp.asarray(value).astype(dtype) for value in values))


def _check(name: str, successes: ArrayLike, trials: ArrayLike, alpha: ArrayLike = 0.5, *, least: int = 1) -> None:
    if not isinstance(alpha, jax.core.Tracer) and not np.all((np.asarray(alpha) > 0) & (np.asarray(alpha) < 1)):
        raise ValueError(f"{name}: alpha must lie in (0, 1), got {alpha}")
    if any(isinstance(count, jax.core.Tracer) for count in (successes, trials)):
        return
    k, n = np.asarray(successes), np.asarray(trials)
    if not np.all((n >= least) & (k >= 0) & (k <= n) & (k == np.round(k)) & (n == np.round(n))):
        raise ValueError(f"{name}: needs whole numbers, 0 <= successes <= trials, trials >= {least}; got {k} of {n}")
