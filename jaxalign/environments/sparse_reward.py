"""Worlds whose only reward is far away, so that what acts at random never sees it: tests of exploration."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, valid_action
from jaxalign.environments.wrappers import time_limit
from jaxalign.types import Array, ArrayLike, Key


class DeepSeaState(NamedTuple):
    """row, column: [] int32; the row is how many steps were taken."""

    row: Array
    column: Array


def deep_sea(size: int, *, move_cost: ArrayLike = 0.01, right: ArrayLike | None = None) -> Environment:
    """A diver sinks one row a step through a size x size grid N x N and drifts a column left or right.

    Moving right costs move_cost / N; moving right in the last row of the last column pays 1 more. Only N moves to the
    right give a return above 0, 1 - move_cost; uniformly random actions do so once in 2^N episodes, and less often
    once the cost of moving right is learned. Every episode terminates after N steps.

    Args:
        right: bool [N, N], whether it is action 1 that moves right in a cell, else action 0; None: 1 everywhere. Random
            entries keep a network from getting there by always doing the same.

    Observes [N, N], 1 in the diver's cell; all 0 at the end. Raises ValueError if `right` has another shape.
    Osband et al., arXiv:1908.03568, "deep sea" (deterministic).
    """
    goes_right = jnp.ones((size, size), bool) if right is None else jnp.asarray(right, bool)
    if goes_right.shape != (size, size):
        raise ValueError(f"deep_sea: right must be {(size, size)}, got {goes_right.shape}")
    actions = Discrete(2)

    def observe(state: DeepSeaState) -> Array:
        return jnp.zeros((size, size)).at[state.row, state.column].set(1.0, mode="drop")

    def reset(key: Key) -> tuple[Array, DeepSeaState]:
        state = DeepSeaState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        return observe(state), state

    def step(key: Key, state: DeepSeaState, action: Array) -> TimeStep:
        valid = valid_action("deep_sea", actions, action)
        moves = (jnp.asarray(action) == 1) == goes_right[state.row, state.column]
        found = moves & (state.column == size - 1) & (state.row == size - 1)
        reward = jnp.where(found, 1.0, 0.0) - jnp.where(moves, move_cost / size, 0.0)
        new = DeepSeaState(state.row + 1, jnp.clip(state.column + jnp.where(moves, 1, -1), 0, size - 1))
        reward = jnp.where(valid, reward, jnp.nan).astype(float)
        return TimeStep(observe(new), new, reward, new.row >= size, jnp.zeros((), bool), {})

    return Environment(reset, step, Box(0.0, 1.0, (size, size)), actions, "deep_sea")


class KeyDoorState(NamedTuple):
    """position: [] int32, the cell; has_key: [] bool."""

    position: Array
    has_key: Array


def key_door(length: int, *, max_steps: ArrayLike | None = None) -> Environment:
    """A corridor of L = length cells with a key at the left end and a locked door at the right; begins in the middle.

    Actions: 0 left, 1 right. Coming to the door with the key pays 1 and terminates; nothing else pays. The shortest way
    takes L // 2 + L - 1 steps; truncates after max_steps (None: 3 L), in which a random walk of more than some 30 cells
    practically never fetches the key and comes back. Observes [2, L], 1 at (has key, cell).
    Raises ValueError for fewer than 3 cells.
    """
    if length < 3:
        raise ValueError(f"key_door: length must be at least 3, got {length}")
    actions = Discrete(2)

    def observe(state: KeyDoorState) -> Array:
        return jnp.zeros((2, length)).at[state.has_key.astype(jnp.int32), state.position].set(1.0)

    def reset(key: Key) -> tuple[Array, KeyDoorState]:
        state = KeyDoorState(jnp.asarray(length // 2, jnp.int32), jnp.zeros((), bool))
        return observe(state), state

    def step(key: Key, state: KeyDoorState, action: Array) -> TimeStep:
        valid = valid_action("key_door", actions, action)
        position = jnp.clip(state.position + jnp.where(jnp.asarray(action) == 1, 1, -1), 0, length - 1)
        new = KeyDoorState(position, state.has_key | (position == 0))
        opened = new.has_key & (position == length - 1)
        reward = jnp.where(valid, opened.astype(float), jnp.nan)
        return TimeStep(observe(new), new, reward, opened, jnp.zeros((), bool), {})

    environment = Environment(reset, step, Box(0.0, 1.0, (2, length)), actions, "key_door")
    return time_limit(environment, 3 * length if max_steps is None else max_steps)
