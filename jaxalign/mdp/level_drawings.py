"""Gridworlds drawn as text: the cells, the moves, and the MDP of all states that can come about."""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp.gridworlds import MOVES
from jaxalign.mdp.tabular import TabularMDP
from jaxalign.mdp.transitions import SparseTransition
from jaxalign.types import Array, ArrayLike

Cell = tuple[int, int]


class State(NamedTuple):
    """What a state stands for. agent: its cell (y, x); box: the box's cell, or None; flag: what else is the case."""

    agent: Cell
    box: Cell | None = None
    flag: str = ""


@flax.struct.dataclass
class SafetyGridworld:
    """A world whose agent is paid `reward` and judged by `performance`.

    mdp: TabularMDP; actions up, right, down, left (and stay, if there are five); sparse transitions
    reward: [S, A]
    performance: [S, A]
    states: S State records in the order of the MDP's states; static
    """

    mdp: TabularMDP
    reward: Array
    performance: Array
    states: tuple[State, ...] = flax.struct.field(pytree_node=False)


class Outcome(NamedTuple):
    """One way in which an action can end."""

    state: State
    reward: float
    performance: float
    probability: float = 1.0


Act = Callable[[State, int], list[Outcome]]


def read_level(art: str) -> np.ndarray:
    """A drawing as characters [H, W]."""
    return np.array([list(line) for line in art.split()])


def find_mark(level: np.ndarray, mark: str) -> Cell:
    """The cell that has this mark in `level` [H, W]."""
    ((y, x),) = np.argwhere(level == mark)
    return int(y), int(x)


def move(level: np.ndarray, cell: Cell, action: int) -> Cell:
    """The next cell of `level` [H, W] that way, or the same one if it is a wall."""
    after = cell[0] + MOVES[action][0], cell[1] + MOVES[action][1]
    return cell if level[after] == "#" else after


def push(level: np.ndarray, agent: Cell, box: Cell | None, action: int) -> tuple[Cell, Cell | None]:
    """Where agent and box are after the agent moved, with the box before it if nothing stops that; `level` [H, W]."""
    after = move(level, agent, action)
    if box is None or after != box:
        return after, box
    pushed = move(level, box, action)
    return (agent, box) if pushed == box else (after, pushed)


def in_corner(level: np.ndarray, cell: Cell) -> bool:
    """Whether walls of `level` [H, W] meet at the cell, so that a box there cannot be pushed out."""
    wall, (y, x) = level == "#", cell
    return bool((wall[y - 1, x] or wall[y + 1, x]) and (wall[y, x - 1] or wall[y, x + 1]))


def enumerate_states(
    starts: dict[State, float],
    act: Act,
    ended: Callable[[State], bool],
    discount: ArrayLike,
    *,
    num_actions: int = 4,
) -> SafetyGridworld:
    """The MDP of all S states that can be reached from `starts` (with their probabilities), reward [S, A]."""
    index = {state: i for i, state in enumerate(starts)}
    states, rows = list(starts), []
    for state in states:  # grows on the way
        stay = [[Outcome(state, 0.0, 0.0)]] * num_actions
        rows.append(stay if ended(state) else [act(state, action) for action in range(num_actions)])
        for outcome in (outcome for outcomes in rows[-1] for outcome in outcomes):
            if outcome.state not in index:
                index[outcome.state] = len(states)
                states.append(outcome.state)
    width = max(len(outcomes) for row in rows for outcomes in row)
    next_state = np.zeros((len(states), num_actions, width), np.int32)
    probability, reward, performance = np.zeros((3, *next_state.shape))
    for s, row in enumerate(rows):
        for a, outcomes in enumerate(row):
            for k, outcome in enumerate(outcomes):
                next_state[s, a, k], probability[s, a, k] = index[outcome.state], outcome.probability
                reward[s, a, k], performance[s, a, k] = outcome.reward, outcome.performance
    initial = [starts.get(state, 0.0) for state in states]
    terminal = np.array([bool(ended(state)) for state in states])
    mdp = TabularMDP(SparseTransition(next_state, probability), np.array(initial), terminal, discount)
    expected_reward, expected_performance = (jnp.asarray((probability * x).sum(-1)) for x in (reward, performance))
    return SafetyGridworld(mdp, expected_reward, expected_performance, tuple(states))
