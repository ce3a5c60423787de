"""Synthetic annotators: who compares two segments of behaviour, and how they err.

An Annotator is `(key, rewards_a [Q, T], mask_a [Q, T], rewards_b [Q, T], mask_b [Q, T]) -> outcome [Q] int32`: 0 where
segment a is preferred, 1 where b is, 2 for a tie. `rewards` are the true ones of each step, which the learner never
sees; `mask` says which steps are real, and R = sum_t where(mask[t], rewards[t], 0) is a segment's return.

Two of them judge: `boltzmann_annotator` and `intransitive_annotator`. The others change what one that judges is shown
or answers, and can be put around each other: a hurried person who likes long answers and sometimes slips is
`noisy_annotator(myopic_annotator(biased_annotator(boltzmann_annotator(beta=5.0), length_bias(0.1)), discount=0.9),
flip_probability=0.1)`. The kinds are those of Lee et al. (B-Pref), arXiv:2111.03026, section 3.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike, Key

Annotator = Callable[[Key, Array, Array, Array, Array], Array]
Scorer = Callable[[Key, Array, Array], Array]
FIRST, SECOND, TIE = 0, 1, 2


def segment_returns(rewards: ArrayLike, mask: ArrayLike) -> Array:
    """R = sum_t where(mask[..., t], rewards[..., t], 0), [...], of rewards and mask [..., T].

    Raises ValueError if the shapes differ.
    """
    rewards, mask = jnp.asarray(rewards), jnp.asarray(mask)
    if rewards.shape != mask.shape or not rewards.ndim:
        raise ValueError(f"segment_returns: rewards {rewards.shape} and mask {mask.shape} must be one shape [..., T]")
    return jnp.sum(jnp.where(mask, rewards, 0.0), axis=-1)


def boltzmann_annotator(*, beta: ArrayLike) -> Annotator:
    """P(a preferred) = sigmoid(beta (R_a - R_b)).

    beta: per unit of return; 0 answers by a coin, infinity always prefers the larger return, and equals by a coin.
    Christiano et al., arXiv:1706.03741, section 2.2.1; arXiv:2111.03026, equation 3.
    """

    def annotate(key: Key, rewards_a: Array, mask_a: Array, rewards_b: Array, mask_b: Array) -> Array:
        difference = segment_returns(rewards_a, mask_a) - segment_returns(rewards_b, mask_b)
        return _answer(key, _scaled(beta, difference))

    return annotate


def intransitive_annotator(*, beta: ArrayLike, strength: ArrayLike, period: ArrayLike) -> Annotator:
    """P(a preferred) = sigmoid(beta (R_a - R_b) + strength sin(2 pi (R_a - R_b) / period)): no order fits its answers.

    With beta = 0, returns 0, period / 3 and 2 period / 3 are preferred in a circle, each to the one before it and the
    first to the last, which no scalar reward explains (May, Econometrica 22, 1954).

    Args:
        beta: as in `boltzmann_annotator`.
        strength: of the circle, in the log-odds; 0 is `boltzmann_annotator`.
        period: > 0, in units of return.
    """

    def annotate(key: Key, rewards_a: Array, mask_a: Array, rewards_b: Array, mask_b: Array) -> Array:
        difference = segment_returns(rewards_a, mask_a) - segment_returns(rewards_b, mask_b)
        circle = jnp.sin(2.0 * jnp.pi * difference / period)
        return _answer(key, _scaled(beta, difference) + strength * circle)

    return annotate


def noisy_annotator(
    annotator: Annotator, *, flip_probability: ArrayLike = 0.0, tie_threshold: ArrayLike = 0.0
) -> Annotator:
    """An annotator who slips, and cannot tell what is nearly the same.

    Outcome [Q]: a tie where |R_a - R_b| < tie_threshold (which must be above 0 to call equal returns a tie); elsewhere
    the annotator's answer, and with `flip_probability` the opposite one. "Equal" and "Mistake" of arXiv:2111.03026.

    Returns are of the rewards that reach it: put outside a myopic or biased annotator it measures true returns.
    """

    def annotate(key: Key, rewards_a: Array, mask_a: Array, rewards_b: Array, mask_b: Array) -> Array:
        answer_key, flip_key = jax.random.split(key)
        outcome = annotator(answer_key, rewards_a, mask_a, rewards_b, mask_b)
        flipped = jax.random.bernoulli(flip_key, flip_probability, outcome.shape) & (outcome != TIE)
        outcome = jnp.where(flipped, 1 - outcome, outcome)
        difference = segment_returns(rewards_a, mask_a) - segment_returns(rewards_b, mask_b)
        return jnp.where(jnp.abs(difference) < tie_threshold, TIE, outcome)

    return annotate


def biased_annotator(annotator: Annotator, bias: Callable[[Array, Array], Array]) -> Annotator:
    """An annotator who counts something beside the reward: rewards + bias(rewards, mask) at each step, [Q, T].

    Bias by anything else that a step holds comes in with the rewards: see `judged` of `preference_rl`.
    """

    def annotate(key: Key, rewards_a: Array, mask_a: Array, rewards_b: Array, mask_b: Array) -> Array:
        rewards_a, rewards_b = rewards_a + bias(rewards_a, mask_a), rewards_b + bias(rewards_b, mask_b)
        return annotator(key, rewards_a, mask_a, rewards_b, mask_b)

    return annotate


def length_bias(weight: ArrayLike) -> Callable[[Array, Array], Array]:
    """A bias for `biased_annotator`: each real step [Q, T] is worth `weight` more, the return weight * length."""
    return lambda rewards, mask: jnp.where(mask, weight, 0.0).astype(rewards.dtype)


def myopic_annotator(annotator: Annotator, *, discount: ArrayLike) -> Annotator:
    """An annotator who forgets how a segment began: rewards[t] counts discount^(n - 1 - t), n the real steps.

    discount: in [0, 1]; 1 forgets nothing, 0 sees only the last real step. "Myopic" of arXiv:2111.03026, equation 4.
    """
    return _weighted(annotator, lambda left: jnp.asarray(discount) ** left)


def last_steps_annotator(annotator: Annotator, *, count: ArrayLike) -> Annotator:
    """An annotator who sees only the last `count` real steps of each segment [Q, T]."""
    return _weighted(annotator, lambda left: left < count)


def return_scorer(*, noise: ArrayLike = 0.0, scale: ArrayLike = 1.0) -> Scorer:
    """Scores instead of comparisons: `(key, rewards [Q, T], mask [Q, T]) -> scores [Q]`.

    score = scale (R + noise z), z standard normal. noise: a deviation in units of return.
    """

    def score(key: Key, rewards: Array, mask: Array) -> Array:
        returns = segment_returns(rewards, mask)
        return scale * (returns + noise * jax.random.normal(key, returns.shape))

    return score


def _scaled(beta: ArrayLike, difference: Array) -> Array:
    # Infinity times 0 would be NaN, and equal returns are a coin's matter whatever beta is.
    return jnp.where(difference == 0.0, 0.0, beta * jnp.where(difference == 0.0, 1.0, difference))


def _answer(key: Key, log_odds: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, jax.nn.sigmoid(log_odds)), FIRST, SECOND).astype(jnp.int32)


def _weighted(annotator: Annotator, weight: Callable[[Array], Array]) -> Annotator:
    """The annotator with rewards [Q, T] times weight(real steps still to come after this one)."""

    def seen(rewards: Array, mask: Array) -> Array:
        after = jnp.sum(mask, axis=-1, keepdims=True) - jnp.cumsum(mask, axis=-1)
        return jnp.where(mask, rewards * weight(after), 0.0)

    def annotate(key: Key, rewards_a: Array, mask_a: Array, rewards_b: Array, mask_b: Array) -> Array:
        return annotator(key, seen(rewards_a, mask_a), mask_a, seen(rewards_b, mask_b), mask_b)

    return annotate
