"""Kahneman-Tversky optimisation: learning from single completions marked desirable or not."""

import chex
import jax
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.types import Array, ArrayLike


def kto_loss(
    policy_logps: ArrayLike,
    reference_logps: ArrayLike,
    desirable: ArrayLike,
    *,
    beta: ArrayLike,
    kl: ArrayLike,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
) -> Array:
    """How far each completion's reward is from where a loss-averse human would want it.

    u = policy_logps - reference_logps
    loss = desirable_weight (1 - sigmoid(beta (u - kl)))       where desirable
           undesirable_weight (1 - sigmoid(beta (kl - u)))     elsewhere

    Args:
        policy_logps, reference_logps: [B], nats, summed over completion tokens.
        desirable: [B] bool.
        kl: scalar or [B] >= 0, the reference point z, nats; see `batch_kl`. No gradient flows to it.

    Returns [B]. With kl = 0 and both kinds it is APO-zero on unpaired data. TRL lists the desirable rows first and
    takes one mean over all. Ethayarajh et al., arXiv:2402.01306.
    """
    policy_logps, reference_logps = as_float(policy_logps, reference_logps)
    desirable = jnp.asarray(desirable) != 0
    chex.assert_equal_shape([policy_logps, desirable])
    gain = beta * (policy_logps - reference_logps - jax.lax.stop_gradient(kl))
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where the sigmoid rounds to 1.
    return jnp.where(
        desirable, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain)
    )


def batch_kl(policy_logps: ArrayLike, reference_logps: ArrayLike, *, valid: ArrayLike | None = None) -> Array:
    """KTO's reference point z = max(0, mean_b(policy_logps - reference_logps)), a scalar in nats, with no gradient.

    Args:
        policy_logps, reference_logps: [B], of *mismatched* completions: each prompt with another row's completion
            (a shift by one within the batch). On the matched ones z would follow the data's own rewards.
        valid: [B], nonzero on rows that count; 0 if none does.

    A biased, cheap estimate of KL(policy || reference). Ethayarajh et al., arXiv:2402.01306.
    """
    policy_logps, reference_logps = as_float(policy_logps, reference_logps)
    ratio = policy_logps - reference_logps
    counts = jnp.ones(ratio.shape, bool) if valid is None else jnp.asarray(valid) != 0
    chex.assert_equal_shape([ratio, counts])
    mean = jnp.sum(jnp.where(counts, ratio, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))
