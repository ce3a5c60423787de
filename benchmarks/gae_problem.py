"""The steps that both sides of the gae benchmark work on, and what is right, by NumPy alone.

Nothing of JAX in here, though one of the peers has it.
"""

from typing import Any, NamedTuple

import numpy as np

DISCOUNT, GAE_LAMBDA = 0.99, 0.95


class Steps(NamedTuple):
    """R rollouts, [R, T, N] float32 and bool; `beyond` [R, N] is the value after the last row."""

    rewards: np.ndarray
    values: np.ndarray
    next_values: np.ndarray
    terminated: np.ndarray
    done: np.ndarray
    beyond: np.ndarray


def make_steps(case: dict[str, Any], *, truncation: bool = True) -> Steps:
    """Normal rewards and values; an episode terminates at a step with probability 1 %, and is cut off with as much."""
    rng = np.random.default_rng(case["seed"])
    shape = (case["rollouts"], case["steps"], case["environments"])
    rewards, values, successors = rng.standard_normal((3, *shape), np.float32)
    terminated, cut = rng.random((2, *shape)) < 0.01
    done = terminated | cut if truncation else terminated
    following = np.concatenate([values[:, 1:], successors[:, -1:]], axis=1)
    return Steps(rewards, values, np.where(done, successors, following), terminated, done, successors[:, -1])


def expected_advantages(steps: Steps) -> np.ndarray:
    """[R, T, N], by a loop in float64."""
    rewards, values, next_values = (np.asarray(x, np.float64) for x in steps[:3])
    deltas = rewards + DISCOUNT * ~steps.terminated * next_values - values
    advantages, following = np.zeros_like(deltas), np.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + DISCOUNT * GAE_LAMBDA * ~steps.done[:, t] * following
        advantages[:, t] = following
    return advantages


def max_error(advantages: np.ndarray, steps: Steps) -> float:
    """The largest difference from `expected_advantages`, [R, T, N] both."""
    return float(np.abs(np.asarray(advantages, np.float64) - expected_advantages(steps)).max())
