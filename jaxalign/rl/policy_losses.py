"""Losses of policy-gradient learners on sampled actions: one value per action or token, masks and means left to you.

Every array has one shape [...] (steps x environments, or sequences x tokens); log-probabilities are in nats. The
losses are their equations, so they are differentiable in every argument: pass advantages that are data.
"""

import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.types import Array, ArrayLike


def policy_gradient_loss(log_probs: ArrayLike, advantages: ArrayLike) -> Array:
    """REINFORCE: -log_probs * advantages, [...], whose gradient is minus the policy gradient's sample.

    Its value means nothing; only its gradient does. Williams, Machine Learning 8 (1992).

    >>> float(policy_gradient_loss(-0.5, 2.0))
    1.0
    """
    log_probs, advantages = as_float(log_probs, advantages)
    return -log_probs * advantages


def ppo_policy_loss(
    log_probs: ArrayLike,
    old_log_probs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_epsilon: ArrayLike,
    clip_epsilon_high: ArrayLike | None = None,
    dual_clip: ArrayLike | None = None,
) -> Array:
    """The clipped surrogate of proximal policy optimisation, [...].

    ratio = exp(log_probs - old_log_probs)
    loss = -min(ratio advantages, clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon_high) advantages)

    Args:
        log_probs, old_log_probs: of the actions taken, under the policy being trained and the one that acted, [...].
        advantages: [...].
        clip_epsilon: how far the ratio may gain from moving; the upper end is `clip_epsilon_high` if given ("clip
            higher" of DAPO, Yu et al., arXiv:2503.14476 eq. 10).
        dual_clip: c > 1 bounds the loss of actions with advantages < 0, which grows with the ratio without limit, by
            -c advantages (Ye et al., arXiv:1912.09729 eq. 5). None leaves it unbounded.

    Raises AssertionError showing the shapes if they differ. Schulman et al., arXiv:1707.06347 eq. 7.

    >>> float(ppo_policy_loss(0.0, -1.0, 2.0, clip_epsilon=0.25))
    -2.5
    """
    log_probs, old_log_probs, advantages = as_float(log_probs, old_log_probs, advantages)
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    ratio = jnp.exp(log_probs - old_log_probs)
    loss = jnp.maximum(-ratio * advantages, -jnp.clip(ratio, 1.0 - clip_epsilon, 1.0 + high) * advantages)
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def ppo_value_loss(
    values: ArrayLike, old_values: ArrayLike, targets: ArrayLike, *, clip_epsilon: ArrayLike | None = None
) -> Array:
    """Half the squared error of a value estimate, or the larger of that and the error of the clipped estimate, [...].

    clipped = old_values + clip(values - old_values, -clip_epsilon, clip_epsilon)
    loss = 0.5 max((values - targets)^2, (clipped - targets)^2)

    values, old_values, targets: [...], estimates now, estimates when the steps were taken, and `lambda_returns`.
    clip_epsilon is in units of value; None: 0.5 (values - targets)^2, which often learns no worse
    (Andrychowicz et al., arXiv:2006.05990). Raises AssertionError showing the shapes if they differ.

    >>> float(ppo_value_loss(1.0, 0.0, 3.0)), float(ppo_value_loss(1.0, 0.0, 3.0, clip_epsilon=0.5))
    (2.0, 3.125)
    """
    values, old_values, targets = as_float(values, old_values, targets)
    error = jnp.square(values - targets)
    if clip_epsilon is not None:
        clipped = old_values + jnp.clip(values - old_values, -clip_epsilon, clip_epsilon)
        error = jnp.maximum(error, jnp.square(clipped - targets))
    return 0.5 * error
