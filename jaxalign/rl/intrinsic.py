"""Intrinsic motivation: a learner paid for what is new to it, besides what its environment pays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics


class IntrinsicReward(NamedTuple):
    """An Incentive (init, apply) that can also be asked what it finds new.

    init: key -> state
    apply: (state, Steps [T, N, ...], key) -> (state, rewards [T, N], metrics), with
        rewards = steps.rewards + coefficient * bonus, bonus as it was before the state learned from these steps
    bonus: (state, x) -> [...], of any x as the state stands, learning nothing; each kind says what its x is

    `random_network_distillation`, `intrinsic_curiosity` and `visit_counts` make one. A learner with one value function
    takes the bonus as any other reward: with the same discount, and with nothing to come after a terminal state.
    """

    init: Callable[[Key], Any]
    apply: Callable[[Any, Steps, Key], tuple[Any, Array, Metrics]]
    bonus: Callable[[Any, Any], Array]


def intrinsic_reward(
    init: Callable[[Key], Any],
    bonus: Callable[[Any, Any], Array],
    learn: Callable[[Any, Steps, Key], tuple[Any, Array, Metrics]],
    *,
    coefficient: ArrayLike,
    name: str,
) -> IntrinsicReward:
    """An IntrinsicReward from what is special to it.

    learn: (state, steps, key) -> (state, the bonus of the steps [T, N], metrics), the bonus from before it learned

    The metric "intrinsic/<name>_bonus" is the mean bonus, before the coefficient.
    """

    def apply(state: Any, steps: Steps, key: Key) -> tuple[Any, Array, Metrics]:
        state, new, metrics = learn(state, steps, key)
        new = new.astype(steps.rewards.dtype)
        return state, steps.rewards + coefficient * new, {f"intrinsic/{name}_bonus": jnp.mean(new), **metrics}

    return IntrinsicReward(init, apply, bonus)
