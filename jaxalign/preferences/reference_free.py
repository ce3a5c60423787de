"""Pair losses that need no reference policy."""

import jax
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float, bradley_terry_loss
from jaxalign.types import Array, ArrayLike


def simpo_loss(
    chosen_mean_logps: ArrayLike,
    rejected_mean_logps: ArrayLike,
    *,
    beta: ArrayLike,
    gamma: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Simple preference optimisation: -log_sigmoid(beta (chosen_mean_logps - rejected_mean_logps) - gamma).

    Takes log-probabilities averaged per completion token, [B], nats. gamma is the margin in reward, after beta.
    label_smoothing as in `bradley_terry_loss`. Meng et al., arXiv:2405.14734 eq. 6.
    """
    chosen, rejected = as_float(chosen_mean_logps, rejected_mean_logps)
    return bradley_terry_loss(beta * chosen, beta * rejected, margin=gamma, label_smoothing=label_smoothing)


def cpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Contrastive preference optimisation: DPO's loss with a uniform reference.

    loss = -log_sigmoid(beta (policy_chosen_logps - policy_rejected_logps)), summed log-probabilities [B], nats

    The paper adds the chosen completion's negative log-likelihood, which is the caller's to add. TRL's takes that mean
    over the tokens of the prompt as well unless its labels mask them. Xu et al., arXiv:2401.08417 eq. 3.
    """
    chosen, rejected = as_float(policy_chosen_logps, policy_rejected_logps)
    return bradley_terry_loss(beta * chosen, beta * rejected, label_smoothing=label_smoothing)


def orpo_loss(chosen_mean_logps: ArrayLike, rejected_mean_logps: ArrayLike, *, beta: ArrayLike) -> Array:
    """The odds-ratio term of ORPO, to be added to the chosen completion's negative log-likelihood.

    log_odds(p) = log p - log(1 - p);  loss = -beta log_sigmoid(log_odds(chosen) - log_odds(rejected))

    Takes log-probabilities averaged per completion token, [B], nats, <= 0; log p = 0, whose odds are infinite, is
    held one rounding below. beta is the paper's lambda. TRL's `odds_ratio_loss` returns the negative of this and
    subtracts it, and gives NaN where both probabilities are 1. Hong et al., arXiv:2403.07691 eq. 7.
    """
    chosen, rejected = as_float(chosen_mean_logps, rejected_mean_logps)
    tiny = jnp.finfo(chosen.dtype).eps
    chosen, rejected = jnp.minimum(chosen, -tiny), jnp.minimum(rejected, -tiny)
    log_odds_ratio = (chosen - jax.nn.log1mexp(-chosen)) - (rejected - jax.nn.log1mexp(-rejected))
    return -beta * jax.nn.log_sigmoid(log_odds_ratio)
