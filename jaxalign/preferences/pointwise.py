"""Pair losses that judge chosen and rejected each on its own, beyond their difference.

Arguments and notation as in `jaxalign.preferences.direct`: summed log-probabilities [B], log-ratios c and r, [B] out.
"""

import jax
import jax.numpy as jnp

from jaxalign.preferences.direct import log_ratios
from jaxalign.types import Array, ArrayLike


def nca_pair_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Array:
    """Noise-contrastive alignment with K = 2, which keeps the chosen log-probability from falling.

    loss = -log_sigmoid(beta c) - 1/2 log_sigmoid(-beta c) - 1/2 log_sigmoid(-beta r)

    Returns [B]. Chen et al., arXiv:2402.05369.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    noise = jax.nn.log_sigmoid(-beta * c) + jax.nn.log_sigmoid(-beta * r)
    return -jax.nn.log_sigmoid(beta * c) - 0.5 * noise


def bco_pair_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    shift: ArrayLike = 0.0,
) -> Array:
    """Binary classifier optimisation: a logistic classifier of chosen against rejected with logit = implicit reward.

    loss = -log_sigmoid(beta c - shift) - log_sigmoid(-(beta r - shift))

    shift, scalar or [B], is the paper's delta in units of reward: its running mean of beta (c + r) / 2, with no
    gradient. TRL's "bco_pair" has none, as the default here. Jung et al., arXiv:2404.04656.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return -jax.nn.log_sigmoid(beta * c - shift) - jax.nn.log_sigmoid(shift - beta * r)


def sppo_hard_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Array:
    """Self-play preference optimisation where the chosen one wins with probability 1.

    loss = (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2;  1 / beta is the paper's eta.

    Returns [B]. Wu et al., arXiv:2405.00675 eq. 4.7 with P = 1 and 0.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return jnp.square(c - 0.5 / beta) + jnp.square(r + 0.5 / beta)


def apo_zero_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Array:
    """Anchored preference optimisation where the chosen answers are better than the policy's own: c up, r down.

    loss = 1 - sigmoid(beta c) + sigmoid(beta r), [B].  D'Oosterlinck et al., arXiv:2408.06266 eq. 7.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return jax.nn.sigmoid(-beta * c) + jax.nn.sigmoid(beta * r)


def apo_down_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Array:
    """Anchored preference optimisation where the chosen answers are worse than the policy's own: both down, r more.

    loss = sigmoid(beta c) + 1 - sigmoid(beta D), [B].  D'Oosterlinck et al., arXiv:2408.06266 eq. 8.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return jax.nn.sigmoid(beta * c) + jax.nn.sigmoid(-beta * (c - r))
