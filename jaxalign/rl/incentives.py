"""What a learner is paid for the steps it took, where that is not simply the environment's reward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, Key, Metrics


class Incentive(NamedTuple):
    """Turns steps into the rewards that are learned from, and may itself learn from them.

    init: key -> state, any pytree of arrays
    apply: (state, Steps [T, N, ...], key) -> (state, rewards [T, N], metrics)

    Potential-based shaping, curiosity, Lagrangian costs, scalarised objectives, learned rewards are all of this form;
    `chain` puts several one after another.
    """

    init: Callable[[Key], Any]
    apply: Callable[[Any, Steps, Key], tuple[Any, Array, Metrics]]


def reward_function(reward: Callable[[Steps], Array]) -> Incentive:
    """An Incentive without state: rewards = reward(steps), Steps [T, N, ...] -> [T, N]."""
    return Incentive(lambda key: (), lambda state, steps, key: (state, reward(steps), {}))


def chain(*incentives: Incentive) -> Incentive:
    """Several in turn: each sees the steps with `rewards` [T, N] as the one before it left them.

    Raises ValueError at trace time if two give a metric of the same name.
    """

    def init(key: Key) -> tuple[Any, ...]:
        keys = jax.random.split(key, max(1, len(incentives)))
        return tuple(incentive.init(k) for incentive, k in zip(incentives, keys, strict=False))

    def apply(states: tuple[Any, ...], steps: Steps, key: Key) -> tuple[tuple[Any, ...], Array, Metrics]:
        keys = jax.random.split(key, max(1, len(incentives)))
        after, metrics = [], {}
        for incentive, state, k in zip(incentives, states, keys, strict=False):
            state, rewards, found = incentive.apply(state, steps, k)
            if twice := metrics.keys() & found.keys():
                raise ValueError(f"chain: two incentives give the metric {sorted(twice)[0]!r}")
            steps = steps._replace(rewards=rewards)
            after.append(state)
            metrics |= found
        return tuple(after), steps.rewards, metrics

    return Incentive(init, apply)
