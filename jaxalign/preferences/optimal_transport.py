"""Alignment by optimal transport: losses that compare the batch's distributions, rank by rank.

The one family here whose values depend on the whole batch: splitting a batch into parts changes the loss.
"""

import chex
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float, bradley_terry_loss
from jaxalign.preferences.direct import log_ratios
from jaxalign.types import Array, ArrayLike


def aot_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
    valid: ArrayLike | None = None,
) -> Array:
    """Make the policy's margins stochastically dominate the reference's (paired data).

    policy = sort_b(policy_chosen_logps - policy_rejected_logps), reference likewise
    loss[i] = dpo's logistic loss at beta (policy[i] - reference[i])

    Args:
        first four: [B], nats, summed over completion tokens.
        valid: [B], nonzero on real rows. The others enter no quantile and get 0; the values of the real ranks, in
            ascending order, stand in the real rows.

    Returns [B] by ascending rank, not by pair. Melnyk et al., arXiv:2406.05882.
    """
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = as_float(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    policy, reference = policy_chosen - policy_rejected, reference_chosen - reference_rejected
    return _by_rank(policy, reference, beta, label_smoothing, valid)


def aot_unpaired_loss(
    policy_chosen_logps: ArrayLike,
    policy_rejected_logps: ArrayLike,
    reference_chosen_logps: ArrayLike,
    reference_rejected_logps: ArrayLike,
    *,
    beta: ArrayLike,
    label_smoothing: ArrayLike = 0.0,
    valid: ArrayLike | None = None,
) -> Array:
    """Make the chosen log-ratios stochastically dominate the rejected ones; rows need not be pairs.

    loss[i] = dpo's logistic loss at beta (sort_b(c)[i] - sort_b(r)[i])

    Arguments and result as in `aot_loss`. Melnyk et al., arXiv:2406.05882.
    """
    c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    return _by_rank(c, r, beta, label_smoothing, valid)


def _by_rank(x: Array, y: Array, beta: ArrayLike, label_smoothing: ArrayLike, valid: ArrayLike | None) -> Array:
    chex.assert_rank(x, 1)
    if valid is None:
        x, y = jnp.sort(x), jnp.sort(y)
        return bradley_terry_loss(beta * x, beta * y, label_smoothing=label_smoothing)
    real = jnp.asarray(valid) != 0
    chex.assert_equal_shape([x, real])
    # Sorting (is padding, value) puts the padding last without an infinity that a gradient could meet.
    x, y = x[jnp.lexsort((x, ~real))], y[jnp.lexsort((y, ~real))]
    rank = jnp.maximum(jnp.cumsum(real) - 1, 0)
    loss = bradley_terry_loss(beta * x, beta * y, label_smoothing=label_smoothing)
    return jnp.where(real, loss[rank], 0.0)
