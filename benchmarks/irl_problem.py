"""The inverse problem that both sides of the irl benchmark solve, made from a seed by NumPy alone, in float64.

Nothing of JAX in here: the peer's environment has none.
"""

from typing import Any, NamedTuple

import numpy as np

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))  # (down, right) of up, right, down, left, stay


class Problem(NamedTuple):
    """An undiscounted MDP of H steps, a linear reward, and how often its soft-optimal policy is where.

    next_state, probability: [S, A, K], the successors of each pair and their probabilities
    initial: [S]
    features: [S, F]
    reward: [S], features @ weights
    expert: [H, S, A], Pr(s_t = s, a_t = a) under the maximum causal entropy policy of `reward`
    final: [S], where that policy is after the last step
    """

    next_state: np.ndarray
    probability: np.ndarray
    initial: np.ndarray
    features: np.ndarray
    reward: np.ndarray
    expert: np.ndarray
    final: np.ndarray


def make_problem(case: dict[str, Any]) -> Problem:
    """The problem of a case: a random MDP with `branching` successors of each pair, or a grid `height` x `width`."""
    rng = np.random.default_rng(case["seed"])
    make = _grid if "height" in case else _random
    next_state, probability = make(rng, case)
    states = next_state.shape[0]
    features = rng.standard_normal((states, case["features"]))
    reward = features @ rng.standard_normal(case["features"]) / case["features"] ** 0.5  # about N(0, 1)
    initial = np.full(states, 1.0 / states)
    problem = Problem(next_state, probability, initial, features, reward, np.empty(0), np.empty(0))
    policy = _plan(problem, reward, case["horizon"], _softmax)
    expert, final = _visits(problem, policy)
    return problem._replace(expert=expert, final=final)


def dense(problem: Problem) -> np.ndarray:
    """P(s' | s, a) as [S, A, S]."""
    states, actions, _ = problem.next_state.shape
    out = np.zeros((states, actions, states))
    pair = np.indices(problem.next_state.shape)
    np.add.at(out, (pair[0], pair[1], problem.next_state), problem.probability)
    return out


def relative_value_difference(problem: Problem, weights: np.ndarray) -> float:
    """How much of the true reward is lost by planning with a learned one: 0 nothing, 1 as much as acting at random.

    (J(best) - J(learned)) / (J(best) - J(uniform)), J the expected sum of the true reward over H steps, "best" and
    "learned" the greedy optimal policies of the true reward and of features @ weights.
    """
    horizon = problem.expert.shape[0]
    rewards = problem.reward, problem.features @ weights
    plans = [_plan(problem, reward, horizon, _greedy) for reward in rewards]
    uniform = np.full_like(plans[0], 1.0 / plans[0].shape[-1])
    best, learned, random = (_return(problem, policy) for policy in (*plans, uniform))
    return (best - learned) / (best - random)


def summarise(problem: Problem, weights: list[np.ndarray], threshold: float, seconds: float) -> dict[str, Any]:
    """Quality of a fit from its weights after each iteration [F], an iteration taking `seconds`.

    The value difference in the end, and when it fell below the threshold to stay there (None: it did not).
    """
    reached = [relative_value_difference(problem, w) for w in weights]
    settled = 1 + max((i + 1 for i, value in enumerate(reached) if value > threshold), default=0)
    within = settled <= len(reached)
    return {
        "relative_evd": reached[-1],
        "iterations_to_threshold": settled if within else None,
        "seconds_to_threshold": settled * seconds if within else None,
    }


def _random(rng: np.random.Generator, case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    states, actions, branching = case["states"], case["actions"], case["branching"]
    chosen = [rng.choice(states, branching, replace=False) for _ in range(states * actions)]
    probability = rng.dirichlet(np.ones(branching), (states, actions))
    return np.reshape(chosen, (states, actions, branching)), probability


def _grid(_: np.random.Generator, case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The gridworld of `jaxalign.mdp.gridworld`: one of the four moves at random with probability `slip`."""
    height, width = case["height"], case["width"]
    y, x = np.divmod(np.arange(height * width), width)
    inside = [(np.clip(y + down, 0, height - 1), np.clip(x + right, 0, width - 1)) for down, right in MOVES]
    reached = np.stack([new_y * width + new_x for new_y, new_x in inside], axis=-1)  # [S, M]
    chance = (1.0 - case["slip"]) * np.eye(5) + case["slip"] * np.array([0.25, 0.25, 0.25, 0.25, 0.0])
    shape = (height * width, 5, 5)
    return np.broadcast_to(reached[:, None, :], shape).copy(), np.broadcast_to(chance, shape).copy()


def _softmax(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value [S], policy [S, A]) of maximum causal entropy at temperature 1."""
    top = q.max(axis=-1, keepdims=True)
    weight = np.exp(q - top)
    total = weight.sum(axis=-1, keepdims=True)
    return (top + np.log(total))[:, 0], weight / total


def _greedy(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value [S], policy [S, A]) of the best action."""
    return q.max(axis=-1), np.eye(q.shape[-1])[q.argmax(axis=-1)]


def _plan(problem: Problem, reward: np.ndarray, horizon: int, maximum: Any) -> np.ndarray:
    """The policy [H, S, A] of a state reward [S]."""
    value, policies = np.zeros_like(reward), []
    for _ in range(horizon):
        value, policy = maximum(reward[:, None] + _expected_next(problem, value))
        policies.append(policy)
    return np.stack(policies[::-1])


def _visits(problem: Problem, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Pr(s_t = s, a_t = a) [H, S, A], Pr(s_H = s) [S]) of a policy [H, S, A]."""
    mass, taken = problem.initial, []
    for now in policy:
        taken.append(mass[:, None] * now)
        arriving = (taken[-1][:, :, None] * problem.probability).reshape(-1)
        mass = np.bincount(problem.next_state.reshape(-1), arriving, minlength=mass.size)
    return np.stack(taken), mass


def _return(problem: Problem, policy: np.ndarray) -> float:
    value = np.zeros_like(problem.reward)
    for now in policy[::-1]:
        value = problem.reward + (now * _expected_next(problem, value)).sum(axis=-1)
    return float(problem.initial @ value)


def _expected_next(problem: Problem, value: np.ndarray) -> np.ndarray:
    return (problem.probability * value[problem.next_state]).sum(axis=-1)
