"""Losses on preference pairs that train a policy against a reference policy, DPO and its family.

Every loss takes completion log-probabilities in nats, summed over tokens, [B] each, and returns one value per pair,
[B]. With c = policy_chosen_logps - reference_chosen_logps, r = policy_rejected_logps - reference_rejected_logps and
D = c - r, the implicit rewards are beta c and beta r. `beta` > 0 (per nat) weighs the pull towards the reference.
"""

import jax
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float, bradley_terry_loss
from jaxalign.types import Array, ArrayLike


def log_ratios(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
) -> tuple[Array, Array]:
    """(c, r), [B] each: how much likelier, in nats, the policy makes each completion than the reference does."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = as_float(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def dpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Direct preference optimisation: the Bradley-Terry loss of the implicit rewards.

    loss = -(1 - label_smoothing) log_sigmoid(beta D) - label_smoothing log_sigmoid(-beta D)

    Takes four summed log-probabilities [B], nats; returns [B]. label_smoothing > 0, the probability that a label is
    flipped, gives conservative DPO; TRL's "sigmoid" leaves its label smoothing unused.
    Rafailov et al., arXiv:2305.18290 eq. 7.

    >>> float(dpo_loss(-1.0, -1.0, -2.0, -2.0, beta=0.1))
    0.6931471824645996
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return bradley_terry_loss(beta * c, beta * r, label_smoothing=label_smoothing)


def length_normalized_dpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """DPO on log-ratios per token: `dpo_loss` of D = c / chosen_lengths - r / rejected_lengths.

    chosen_lengths, rejected_lengths: [B], completion tokens; 0 counts as 1. TRL's "sigmoid_norm".
    Meng et al., arXiv:2405.14734, the length-normalised DPO of their ablation.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    c, r = _per_token(c, chosen_lengths), _per_token(r, rejected_lengths)
    return bradley_terry_loss(beta * c, beta * r, label_smoothing=label_smoothing)


def _per_token(log_ratio: Array, lengths: ArrayLike) -> Array:
    return log_ratio / jnp.maximum(jnp.asarray(lengths).astype(log_ratio.dtype), 1.0)


def ipo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
) -> Array:
    """Identity preference optimisation: a squared error, so that sure preferences cannot drive D to infinity.

    loss = (c / chosen_lengths - r / rejected_lengths - 1 / (2 beta))^2

    beta is the paper's tau. Without lengths c and r are the sums of the paper's equation; with them, [B] completion
    tokens each (0 counts as 1), they are means per token, which TRL's "ipo" always takes. Raises ValueError if only one
    of the lengths is given. Azar et al., arXiv:2310.12036 eq. 17.
    """
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("ipo_loss: give both chosen_lengths and rejected_lengths, or neither")
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if chosen_lengths is not None and rejected_lengths is not None:
        c, r = _per_token(c, chosen_lengths), _per_token(r, rejected_lengths)
    return jnp.square(c - r - 1.0 / (2.0 * beta))


def hinge_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
) -> Array:
    """relu(1 - beta D), [B]. Liu et al. (RSO), arXiv:2309.06657, after SLiC."""
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return jax.nn.relu(1.0 - beta * (c - r))


def robust_dpo_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike,
) -> Array:
    """DPO debiased for labels flipped at the rate label_smoothing: its mean over the flips is the clean DPO loss.

    e = label_smoothing
    loss = [ -(1 - e) log_sigmoid(beta D) + e log_sigmoid(-beta D) ] / (1 - 2 e)

    Negative values are right. Raises ValueError unless a label_smoothing given as a number is in [0, 0.5).
    Ray Chowdhury et al., arXiv:2403.00409.
    """
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"robust_dpo_loss: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    clean, flipped = jax.nn.log_sigmoid(beta * (c - r)), jax.nn.log_sigmoid(-beta * (c - r))
    return (label_smoothing * flipped - (1.0 - label_smoothing) * clean) / (1.0 - 2.0 * label_smoothing)


def exo_pair_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike,
) -> Array:
    """Efficient exact optimisation: a reverse KL between the policy's preferences and the labels'.

    loss = KL( [sigmoid(beta D), sigmoid(-beta D)] || [1 - label_smoothing, label_smoothing] )

    DPO minimises the other direction, which allows certain labels; this one does not:
    raises ValueError unless a label_smoothing given as a number is in (0, 1). The paper uses 1e-3.
    Ji et al., arXiv:2402.00856 eq. 16.
    """
    if isinstance(label_smoothing, int | float) and not 0 < label_smoothing < 1:
        raise ValueError(f"exo_pair_loss: label_smoothing must be in (0, 1), got {label_smoothing}")
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    x = beta * (c - r)
    keep = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-label_smoothing))
    return keep + jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(label_smoothing))


def discopop_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    temperature: ArrayLike = 0.05,
) -> Array:
    """The log-ratio modulated loss that DiscoPOP's search found: logistic for negative D, exponential for positive.

    x = beta D;  m = sigmoid(x / temperature);  loss = -(1 - m) log_sigmoid(x) + m exp(-x)

    Returns [B]. Not convex, and its slope changes sign near D = 0. 0 < temperature < 1.
    Lu et al., arXiv:2406.08414 eq. 5.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    x = beta * (c - r)
    # m exp(-x) in one exponential: for very negative x the factors are 0 and inf.
    exponential = jnp.exp(jax.nn.log_sigmoid(x / temperature) - x)
    return exponential - jax.nn.sigmoid(-x / temperature) * jax.nn.log_sigmoid(x)
