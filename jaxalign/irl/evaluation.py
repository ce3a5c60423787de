"""How good a learned reward is, by what planning with it does: rewards themselves are known only up to shaping."""

import jax.numpy as jnp

from jaxalign.mdp import TabularMDP, expected_return, occupancy_measure, value_iteration
from jaxalign.types import Array, ArrayLike


def expected_value_difference(
    mdp: TabularMDP, true_reward: ArrayLike, log_policy: Array, *, horizon: int | None = None
) -> Array:
    """E_{s ~ initial} [V*(s) - V^policy(s)] under `true_reward`, a scalar >= 0: what following the policy loses.

    Args:
        true_reward: [S], [S, A] or [S, A, S].
        log_policy: [S, A], or [H, S, A] with `horizon` H; usually the one optimal for the learned reward.
        horizon: steps of an episode; None is the discounted infinite horizon.

    Levine et al. (2011), section 6. Raises ValueError as `value_iteration` and `policy_evaluation` do.
    """
    best = value_iteration(mdp, true_reward, horizon=horizon).value
    if horizon is not None and log_policy.ndim == 2:
        log_policy = jnp.broadcast_to(log_policy[None], (horizon, *log_policy.shape))
    return mdp.initial @ (best if horizon is None else best[0]) - expected_return(mdp, log_policy, true_reward)


def policy_divergence(mdp: TabularMDP, log_policy: Array, other_log_policy: Array) -> Array:
    """sum_s mu[s] KL(policy(. | s) || other(. | s)) with mu the policy's normalised state visits; nats per step.

    log_policy, other_log_policy: [S, A]. Infinite where the policy takes an action that the other never takes.
    """
    occupancy = occupancy_measure(mdp, log_policy)
    # An action of probability 0 counts 0 although its log is -inf.
    ratio = jnp.where(occupancy > 0.0, log_policy - other_log_policy, 0.0)
    return jnp.sum(occupancy * ratio) / jnp.sum(occupancy)
