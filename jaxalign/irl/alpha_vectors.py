"""Exact finite-horizon plans of assistance games: all alpha vectors that are best at some belief.

Runs on the host in float64: how many vectors survive is known only once they are computed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.irl.assistance import AssistanceGame, AssistancePlan, PedagogicHuman, human_response
from jaxalign.types import Array

TOLERANCE = 1e-8  # relative to the largest entry; what a linear program tells apart


class Vectors(NamedTuple):
    """alpha: [N, K]; action: [N], the robot's; nodes: [N, H, S], the next vector after each human action and state."""

    alpha: np.ndarray
    action: np.ndarray
    nodes: np.ndarray


def exact_plan(
    game: AssistanceGame, *, horizon: int, human: Array | PedagogicHuman, max_vectors: int
) -> AssistancePlan:
    """The best plan for `horizon` steps by incremental pruning; N is the most vectors any state and step needs.

    For a robot plan (an action, and the next vector for each human action and state), with q[k, h] the return to come:
        alpha[k] = sum_h policy[k, h] q[k, h]   if the human's policy [K, S, H] is fixed (Cassandra et al. 1997)
        alpha[k] = max_h q[k, h]                if the human plans too: the generalised Bellman update of Malik et al.
            (2018), arXiv:1806.03820.
    Both are built action by action, and a partial vector best at no belief is dropped: for the maximum too this loses
    nothing, as under any decision rule the part for h is worth a linear function of the belief in those who choose h.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((game, human))):
        raise ValueError("solve_assistance: the exact solver needs concrete arrays; under jit or vmap give `beliefs`")
    if isinstance(human, PedagogicHuman) and not np.isposinf(np.asarray(human.beta)):
        raise ValueError(f"solve_assistance: beta {human.beta} of a pedagogic human is finite; give `beliefs`")
    fixed = None if isinstance(human, PedagogicHuman) else np.asarray(human, np.float64)
    arrays = jax.tree.map(lambda x: np.asarray(x, None if x.dtype == bool else np.float64), game)
    states, human_actions = arrays.transition.shape[:2]
    nothing = Vectors(np.zeros((1, arrays.prior.size)), np.zeros(1, int), np.zeros((1, human_actions, states), int))
    after, steps = [nothing] * states, []
    for _ in range(horizon):
        after = [
            nothing if arrays.terminal[s] else _state_backup(arrays, fixed, after, s, max_vectors)
            for s in range(states)
        ]
        steps.append(after)
    # What the human does at each node, and so its worth, follows from the robot's part.
    return human_response(game, _robot_part(game, arrays.prior, steps[::-1]), human)


def _state_backup(
    game: AssistanceGame, human: np.ndarray | None, after: list[Vectors], state: int, max_vectors: int
) -> Vectors:
    _, human_actions, robot_actions, _ = game.transition.shape
    combine = np.maximum if human is None else np.add
    found = []
    for robot in range(robot_actions):
        parts = [_after_human_action(game, after, state, h, robot, max_vectors) for h in range(human_actions)]
        if human is not None:
            parts = [_pruned(part._replace(alpha=part.alpha * human[:, state, h])) for h, part in enumerate(parts)]
        total = functools.reduce(lambda one, other: _combined(one, other, combine, max_vectors), parts)
        found.append(total._replace(action=np.full(len(total.alpha), robot)))
    return _pruned(Vectors(*(np.concatenate(column) for column in zip(*found, strict=True))))


def _after_human_action(
    game: AssistanceGame, after: list[Vectors], state: int, human: int, robot: int, max_vectors: int
) -> Vectors:
    """q[k, human] for every choice of next vectors: r + discount sum_{s'} P(s') alpha_{s'}, built state by state."""
    _, states, human_actions, _ = game.reward.shape
    nodes = np.zeros((1, human_actions, states), int)
    earned = np.asarray(game.reward[:, state, human, robot])[None]
    total = Vectors(earned, np.zeros(1, int), nodes)
    for successor in np.flatnonzero((game.transition[state, human, robot] > 0.0) & ~game.terminal):
        weight = float(game.discount * game.transition[state, human, robot, successor])
        options = len(after[successor].alpha)
        choice = np.zeros((options, human_actions, states), int)
        choice[:, human, successor] = np.arange(options)
        part = Vectors(weight * after[successor].alpha, np.zeros(options, int), choice)
        total = _combined(total, part, np.add, max_vectors)
    return total


def _combined(one: Vectors, other: Vectors, combine: np.ufunc, max_vectors: int) -> Vectors:
    """Every vector of the one with every vector of the other; each node is chosen by one of the two only."""
    num = len(one.alpha) * len(other.alpha)
    if num > max_vectors:
        raise ValueError(
            f"solve_assistance: the exact solver needs {num} vectors at once, more than max_vectors={max_vectors}; "
            "give `beliefs` for a point-based plan, or a shorter horizon"
        )
    alpha = combine(one.alpha[:, None], other.alpha[None])
    nodes = one.nodes[:, None] + other.nodes[None]
    return _pruned(Vectors(alpha.reshape(num, -1), np.zeros(num, int), nodes.reshape(num, *nodes.shape[2:])))


def _pruned(vectors: Vectors) -> Vectors:
    keep = undominated(vectors.alpha)
    return Vectors(*(column[keep] for column in vectors))


def undominated(alpha: np.ndarray) -> np.ndarray:
    """Indices of the vectors [N, K] that are best at some belief by more than a rounding error, in ascending order.

    A vector worse than another everywhere is dropped at once; each of the others must win a linear program against
    those kept (Lark's filter; White 1991). Of equal vectors the first stays.
    """
    tolerance = TOLERANCE * max(1.0, float(np.abs(alpha).max()))
    order = np.argsort(-alpha.sum(axis=1), kind="stable")
    candidates: list[int] = []
    for i in order:
        # Only a vector of at least the same sum can dominate.
        if not (alpha[candidates] >= alpha[i] - tolerance).all(axis=1).any():
            candidates.append(int(i))
    if len(candidates) == 1 or alpha.shape[1] == 1:
        return np.array(candidates[:1])
    kept: list[int] = []
    corners = {candidates[int(np.argmax(alpha[candidates, k]))] for k in range(alpha.shape[1])}
    for i in corners:
        kept.append(i)
        candidates.remove(i)
    while candidates:
        belief = _where_best(alpha[candidates[0]], alpha[kept], tolerance)
        if belief is None:
            candidates.pop(0)
        else:
            # The best of all there is certain to be needed; the one tested may not be.
            kept.append(candidates.pop(int(np.argmax(alpha[candidates] @ belief))))
    return np.sort(kept)


def _where_best(vector: np.ndarray, others: np.ndarray, tolerance: float) -> np.ndarray | None:
    """A belief at which the vector [K] beats all others [N, K] by the most; None if by no more than the tolerance."""
    from scipy.optimize import linprog  # slow to import, and needed here only

    hypotheses = vector.size
    # Maximise d over (belief, d) with belief @ (others - vector) + d <= 0.
    gain = np.append(np.zeros(hypotheses), -1.0)
    rows, limits = np.hstack([others - vector, np.ones((len(others), 1))]), np.zeros(len(others))
    sums = np.append(np.ones(hypotheses), 0.0)[None]
    bounds = [(0.0, None)] * hypotheses + [(None, None)]
    solved = linprog(gain, A_ub=rows, b_ub=limits, A_eq=sums, b_eq=[1.0], bounds=bounds)
    if not solved.success:
        raise RuntimeError(f"solve_assistance: the linear program of the pruning failed: {solved.message}")
    return solved.x[:-1] if solved.x[-1] > tolerance else None


def _robot_part(game: AssistanceGame, prior: np.ndarray, steps: list[list[Vectors]]) -> AssistancePlan:
    """The graph as arrays, value and human policy left 0; short lists are filled up by their first vector."""
    width = max(len(vectors.alpha) for step in steps for vectors in step)
    fill = lambda x: np.concatenate([x, np.repeat(x[:1], width - len(x), axis=0)])  # noqa: E731
    alpha, action, nodes = (np.stack([[fill(vectors[i]) for vectors in step] for step in steps]) for i in range(3))
    dtype = game.reward.dtype
    return AssistancePlan(
        value=jnp.zeros((), dtype),
        start=jnp.asarray((alpha[0] @ prior).argmax(axis=1), jnp.int32),
        alpha=jnp.asarray(alpha, dtype),
        robot_action=jnp.asarray(action, jnp.int32),
        human_policy=jnp.zeros((*alpha.shape, game.reward.shape[2]), dtype),
        successor=jnp.asarray(nodes, jnp.int32),
    )
