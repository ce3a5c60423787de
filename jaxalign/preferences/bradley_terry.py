"""Likelihoods of human comparisons given scalar rewards: pairs, rankings and ties."""

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


def as_float(*values: ArrayLike) -> list[Array]:
    """Arrays of one shape in at least float32: half precision would lose the digits that a difference needs.

    Raises AssertionError, showing the shapes, if they differ: [B, 1] against [B] would broadcast to [B, B].
    """
    arrays = [jnp.asarray(value) for value in values]
    chex.assert_equal_shape(arrays)
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]


def bradley_terry_loss(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
) -> Array:
    """Negative log-likelihood of each comparison when P(chosen beats rejected) = sigmoid(chosen - rejected).

    x = chosen_rewards - rejected_rewards - margin
    loss = -(1 - label_smoothing) log_sigmoid(x) - label_smoothing log_sigmoid(-x)

    Args:
        chosen_rewards, rejected_rewards: [...], one shape.
        margin: scalar or [...], how much better the chosen one was judged (Llama 2, arXiv:2307.09288 eq. 2).
        label_smoothing: the probability that a label is flipped, in [0, 1).

    Returns [...] in nats. Bradley and Terry, Biometrika 39 (1952).

    >>> float(bradley_terry_loss(1.0, 1.0))
    0.6931471824645996
    """
    chosen_rewards, rejected_rewards = as_float(chosen_rewards, rejected_rewards)
    x = chosen_rewards - rejected_rewards - margin
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(x) - label_smoothing * jax.nn.log_sigmoid(-x)


def plackett_luce_loss(rewards: ArrayLike, ranking: ArrayLike) -> Array:
    """Negative log-likelihood of a full ranking, drawn best first without replacement in proportion to exp(reward).

    r = rewards[ranking];  loss = sum_k [ logsumexp(r[k:]) - r[k] ]

    Args:
        rewards: [..., K].
        ranking: [..., K] int, a permutation of 0..K-1: `ranking[0]` is the index of the best item. Not checked.

    Returns [...] in nats; with K = 2 it is `bradley_terry_loss`. Plackett, Applied Statistics 24 (1975).
    """
    rewards, ranking = jnp.asarray(rewards), jnp.asarray(ranking)
    chex.assert_equal_shape([rewards, ranking])
    (rewards,) = as_float(rewards)
    ordered = jnp.take_along_axis(rewards, ranking, axis=-1)
    remaining = jax.lax.cumlogsumexp(ordered, axis=ordered.ndim - 1, reverse=True)
    return jnp.sum(remaining - ordered, axis=-1)


def davidson_loss(
    reward_a: ArrayLike, reward_b: ArrayLike, outcome: ArrayLike, *, tie_strength: ArrayLike
) -> Array:
    """Negative log-likelihood of comparisons that may end in a tie.

    P(a) : P(b) : P(tie) = exp(reward_a) : exp(reward_b) : tie_strength exp((reward_a + reward_b) / 2)

    Args:
        reward_a, reward_b: [...], one shape.
        outcome: [...] int, 0 where a was preferred, 1 where b was, 2 for a tie.
        tie_strength: scalar >= 0; at 0 the model is Bradley-Terry, and a tie has infinite loss.

    Returns [...] in nats. Davidson, Journal of the American Statistical Association 65 (1970).
    """
    reward_a, reward_b = as_float(reward_a, reward_b)
    outcome = jnp.asarray(outcome)
    chex.assert_equal_shape([reward_a, outcome])
    # Divided through by exp((a + b) / 2 + |h|), every exponent is <= 0 and tie_strength = 0 needs no logarithm.
    h = (reward_a - reward_b) / 2
    size = jnp.abs(h)
    log_rest = jnp.log1p(jnp.exp(-2 * size) + tie_strength * jnp.exp(-size))
    tie = outcome == 2
    log_tie_strength = jnp.log(jnp.where(tie, tie_strength, 1.0))
    return size - jnp.where(tie, log_tie_strength, jnp.where(outcome == 0, h, -h)) + log_rest


def centering_penalty(chosen_rewards: ArrayLike, rejected_rewards: ArrayLike) -> Array:
    """(chosen_rewards + rejected_rewards)^2, [...]: with a small weight it fixes the reward's free constant at 0.

    Eisenstein et al., arXiv:2312.09244.
    """
    chosen_rewards, rejected_rewards = as_float(chosen_rewards, rejected_rewards)
    return jnp.square(chosen_rewards + rejected_rewards)
