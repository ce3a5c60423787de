"""How a policy ranks preference pairs, pair by pair, so that intervals can be put over the pairs."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxalign.preferences.direct_training import PairLogProbs
from jaxalign.types import Array, ArrayLike


class PairScores(NamedTuple):
    """Per pair [...]: what a policy thinks of it. Accuracies are 1 (right), 0 (wrong) or 0.5 (tied).

    prefers_chosen: whether log p(chosen) > log p(rejected), summed over tokens
    prefers_chosen_per_token: the same of the means per token, which do not favour short answers
    reward_accuracy: whether the implicit reward prefers the chosen answer
    reward_margin: beta (log-ratio of chosen - log-ratio of rejected), nats times beta
    chosen_displacement: log p(chosen) minus its reference value, nats
    """

    prefers_chosen: Array
    prefers_chosen_per_token: Array
    reward_accuracy: Array
    reward_margin: Array
    chosen_displacement: Array


def score_pairs(policy: PairLogProbs, reference: PairLogProbs, *, beta: ArrayLike) -> PairScores:
    """Compare a policy's log-probabilities with a reference's on the same pairs; all fields [...] alike.

    Scoring the reference against itself gives reward_accuracy 0.5 throughout: an untuned policy has no implicit reward.
    """
    margin = beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    chosen_mean = policy.chosen / jnp.maximum(policy.chosen_lengths, 1)
    rejected_mean = policy.rejected / jnp.maximum(policy.rejected_lengths, 1)
    return PairScores(
        prefers_chosen=_above(policy.chosen - policy.rejected),
        prefers_chosen_per_token=_above(chosen_mean - rejected_mean),
        reward_accuracy=_above(margin),
        reward_margin=margin,
        chosen_displacement=policy.chosen - reference.chosen,
    )


def _above(difference: Array) -> Array:
    return jnp.heaviside(difference, 0.5)
