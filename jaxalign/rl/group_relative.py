"""Advantages of samples drawn for the same prompt, each measured against the others of its group; no value function."""

import chex
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.types import Array, ArrayLike


def grpo_advantages(rewards: ArrayLike, *, scale: bool = True, epsilon: ArrayLike = 1e-4) -> Array:
    """Group-relative advantages: rewards [B, G] of G samples for each of B prompts -> [B, G].

    centered = rewards - mean_g rewards
    advantages = centered / (std_g rewards + epsilon)        std with G - 1 in its denominator

    scale False leaves out the division, which makes prompts that are nearly solved or nearly hopeless weigh more than
    others (Dr. GRPO, Liu et al., arXiv:2503.20783). A group of equal rewards has advantages 0.
    Raises ValueError for groups of one, AssertionError for another rank. Shao et al., arXiv:2402.03300 sec. 4.1.2.

    >>> grpo_advantages(jnp.array([[0.0, 1.0, 2.0]]), epsilon=0.0).tolist()
    [[-1.0, 0.0, 1.0]]
    """
    centered, others = _centered(rewards)
    if not scale:
        return centered
    # The square root's gradient is infinite at 0, where a group of equal rewards lies.
    variance = jnp.sum(jnp.square(centered), axis=1, keepdims=True) / others
    varied = variance > 0
    return centered / (jnp.where(varied, jnp.sqrt(jnp.where(varied, variance, 1.0)), 0.0) + epsilon)


def rloo_advantages(rewards: ArrayLike) -> Array:
    """Leave-one-out advantages: each reward minus the mean of the others in its group, [B, G] -> [B, G].

    advantages = rewards - (sum_g rewards - rewards) / (G - 1) = (rewards - mean_g rewards) G / (G - 1)

    The baseline of a sample does not depend on that sample, so the policy gradient stays unbiased.
    Raises ValueError for groups of one, AssertionError for another rank. Ahmadian et al., arXiv:2402.14740 eq. 7.

    >>> rloo_advantages(jnp.array([[0.0, 1.0, 5.0]])).tolist()
    [[-3.0, -1.5, 4.5]]
    """
    centered, others = _centered(rewards)
    return centered * ((others + 1) / others)


def _centered(rewards: ArrayLike) -> tuple[Array, int]:
    """Rewards minus their group's mean [B, G], and G - 1."""
    (rewards,) = as_float(rewards)
    chex.assert_rank(rewards, 2)
    if rewards.shape[1] < 2:
        raise ValueError(f"a group of rewards [B, G] needs at least two samples to compare, got {rewards.shape}")
    return rewards - jnp.mean(rewards, axis=1, keepdims=True), rewards.shape[1] - 1
