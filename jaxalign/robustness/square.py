"""Square: a random search without gradients (Andriushchenko et al. 2020, arXiv:1912.00049)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.robustness.attack_losses import margins
from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.survivors import Best, Rows, as_rows, attempts, by_row, check_norm, improves
from jaxalign.robustness.threat_model import norms, unflatten_rows
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[[Any], Array]
Image = tuple[int, int, int]  # height, width, channels

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in queries out of 10000
TILES = 5  # on the shorter side of an image, where an L2 search starts


def image_shape(x: Any) -> Image:
    """(H, W, C) of an array [B, H, W] or [B, H, W, C]; (1, D, 1) for anything else, D numbers in a row."""
    leaves = jax.tree.leaves(x)
    if len(leaves) == 1 and leaves[0].ndim in (3, 4):
        shape = leaves[0].shape[1:]
        return shape[0], shape[1], shape[2] if len(shape) == 3 else 1
    return 1, sum(math.prod(leaf.shape[1:]) for leaf in leaves), 1


def square_sides(i: Array, queries: int, p_init: ArrayLike, image: Image) -> tuple[Array, Array]:
    """Height and width of the square at query i: sqrt(p H W), p halved from `p_init` on the paper's schedule.

    The schedule, made for 10000 queries, is stretched to `queries` (section 3.3). On a row without height, (1, D, 1),
    the square is a run of p D coordinates. Returns two int32 scalars [].
    """
    height, width, _ = image
    halvings = jnp.sum(i * (10000 / queries) > jnp.asarray(HALVINGS))
    area = p_init * 2.0 ** (-halvings.astype(jnp.float32)) * height * width
    if height == 1:
        return jnp.ones((), jnp.int32), jnp.clip(jnp.round(area), 1, width).astype(jnp.int32)
    side = jnp.clip(jnp.round(jnp.sqrt(area)), 1, min(height, width)).astype(jnp.int32)
    return side, side


class Guess(NamedTuple):
    """The point asked about next, [B, D], and the best answer so far."""

    candidate: Array
    x_adv: Array
    margin: Array
    done: Array


@flax.struct.dataclass
class SquareSearch:
    """Square as a Search (see survivors.py) on images whose rows are laid out as (H, W, C)."""

    p_init: ArrayLike = 0.8
    norm: str = flax.struct.field(pytree_node=False, default="linf")
    queries: int = flax.struct.field(pytree_node=False, default=5000)
    image: Image = flax.struct.field(pytree_node=False, default=(1, 1, 1))

    @property
    def length(self) -> int:
        """Evaluations of the classifier."""
        return self.queries

    def init(self, key: Key, rows: Rows) -> Guess:
        """The first guess [B, D]: vertical stripes of epsilon or -epsilon, or for l2 tiles of bumps."""
        x = self._pixels(rows.x)
        batch, _, width, channels = x.shape
        if self.norm == "linf":
            delta = jnp.broadcast_to(_signs(key, (batch, 1, width, channels), x.dtype), x.shape)
            start = rows.in_box(rows.x + rows.epsilon[:, None] * self._flat(delta))
        else:
            start = self._on_sphere(rows, self._flat(self._tiles(key, x)))
        worst = jnp.full(rows.y.shape, jnp.inf, x.dtype)
        return Guess(start, rows.x, worst, jnp.zeros(rows.y.shape, bool))

    def step(self, key: Key, apply: Apply, rows: Rows, state: Guess, i: Array) -> Guess:
        """Keep the candidate where its margin is smaller, and propose another (Algorithm 1)."""
        margin = margins(apply(state.candidate), rows.y)
        better = improves(margin, state.margin)
        x_adv = jnp.where(better[:, None], state.candidate, state.x_adv)
        margin = jnp.where(better, margin, state.margin)
        sides = square_sides(i, self.queries, self.p_init, self.image)
        propose = self._stripes_in_a_square if self.norm == "linf" else self._mass_moved
        return Guess(propose(key, rows, x_adv, sides), x_adv, margin, state.done | (margin < 0))

    def _stripes_in_a_square(self, key: Key, rows: Rows, x_adv: Array, sides: tuple[Array, Array]) -> Array:
        """x_adv with a square at a random place set to epsilon or -epsilon, a sign for each channel (Algorithm 2)."""
        place_key, sign_key = jax.random.split(key)
        x = self._pixels(rows.x)
        inside = self._window(self._corners(place_key, len(rows.y), sides), sides)[0]
        signs = _signs(sign_key, (x.shape[0], 1, 1, x.shape[3]), x.dtype)
        changed = x + rows.epsilon[:, None, None, None] * signs
        return rows.in_box(self._flat(jnp.where(inside, changed, self._pixels(x_adv))))

    def _mass_moved(self, key: Key, rows: Rows, x_adv: Array, sides: tuple[Array, Array]) -> Array:
        """x_adv with the perturbation of one square moved to another, where a bump is added to it (Algorithm 3)."""
        sides = tuple(self._odd(side, limit) for side, limit in zip(sides, self.image[:2], strict=True))
        to_key, from_key, sign_key, turn_key = jax.random.split(key, 4)
        delta = self._pixels(x_adv - rows.x)
        inside, *places = self._window(self._corners(to_key, len(rows.y), sides), sides)
        source = self._window(self._corners(from_key, len(rows.y), sides), sides)[0]
        bump = self._bump(turn_key, places, sides, inside)
        signs = _signs(sign_key, (delta.shape[0], 1, 1, delta.shape[3]), delta.dtype)
        old = jnp.where(inside, delta, 0.0)
        new = old / _at_least_tiny(_size(old)) + signs * bump
        unused = jnp.maximum(rows.epsilon**2 - norms(x_adv - rows.x, "l2") ** 2, 0.0)[:, None, None, None]
        mass = unused / delta.shape[3] + _size(jnp.where(inside | source, delta, 0.0)) ** 2
        new = new / _at_least_tiny(_size(new)) * jnp.sqrt(mass)
        return self._on_sphere(rows, self._flat(jnp.where(inside, new, jnp.where(source, 0.0, delta))))

    def _on_sphere(self, rows: Rows, delta: Array) -> Array:
        """x + delta [B, D] with delta scaled to the norm epsilon, in the box."""
        scale = rows.epsilon / jnp.maximum(norms(delta, "l2"), jnp.finfo(delta.dtype).tiny)
        return rows.in_box(rows.x + scale[:, None] * delta)

    def _tiles(self, key: Key, x: Array) -> Array:
        """Bumps side by side in images x [B, H, W, C], each with a random sign for each image and channel."""
        batch, height, width, channels = x.shape
        side = max(1, (width if height == 1 else min(height, width)) // TILES)
        sides = (1 if height == 1 else side, side)
        counts = [n // s for n, s in zip((height, width), sides, strict=True)]
        turn_key, sign_key = jax.random.split(key)
        grid = [jnp.arange(n) // s for n, s in zip((height, width), sides, strict=True)]
        inside = (grid[0] < counts[0])[:, None] & (grid[1] < counts[1])[None, :]
        rows, columns = (
            jnp.broadcast_to((jnp.arange(n) % s).reshape(shape), (batch, height, width, 1))
            for n, s, shape in zip((height, width), sides, ((1, -1, 1, 1), (1, 1, -1, 1)), strict=True)
        )
        bump = self._bump(turn_key, [rows, columns], sides, inside[None, :, :, None])
        signs = _signs(sign_key, (batch, counts[0] + 1, counts[1] + 1, channels), x.dtype)
        return bump * signs[:, jnp.minimum(grid[0], counts[0])][:, :, jnp.minimum(grid[1], counts[1])]

    def _bump(self, key: Key, places: Any, sides: Any, inside: Array) -> Array:
        """Two pyramids side by side, one up and one down, of unit L2 norm each: [B, H, W, 1].

        `places` are the coordinates of each pixel within its window of the size `sides`; half the windows, drawn at
        random, are cut along the rows and half along the columns, those of a flat row always along it.
        """
        (row, column), (height, width) = places, sides
        turned = jax.random.bernoulli(key, shape=(row.shape[0], 1, 1, 1)) | (self.image[0] == 1)
        along, across = jnp.where(turned, column, row), jnp.where(turned, row, column)
        length, breadth = jnp.where(turned, width, height), jnp.where(turned, height, width)
        first = along < length // 2
        long = jnp.where(first, length // 2, length - length // 2)
        along = jnp.where(first, along, along - length // 2)
        from_centre = jnp.maximum(jnp.abs(along - long // 2), jnp.abs(across - breadth // 2))
        steps = np.cumsum([0.0, *(1.0 / np.arange(1, max(self.image[:2]) + 2) ** 2)])
        sums = jnp.asarray(steps, jnp.float32)
        pyramid = sums[jnp.maximum(long // 2, breadth // 2) + 1] - sums[from_centre]
        halves = [jnp.where(inside & half, pyramid, 0.0) for half in (first, ~first)]
        return halves[0] / _at_least_tiny(_size(halves[0])) - halves[1] / _at_least_tiny(_size(halves[1]))

    def _corners(self, key: Key, batch: int, sides: tuple[Array, Array]) -> Array:
        """The upper left corner of a window in each image, uniform over those where it fits: [B, 2]."""
        free = jnp.stack([n - s + 1 for n, s in zip(self.image[:2], sides, strict=True)])
        return jax.random.randint(key, (batch, 2), 0, free[None, :])

    def _window(self, corners: Array, sides: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Whether a pixel lies in its image's window, and its row and column there: three [B, H, W, 1]."""
        row = jnp.arange(self.image[0])[None, :, None, None] - corners[:, 0, None, None, None]
        column = jnp.arange(self.image[1])[None, None, :, None] - corners[:, 1, None, None, None]
        return (row >= 0) & (row < sides[0]) & (column >= 0) & (column < sides[1]), row, column

    @staticmethod
    def _odd(side: Array, limit: int) -> Array:
        """The side of an L2 window: odd and at least 3, as far as the image [.., limit, ..] goes."""
        return jnp.minimum(jnp.maximum(side, 3) // 2 * 2 + 1, limit)

    def _pixels(self, rows: Array) -> Array:
        return rows.reshape(-1, *self.image)

    def _flat(self, pixels: Array) -> Array:
        return pixels.reshape(pixels.shape[0], -1)


def _signs(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.rademacher(key, shape, dtype)


def _size(pixels: Array) -> Array:
    """The L2 norm of each channel of [B, H, W, C], as [B, 1, 1, C]."""
    return jnp.sqrt(jnp.sum(pixels**2, axis=(1, 2), keepdims=True))


def _at_least_tiny(value: Array) -> Array:
    return jnp.maximum(value, jnp.finfo(value.dtype).tiny)


@attack_program(static=("norm", "queries"))
def square(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    queries: int = 5000,
    p_init: ArrayLike = 0.8,
    bounds: Any = (0.0, 1.0),
) -> AttackResult:
    """Random search that asks for logits and never for gradients, so that nothing can mask one.

    A query changes a square of the image at a random place, and the change is kept if the margin falls. For "linf" the
    square is set to x + epsilon or x - epsilon, a sign for each channel, and the search starts from vertical stripes of
    them. For "l2" the perturbation of a second square is moved into the first, where a bump of random sign joins it,
    and the whole is scaled to epsilon. The squares' area falls from `p_init` of the image (Andriushchenko et al. 2020,
    arXiv:1912.00049, Algorithms 1 to 3). It ends when every row has met a misclassified point.

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: [B, H, W] or [B, H, W, C]. Anything else, [B, D] or a pytree of leaves [B, ...], counts as an image one pixel
            high: its squares are runs of neighbouring coordinates.
        y: [B] int, the true classes.
        epsilon: scalar or [B], in the units of x.
        norm: "linf" or "l2".
        queries: evaluations of apply for each row.
        p_init: in (0, 1].
        bounds: the box (lower, upper) or None.

    Returns an AttackResult. Raises ValueError if the norm is "l1".
    """
    check_norm("square", norm)
    rows, row_apply = as_rows(x, y, epsilon, bounds), by_row(apply, x)
    search = SquareSearch(p_init, norm, queries, image_shape(x))
    start = Best(rows.x, margins(row_apply(rows.x), rows.y))
    best = attempts(search, key, row_apply, rows, rows.y[None], start)
    return checked_result(apply, x, unflatten_rows(best.x_adv, x), y, epsilon, norm=norm, bounds=bounds)
