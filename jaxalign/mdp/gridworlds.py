"""Gridworlds: plain, with a cliff, and Objectworld. Cell (y, x) of a grid [H, W] is state y * W + x."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp.tabular import TabularMDP
from jaxalign.mdp.transitions import GridTransition
from jaxalign.types import Array, ArrayLike, Key

UP, RIGHT, DOWN, LEFT, STAY = range(5)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))  # (down, right) of each action


def gridworld(
    height: int,
    width: int,
    *,
    slip: ArrayLike = 0.0,
    discount: ArrayLike = 0.9,
    goal: tuple[int, int] | int | None = None,
    start: tuple[int, int] | int | None = None,
    walls: Array | None = None,
    stay: bool = True,
) -> TabularMDP:
    """A grid of height x width cells with actions up, right, down, left and (unless `stay` is False) stay.

    Moving into an edge or a wall stays. The transition is a GridTransition: nothing of size S x S is held.

    Args:
        slip: probability that the action taken is instead one of the four moves drawn uniformly.
        goal: a cell (y, x) or state that is terminal, or None.
        start: where episodes begin; None: any open cell but the goal, uniformly.
        walls: bool [H, W], or None.

    Raises ValueError naming a cell that is outside the grid or in a wall, or `slip` outside [0, 1].
    """
    free = np.ones((height, width), bool) if walls is None else ~np.asarray(walls, bool)
    if free.shape != (height, width):
        raise ValueError(f"gridworld: walls must be {(height, width)}, got {free.shape}")
    if not isinstance(slip, jax.core.Tracer) and not 0.0 <= float(slip) <= 1.0:
        raise ValueError(f"gridworld: slip must be in [0, 1], got {slip}")
    actions = 5 if stay else 4
    # Slipping is a fifth move only if staying is an action: blocked moves stay of themselves.
    intended = jnp.eye(actions)
    uniform = jnp.zeros((actions, actions)).at[:, :4].set(0.25)
    transition = GridTransition((1.0 - slip) * intended + slip * uniform, jnp.asarray(free), MOVES[:actions])
    terminal = np.zeros(height * width, bool)
    if goal is not None:
        terminal[_state("goal", goal, free)] = True
    begins = free.reshape(-1) & ~terminal
    if start is not None:
        begins = np.arange(height * width) == _state("start", start, free)
    if not begins.any():
        raise ValueError("gridworld: no open cell is left to start from")
    return TabularMDP(transition, jnp.asarray(begins / begins.sum(), jnp.float32), jnp.asarray(terminal), discount)


def cliff(height: int = 4, width: int = 12, *, slip: ArrayLike = 0.0, discount: ArrayLike = 0.99) -> TabularMDP:
    """Cliff walking (Sutton & Barto 2018, example 6.6): start bottom left, goal bottom right, cliff cells between.

    H x W cells, S = height * width. Goal and cliff are terminal; `cliff_reward` [S] is what arriving pays.
    """
    mdp = gridworld(height, width, slip=slip, discount=discount, start=(height - 1, 0), stay=False)
    terminal = jnp.zeros((height, width), bool).at[-1, 1:].set(True).reshape(-1)
    return mdp.replace(terminal=terminal)


def cliff_reward(height: int = 4, width: int = 12, *, step: float = -1.0, fall: float = -100.0) -> Array:
    """What arriving in each cell pays, [S] (for `arrival_reward`): `step`, or `fall` on the cliff."""
    return jnp.full((height, width), step).at[-1, 1:-1].set(fall).reshape(-1)


class Objectworld(NamedTuple):
    """Levine et al. (2011): a grid with coloured objects; the reward is a nonlinear function of the distances to them.

    mdp: TabularMDP
    features: [S, 2 C], the distance to the nearest object of each outer and of each inner colour, over the diagonal
    reward: [S], +1 near outer colours 0 and 1, -1 near 0 only, 0 elsewhere
    """

    mdp: TabularMDP
    features: Array
    reward: Array


def objectworld(
    key: Key,
    height: int,
    width: int,
    *,
    num_objects: int,
    num_colors: int = 2,
    slip: ArrayLike = 0.3,
    discount: ArrayLike = 0.9,
) -> Objectworld:
    """An Objectworld with `num_objects` objects in distinct random cells, each of a random outer and inner colour.

    The reward is +1 within distance 3 of an object of outer colour 0 and within 2 of one of outer colour 1, -1 within
    3 of outer colour 0 only, else 0, [S]; distances are Euclidean, in cells. Inner colours are distractors.
    Raises ValueError if there are fewer than two colours, or not 1..height*width objects.
    """
    if num_colors < 2 or not 1 <= num_objects <= height * width:
        raise ValueError(
            f"objectworld: needs num_colors >= 2 and num_objects in 1..{height * width}, "
            f"got {num_colors} and {num_objects}"
        )
    place_key, color_key = jax.random.split(key)
    places = jax.random.choice(place_key, height * width, (num_objects,), replace=False)
    colors = jax.random.randint(color_key, (2, num_objects), 0, num_colors)
    cells = jnp.stack(jnp.unravel_index(jnp.arange(height * width), (height, width)), axis=-1).astype(jnp.float32)
    offsets = cells[:, None, :] - cells[places][None, :, :]
    distance = jnp.sqrt(jnp.sum(offsets**2, axis=-1))  # [S, objects]
    of_color = colors[:, None, :] == jnp.arange(num_colors)[None, :, None]  # [2, C, objects]
    nearest = jnp.min(jnp.where(of_color.reshape(1, -1, num_objects), distance[:, None, :], jnp.inf), axis=-1)
    near_first, near_second = nearest[:, 0] <= 3.0, nearest[:, 1] <= 2.0
    reward = jnp.where(near_first, jnp.where(near_second, 1.0, -1.0), 0.0)
    diagonal = jnp.hypot(float(height - 1), float(width - 1)) if height * width > 1 else 1.0
    features = jnp.minimum(nearest / diagonal, 1.0)  # a colour no object has is as far as can be
    return Objectworld(gridworld(height, width, slip=slip, discount=discount), features, reward)


def _state(name: str, cell: tuple[int, int] | int, free: np.ndarray) -> int:
    height, width = free.shape
    y, x = divmod(cell, width) if isinstance(cell, int | np.integer) else cell
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"gridworld: {name} {cell} is outside the {height} x {width} grid")
    if not free[y, x]:
        raise ValueError(f"gridworld: {name} {cell} is in a wall")
    return int(y) * width + int(x)
