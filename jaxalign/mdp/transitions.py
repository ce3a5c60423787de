"""Three ways to hold P(s' | s, a): a dense array, a few successors per pair, or the moves of a grid."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, Key


class SparseTransition(NamedTuple):
    """At most K successors of each state and action; unused places have probability 0 (their state must be valid).

    next_state: [S, A, K] int32
    probability: [S, A, K]
    """

    next_state: Array
    probability: Array


@flax.struct.dataclass
class GridTransition:
    """A grid of cells in which every action chooses among the same few moves; a move into a wall or edge stays.

    Holds [A, M] numbers instead of [S, A, S], so that a backup is M shifted copies of the value: 10^6 cells fit.
    Cell (y, x) of a grid [H, W] is state y * W + x. `np.asarray(transition)` is the dense array.

    probability: [A, M], that action a makes move m
    open: bool [H, W], False where there is a wall
    moves: M pairs (down, right), static
    """

    probability: Array
    open: Array
    moves: tuple[tuple[int, int], ...] = flax.struct.field(pytree_node=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[S, A, S], for small grids."""
        return np.array(dense_transition(self), dtype)


Transition = Array | SparseTransition | GridTransition


def num_states_and_actions(transition: Transition) -> tuple[int, int]:
    """(S, A) of P(s' | s, a) in any of its forms, [S, A, S] when dense."""
    if isinstance(transition, GridTransition):
        return transition.open.size, transition.probability.shape[0]
    array = transition.probability if isinstance(transition, SparseTransition) else transition
    return array.shape[0], array.shape[1]


def expected_next(transition: Transition, value: Array) -> Array:
    """E_{s' ~ P(. | s, a)} value[s'] for every state and action: [S] -> [S, A]."""
    if isinstance(transition, SparseTransition):
        return jnp.sum(transition.probability * value[transition.next_state], axis=-1)
    if isinstance(transition, GridTransition):
        return jnp.stack(expected_next_of_actions(transition, value), axis=-1)
    return transition @ value


def expected_next_of_actions(grid: GridTransition, value: Array) -> list[Array]:
    """The columns [S] of `expected_next`, apart: sums of shifted arrays that XLA fuses with what is done to each."""
    moved = [image.reshape(-1) for image in _after_moves(grid, value.reshape(grid.open.shape))]
    return [sum(p * image for p, image in zip(row, moved, strict=True)) for row in grid.probability]


def push_forward(transition: Transition, mass: Array) -> Array:
    """sum_{s, a} mass[s, a] P(s' | s, a): where mass [S, A] goes, [S]; the adjoint of expected_next."""
    state = jax.ShapeDtypeStruct(mass.shape[:1], mass.dtype)
    (after,) = jax.linear_transpose(lambda value: expected_next(transition, value), state)(mass)
    return after


def expected_reward(transition: Transition, reward: Array) -> Array:
    """r(s, a) = sum_{s'} P(s' | s, a) reward[s, a, s'], [S, A, S] -> [S, A]."""
    if isinstance(transition, GridTransition):
        transition = sparse_transition(transition)
    if isinstance(transition, SparseTransition):
        chosen = jnp.take_along_axis(reward, transition.next_state, axis=-1)
        return jnp.sum(transition.probability * chosen, axis=-1)
    return jnp.sum(transition * reward, axis=-1)


def dense_transition(transition: Transition) -> Array:
    """The same transitions as one array [S, A, S]."""
    if not isinstance(transition, SparseTransition | GridTransition):
        return transition
    dtype = transition.probability.dtype
    identity = jnp.eye(num_states_and_actions(transition)[0], dtype=dtype)
    return jax.vmap(lambda value: expected_next(transition, value), out_axes=-1)(identity)


def sparse_transition(transition: Transition) -> SparseTransition:
    """The same transitions as successors [S, A, K]: K moves of a grid, or the most successors of a dense [S, A, S].

    Not for a dense array under jit: K depends on its values.
    """
    if isinstance(transition, SparseTransition):
        return transition
    if not isinstance(transition, GridTransition):
        most = int(jnp.max(jnp.sum(transition > 0.0, axis=-1)))
        probability, next_state = jax.lax.top_k(transition, most)
        return SparseTransition(next_state.astype(jnp.int32), probability)
    height, width = transition.open.shape
    index = jnp.arange(height * width, dtype=jnp.int32).reshape(height, width)
    successors = jnp.stack(_after_moves(transition, index), axis=-1).reshape(height * width, -1)  # [S, M]
    shape = (successors.shape[0], *transition.probability.shape)
    return SparseTransition(
        jnp.broadcast_to(successors[:, None, :], shape), jnp.broadcast_to(transition.probability[None], shape)
    )


def sample_next(key: Key, transition: Transition, state: Array, action: Array) -> Array:
    """One s' ~ P(. | state, action) for scalar int `state` and `action` (vmap for batches [N])."""
    if isinstance(transition, GridTransition):
        move = jax.random.categorical(key, jnp.log(transition.probability[action]))
        height, width = transition.open.shape
        y, x = state // width, state % width
        down, right = jnp.asarray(transition.moves, jnp.int32)[move]
        new_y, new_x = y + down, x + right
        inside = (new_y >= 0) & (new_y < height) & (new_x >= 0) & (new_x < width)
        free = inside & transition.open[jnp.clip(new_y, 0, height - 1), jnp.clip(new_x, 0, width - 1)]
        return jnp.where(free, new_y * width + new_x, state)
    if isinstance(transition, SparseTransition):
        place = jax.random.categorical(key, jnp.log(transition.probability[state, action]))
        return transition.next_state[state, action, place]
    return jax.random.categorical(key, jnp.log(transition[state, action]))


def _after_moves(grid: GridTransition, image: Array) -> list[Array]:
    """image[cell reached by move m] for every cell, one [H, W] per move."""
    height, width = image.shape
    reach = max(max(map(abs, move), default=0) for move in grid.moves)
    padded, free = jnp.pad(image, reach), jnp.pad(grid.open, reach)
    moved = []
    for down, right in grid.moves:
        window = (slice(reach + down, reach + down + height), slice(reach + right, reach + right + width))
        moved.append(image if (down, right) == (0, 0) else jnp.where(free[window], padded[window], image))
    return moved
