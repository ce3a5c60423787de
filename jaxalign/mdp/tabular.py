"""Finite Markov decision processes, checked when they are made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp.checked_record import CheckedRecord, check_rows, traced
from jaxalign.mdp.transitions import (
    GridTransition,
    SparseTransition,
    Transition,
    expected_next,
    expected_reward,
    num_states_and_actions,
)
from jaxalign.types import Array, ArrayLike, Key


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class TabularMDP(CheckedRecord):
    """A finite MDP. A pytree: vmap, jit and checkpoint it as it is.

    transition: P(s' | s, a) as [S, A, S], SparseTransition or GridTransition
    initial: [S], probabilities of the first state
    terminal: bool [S]; an episode ends on entering a terminal state: nothing is earned and no action taken there, so
        its value is 0. To reward reaching a state, give the reward as [S, A, S] or use `arrival_reward`.
    discount: scalar in [0, 1]

    Raises ValueError naming the argument where shapes disagree and, outside jit, where a row of `transition` or
    `initial` is negative or does not sum to 1, a successor is out of range, or `discount` is outside [0, 1].
    """

    transition: Transition
    initial: Array
    terminal: Array
    discount: Array

    def __init__(
        self, transition: Any, initial: ArrayLike, terminal: ArrayLike, discount: ArrayLike
    ) -> None:
        transition = jax.tree.map(jnp.asarray, transition)
        if isinstance(transition, jax.Array) and (transition.ndim != 3 or transition.shape[0] != transition.shape[2]):
            raise ValueError(f"TabularMDP: transition must be [S, A, S], got {transition.shape}")
        initial, discount = (jnp.asarray(x) for x in (initial, discount))
        # One dtype throughout: a loop cannot carry values that a wider transition would widen.
        probability = transition if isinstance(transition, jax.Array) else transition.probability
        dtype = jnp.promote_types(probability.dtype, initial.dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.zeros(()).dtype
        transition = _with_probability(transition, probability.astype(dtype))
        self._set(transition, initial.astype(dtype), jnp.asarray(terminal), discount.astype(dtype))
        _check(self)

    @property
    def num_states(self) -> int:
        """S."""
        return num_states_and_actions(self.transition)[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return num_states_and_actions(self.transition)[1]


def action_reward(mdp: TabularMDP, reward: ArrayLike) -> Array:
    """`reward` [S], [S, A] or [S, A, S] as the expected reward of each state and action, [S, A]; 0 in terminal states.

    Raises ValueError naming `reward` and its shape if it is none of the three.
    """
    reward = jnp.asarray(reward)
    states, actions = mdp.num_states, mdp.num_actions
    wanted = {1: (states,), 2: (states, actions), 3: (states, actions, states)}
    if reward.shape != wanted.get(reward.ndim):
        raise ValueError(f"reward must be [S], [S, A] or [S, A, S] with S={states}, A={actions}, got {reward.shape}")
    reward = reward.astype(jnp.promote_types(reward.dtype, mdp.initial.dtype))
    if reward.ndim == 1:
        reward = jnp.broadcast_to(reward[:, None], (states, actions))
    elif reward.ndim == 3:
        reward = expected_reward(mdp.transition, reward)
    return jnp.where(mdp.terminal[:, None], 0.0, reward)


def arrival_reward(mdp: TabularMDP, reward: Array) -> Array:
    """Pay reward[s'] for entering s': r(s, a) = E_{s' ~ P(. | s, a)} reward[s'], [S] -> [S, A]; 0 in terminals."""
    return jnp.where(mdp.terminal[:, None], 0.0, expected_next(mdp.transition, reward))


def random_mdp(
    key: Key, num_states: int, num_actions: int, *, branching: int | None = None, discount: ArrayLike = 0.9
) -> TabularMDP:
    """A random MDP without terminal states: P(. | s, a) ~ Dirichlet(1) over all states, or over `branching` of them.

    With `branching` K the transition is a SparseTransition [S, A, K] (successors distinct), else an array [S, A, S].
    Starts in any state with equal probability. Raises ValueError if `branching` is not in 1..num_states.
    """
    successors_key, probability_key = jax.random.split(key)
    width = num_states if branching is None else branching
    if not 1 <= width <= num_states:
        raise ValueError(f"random_mdp: branching must be in 1..{num_states}, got {branching}")
    probability = jax.random.dirichlet(probability_key, jnp.ones(width), (num_states, num_actions))
    transition: Transition = probability
    if branching is not None:
        keys = jax.random.split(successors_key, (num_states, num_actions))
        successors = jax.vmap(jax.vmap(lambda k: jax.random.choice(k, num_states, (branching,), replace=False)))(keys)
        transition = SparseTransition(successors.astype(jnp.int32), probability)
    initial = jnp.full(num_states, 1.0 / num_states)
    return TabularMDP(transition, initial, jnp.zeros(num_states, bool), discount)


def _with_probability(transition: Transition, probability: Array) -> Transition:
    if isinstance(transition, SparseTransition):
        return transition._replace(probability=probability)
    return transition.replace(probability=probability) if isinstance(transition, GridTransition) else probability


def _check(mdp: TabularMDP) -> None:
    states = mdp.num_states
    for name, shape in (("initial", (states,)), ("terminal", (states,)), ("discount", ())):
        if getattr(mdp, name).shape != shape:
            raise ValueError(f"TabularMDP: {name} must be {list(shape)}, got {getattr(mdp, name).shape}")
    if mdp.terminal.dtype != bool:
        raise ValueError(f"TabularMDP: terminal must be bool, got {mdp.terminal.dtype}")
    if isinstance(mdp.transition, SparseTransition):
        _check_successors(mdp.transition, states)
    probability = mdp.transition if isinstance(mdp.transition, jax.Array) else mdp.transition.probability
    check_rows("TabularMDP: transition", probability)
    check_rows("TabularMDP: initial", mdp.initial)
    if isinstance(mdp.transition, GridTransition):
        _check_grid(mdp.transition)
    if not traced(mdp.discount) and not 0.0 <= float(mdp.discount) <= 1.0:
        raise ValueError(f"TabularMDP: discount must be in [0, 1], got {float(mdp.discount)}")


def _check_successors(transition: SparseTransition, states: int) -> None:
    next_state, probability = transition
    if next_state.ndim != 3 or next_state.shape != probability.shape or next_state.shape[0] != states:
        raise ValueError(
            "TabularMDP: transition.next_state and transition.probability must both be [S, A, K], "
            f"got {next_state.shape} and {probability.shape}"
        )
    if not jnp.issubdtype(next_state.dtype, jnp.integer):
        raise ValueError(f"TabularMDP: transition.next_state must be integers, got {next_state.dtype}")
    if not traced(next_state) and ((wrong := np.asarray(next_state)) < 0).any() | (wrong >= states).any():
        at = np.argwhere((wrong < 0) | (wrong >= states))[0]
        found = wrong[tuple(at)]
        raise ValueError(f"TabularMDP: transition.next_state{at.tolist()} is {found}, not in 0..{states - 1}")


def _check_grid(grid: GridTransition) -> None:
    if grid.open.ndim != 2 or grid.probability.ndim != 2 or grid.probability.shape[1] != len(grid.moves):
        raise ValueError(
            f"TabularMDP: a grid needs open [H, W] and probability [A, {len(grid.moves)}], "
            f"got {grid.open.shape} and {grid.probability.shape}"
        )
