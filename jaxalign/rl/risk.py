"""Risk of returns: value at risk, conditional value at risk, entropic risk, and what to train on to lower them.

Samples are returns, of which more is better, so the tail is the lowest ones; `cvar_objective` takes losses, of which
less is better. alpha in (0, 1] is always the share of the tail.

The conditional value at risk of a whole return is static: one tail of the distribution of sum_k discount^k r_k.
`robust_value_iteration` with `CVaR(alpha)` is nested: it takes a tail at every step, of what remains, which dynamic
programming over states can plan for. Over T random steps, cvar(return, alpha^T) <= nested <= mean(return). Neither of
nested and cvar(return, alpha) bounds the other: a tail of tails is often lower, but where bad luck is rare and far
ahead the nested value gives each step's tail too little weight to see it.
"""

import jax
import jax.numpy as jnp

from jaxalign.mdp.worst_case import check_number
from jaxalign.types import Array, ArrayLike


def cvar(samples: ArrayLike, alpha: ArrayLike) -> Array:
    """Conditional value at risk: the mean of the worst (lowest) alpha of the samples, [..., N] -> [...].

    cvar = sum_i w_i x_(i) over sorted samples with w_i = clip(alpha N - i, 0, 1) / (alpha N): exact where alpha N is no
    whole number. alpha 1 is the mean, 0 (a limit) the least. Equal to max over t of t - mean(max(t - x, 0)) / alpha,
    and to `worst_case_cvar` of equally likely values. NaN where a sample is NaN.
    Its gradient in the samples is their weights (which of equal samples is in the tail is left open).

    alpha: in [0, 1], scalar, may be traced. Raises ValueError, outside jit, where it is not, and if N is 0.
    Rockafellar & Uryasev (2002), "Conditional value-at-risk for general loss distributions".
    """
    samples = _samples("cvar", samples)
    check_number("cvar: alpha", alpha, 1.0)
    number = samples.shape[-1]
    # No tail is smaller than a small part of one sample, so that alpha 0 is the lowest.
    share = jnp.maximum(jnp.asarray(alpha, samples.dtype) * number, jnp.sqrt(jnp.finfo(samples.dtype).tiny))
    weights = jnp.clip(share - jnp.arange(number, dtype=samples.dtype), 0.0, 1.0) / share
    ordered = jnp.sort(samples, axis=-1)
    # An infinite return above the tail must not meet its weight of 0.
    tail = jnp.where(weights > 0.0, ordered, 0.0) @ weights
    return jnp.where(jnp.any(jnp.isnan(samples), axis=-1), jnp.nan, tail)


def value_at_risk(samples: ArrayLike, alpha: ArrayLike) -> Array:
    """The least x with at least alpha of the samples <= x, one of the samples: [..., N] -> [...].

    sort(samples)[ceil(alpha N) - 1]; alpha 0 is the least. NaN where a sample is NaN. alpha as for `cvar`.
    """
    samples = _samples("value_at_risk", samples)
    check_number("value_at_risk: alpha", alpha, 1.0)
    number, rounding = samples.shape[-1], 1.0 - 2.0 * jnp.finfo(samples.dtype).eps
    # 0.1 in binary is a little more than a tenth, and a tenth of ten samples is one.
    place = jnp.ceil(jnp.asarray(alpha, samples.dtype) * number * rounding).astype(jnp.int32) - 1
    found = jnp.take(jnp.sort(samples, axis=-1), jnp.clip(place, 0, number - 1), axis=-1)
    return jnp.where(jnp.any(jnp.isnan(samples), axis=-1), jnp.nan, found)


def entropic_risk(samples: ArrayLike, *, beta: ArrayLike) -> Array:
    """The certainty equivalent -(1 / beta) log mean(exp(-beta samples)), [..., N] -> [...].

    beta 0 is the mean, infinity the least; a small beta takes off beta / 2 times the variance. Negative is
    risk-seeking. beta: per unit of the samples, scalar, may be traced. Howard & Matheson (1972), "Risk-sensitive
    Markov decision processes".
    """
    samples = _samples("entropic_risk", samples)
    beta = jnp.asarray(beta, samples.dtype)
    safe = jnp.where(beta == 0.0, 1.0, beta)
    middle = jnp.mean(samples, axis=-1)
    exponent = -safe * (samples - middle[..., None])
    near = jnp.max(jnp.abs(exponent), axis=-1) < 1.0
    # Where all exponents are small, the logarithm of a mean near 1 would be all rounding error.
    small = jnp.log1p(jnp.mean(jnp.expm1(jnp.where(near[..., None], exponent, 0.0)), axis=-1))
    large = jax.nn.logsumexp(exponent, axis=-1) - jnp.log(jnp.asarray(samples.shape[-1], samples.dtype))
    return jnp.where(beta == 0.0, middle, middle - jnp.where(near, small, large) / safe)


def cvar_objective(losses: ArrayLike, threshold: ArrayLike, *, alpha: ArrayLike) -> Array:
    """One value per loss whose mean, at the best threshold, is the mean of the worst (highest) alpha of the losses:

        threshold + max(losses - threshold, 0) / alpha

    min over threshold of its mean is -cvar(-losses, alpha), at the threshold -value_at_risk(-losses, alpha). Convex in
    (losses, threshold) together: train the threshold along with the parameters, or take the exact one for each batch.
    Rockafellar & Uryasev (2000), "Optimization of conditional value-at-risk", eq. 4 and theorem 1.

    Args:
        losses: [...]; threshold: broadcast to it, in the unit of the losses.
        alpha: in (0, 1], the share of the tail.

    Returns [...]. Raises ValueError, outside jit, on an alpha outside (0, 1].
    """
    check_number("cvar_objective: alpha", alpha, 1.0)
    if not isinstance(alpha, jax.core.Tracer) and not alpha > 0.0:
        raise ValueError(f"cvar_objective: alpha must be positive, got {alpha}")
    losses = jnp.asarray(losses)
    threshold = jnp.broadcast_to(threshold, losses.shape)
    return threshold + jax.nn.relu(losses - threshold) / alpha


def cvar_advantages(returns: ArrayLike, *, alpha: ArrayLike) -> Array:
    """What to weigh grad log-probability of each trajectory by, to climb the CVaR of the return: [N] -> [N].

    min(returns - value_at_risk(returns, alpha), 0) / alpha, so that mean_i advantages[i] grad log p_i estimates
    grad CVaR (its bias is of order 1 / N). Only the worst alpha N trajectories teach, so it needs N well above
    1 / alpha. Tamar, Glassner & Mannor (2015), "Optimizing the CVaR via sampling", arXiv:1404.3862.

    alpha: in (0, 1], as for `cvar_objective`. Raises ValueError, outside jit, where it is not.
    """
    if not isinstance(alpha, jax.core.Tracer) and not alpha > 0.0:
        raise ValueError(f"cvar_advantages: alpha must be positive, got {alpha}")
    returns = jax.lax.stop_gradient(_samples("cvar_advantages", returns))
    return jnp.minimum(returns - value_at_risk(returns, alpha)[..., None], 0.0) / alpha


def _samples(name: str, samples: ArrayLike) -> Array:
    samples = jnp.asarray(samples)
    if samples.ndim == 0 or samples.shape[-1] == 0:
        raise ValueError(f"{name}: needs samples [..., N] with N >= 1, got shape {samples.shape}")
    return samples.astype(jnp.result_type(samples, 0.0))
