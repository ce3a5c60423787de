"""Fast Adaptive Boundary: a walk along the decision boundary to its nearest point (arXiv:1907.02044)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.robustness.attack_losses import margins
from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.survivors import Rows, advance, as_rows, by_row, ranked_classes
from jaxalign.robustness.threat_model import norms, random_in_ball, unflatten_rows
from jaxalign.robustness.traced_classifier import computed_once
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[[Any], Array]

DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
MOST_SEGMENTS = 60  # of the piecewise linear function that a projection inverts; Newton's method takes a handful
FINAL_STEPS = 3  # of the search on the segment between x and what was found
AIM = 0.1  # of the way from the boundary, as that search sees it, to what was found


def project_onto_hyperplane(x: Array, normal: Array, gap: Array, lower: Array, upper: Array, norm: str) -> Array:
    """The smallest step from x to the hyperplane within the box: `argmin |d|, <normal, d> = -gap`.

    With s = sign(-gap normal), and room_i the distance from x_i to the box's side in the direction of s_i:
    `d_i = s_i min(t, room_i)` for linf and `s_i min(t |normal_i|, room_i)` for l2, where t solves
    `sum_i |normal_i d_i| = |gap|`, a concave increasing function of t: Newton's method from 0 never overshoots and is
    exact after finitely many steps, so nothing is sorted. For l1 the largest |normal_i| are filled first
    (Croce & Hein 2020, arXiv:1907.02044). Where the box holds no point of the hyperplane, d goes to its nearest corner.

    Args:
        x, normal: [B, D].
        gap: [B], `<normal, x> - offset`.
        lower, upper: scalars or [B, D], may be infinite.

    Returns d [B, D].
    """
    towards = -jnp.sign(gap)[:, None] * jnp.sign(normal)
    room = jnp.where(towards > 0, upper - x, jnp.where(towards < 0, x - lower, 0.0))
    # Scaled to a largest entry of 1: the squares of a saturated network's gradient underflow.
    size = jnp.abs(normal)
    largest = jnp.maximum(jnp.max(size, axis=1), jnp.finfo(size.dtype).tiny)
    size, gap = size / largest[:, None], jnp.abs(gap) / largest
    if norm == "l1":
        return towards * _fill_largest(size, room, gap)
    return towards * _fill_evenly(size, size if norm == "l2" else jnp.sign(size), room, gap)


def _fill_evenly(size: Array, rate: Array, room: Array, gap: Array) -> Array:
    """min(t rate, room) [B, D], t >= 0 such that its product with `size` sums to `gap` [B], or `room` if it cannot."""

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        t, _, i = carry
        full = t[:, None] * rate >= room
        held = jnp.sum(jnp.where(full, size * room, 0.0), axis=1)
        slope = jnp.sum(jnp.where(full, 0.0, size * rate), axis=1)
        new = jnp.where(slope > 0, (gap - held) / jnp.where(slope > 0, slope, 1.0), jnp.finfo(t.dtype).max)
        return jnp.maximum(t, new), new > t * (1 + 4 * jnp.finfo(t.dtype).eps), i + 1

    unfinished = lambda carry: jnp.any(carry[1]) & (carry[2] < MOST_SEGMENTS)  # noqa: E731
    t, _, _ = jax.lax.while_loop(unfinished, body, (jnp.zeros_like(gap), gap > 0, jnp.zeros((), jnp.int32)))
    return jnp.where(rate > 0, jnp.minimum(t[:, None] * rate, room), 0.0)


def _fill_largest(size: Array, room: Array, gap: Array) -> Array:
    """How far each of [B, D] goes, the largest `size` first, until the product with `size` sums to `gap` [B]."""
    order = jnp.argsort(-size, axis=1)
    size, room = (jnp.take_along_axis(v, order, axis=1) for v in (size, room))
    held = jnp.where(size > 0, size * room, 0.0)
    before = jnp.concatenate([jnp.zeros_like(gap)[:, None], jnp.cumsum(held, axis=1)[:, :-1]], axis=1)
    far = jnp.where(size > 0, (gap[:, None] - before) / jnp.where(size > 0, size, 1.0), 0.0)
    return jnp.take_along_axis(jnp.clip(far, 0.0, room), jnp.argsort(order, axis=1), axis=1)


class Walk(NamedTuple):
    """A walk at x, every leaf [B, ...]; `nearest` is the misclassified point met so far at the least `distance`."""

    x: Array
    nearest: Array
    distance: Array
    x_adv: Array
    margin: Array
    done: Array


@flax.struct.dataclass
class AdaptiveBoundary:
    """FAB as a Search (see survivors.py), done where a misclassified point lies in the ball (never if its radius is 0).

    largest_bias: alpha_max, the most weight given to the projection of the starting point
    overshoot: eta, how far a step goes beyond the hyperplane
    backward: beta, how much of the way from the starting point is kept after a misclassified point
    targeted: only the boundary towards `rows.target` is linearised, one gradient instead of one for each class
    """

    largest_bias: ArrayLike = 0.1
    overshoot: ArrayLike = 1.05
    backward: ArrayLike = 0.9
    norm: str = flax.struct.field(pytree_node=False, default="linf")
    steps: int = flax.struct.field(pytree_node=False, default=100)
    targeted: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def length(self) -> int:
        """Iterations, each two evaluations of the classifier and its gradient."""
        return self.steps

    def init(self, key: Key, rows: Rows) -> Walk:
        """At the examples [B, D] themselves."""
        del key
        worst = jnp.full(rows.y.shape, jnp.inf, rows.x.dtype)
        return Walk(rows.x, rows.x, worst, rows.x, worst, jnp.zeros(rows.y.shape, bool))

    def step(self, key: Key, apply: Apply, rows: Rows, state: Walk, i: Array) -> Walk:
        """Step to the linearised boundary, note what is misclassified there, and go back from it (Algorithm 1)."""
        del key, i
        value, gradient = computed_once(self._boundary(apply, rows, state.x), state.done)
        x = computed_once(self._to_boundary(rows, state.x, value, gradient), state.done)
        margin = margins(apply(x), rows.y)
        distance = norms(x - rows.x, self.norm)
        beyond = ~(margin >= 0)  # NaN goes on into the result, where it is named
        nearer = beyond & ~(distance >= state.distance)
        within = nearer & ~(distance > rows.epsilon)
        return Walk(
            x=jnp.where(beyond[:, None], rows.x + self.backward * (x - rows.x), x),
            nearest=jnp.where(nearer[:, None], x, state.nearest),
            distance=jnp.where(nearer, distance, state.distance),
            x_adv=jnp.where(within[:, None], x, state.x_adv),
            margin=jnp.where(within, margin, state.margin),
            done=state.done | (within & (rows.epsilon > 0)),
        )

    def _boundary(self, apply: Apply, rows: Rows, x: Array) -> tuple[Array, Array]:
        """z[j] - z[y] [B] at x and its gradient [B, D], for the class j whose linearised boundary is nearest."""
        if self.targeted:

            def difference(x: Array) -> tuple[Array, Array]:
                logits = apply(x)
                at = lambda labels: jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]  # noqa: E731
                value = at(rows.target) - at(rows.y)
                return jnp.sum(value), value

            gradient, value = jax.grad(difference, has_aux=True)(x)
            return value, gradient
        logits, pull = jax.vjp(apply, x)
        classes = logits.shape[1]
        own = jax.nn.one_hot(rows.y, classes, dtype=logits.dtype)
        values = logits - jnp.sum(own * logits, axis=1, keepdims=True)
        gradients = jax.vmap(lambda j: pull(jax.nn.one_hot(j, classes, dtype=logits.dtype)[None, :] - own)[0])(
            jnp.arange(classes)
        )
        slopes = jax.vmap(lambda g: norms(g, DUAL[self.norm]))(gradients).T
        ratio = jnp.abs(values) / jnp.maximum(slopes, jnp.finfo(slopes.dtype).tiny)
        nearest = jnp.argmin(jnp.where(own > 0, jnp.inf, ratio), axis=1)
        rows_of = jnp.arange(len(nearest))
        return values[rows_of, nearest], gradients[nearest, rows_of]

    def _to_boundary(self, rows: Rows, x: Array, value: Array, gradient: Array) -> Array:
        """Between the projections of x and of the starting point onto the hyperplane, each overshot."""
        from_start = value + jnp.sum(gradient * (rows.x - x), axis=1)
        here = project_onto_hyperplane(x, gradient, value, rows.lower, rows.upper, self.norm)
        there = project_onto_hyperplane(rows.x, gradient, from_start, rows.lower, rows.upper, self.norm)
        near, far = norms(here, self.norm), norms(there, self.norm)
        bias = jnp.minimum(near / jnp.maximum(near + far, jnp.finfo(x.dtype).tiny), self.largest_bias)[:, None]
        return rows.in_box((1 - bias) * (x + self.overshoot * here) + bias * (rows.x + self.overshoot * there))


@attack_program(static=("norm", "steps", "restarts", "num_targets"))
def fab(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike | None = None,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    num_targets: int | None = None,
    bounds: Any = (0.0, 1.0),
    largest_bias: ArrayLike = 0.1,
    overshoot: ArrayLike = 1.05,
    backward: ArrayLike = 0.9,
) -> AttackResult:
    """Fast Adaptive Boundary: the nearest misclassified point it can find, in any of the three norms.

    Each iteration linearises the classifier at x_i, takes the nearest of the hyperplanes `z_j = z_y`, projects x_i and
    the original x onto it within the box, and steps to

    `x_{i+1} = clip((1 - a) (x_i + overshoot d(x_i)) + a (x + overshoot d(x)))`

    with `a = min(|d(x_i)| / (|d(x_i)| + |d(x)|), largest_bias)`. A misclassified x_{i+1} is noted and pulled back to
    `x + backward (x_{i+1} - x)`. At the end the segment between x and the nearest point found is searched (Croce & Hein
    2020, arXiv:1907.02044, Algorithm 1).

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes.
        epsilon: None asks for the smallest perturbation; a scalar or [B] for one of at most that norm, and a row is
            done when it has one.
        norm: "linf", "l2" or "l1".
        steps: iterations of each walk.
        restarts: walks; each but the first starts at a random point, half as far from x as the last one ended.
        num_targets: T replaces the nearest hyperplane by that of one class, in T walks for the T classes other than y
            with the largest logits at x: one gradient an iteration and not C (FAB-T of arXiv:2003.01690).
        bounds: the box (lower, upper) or None.
        largest_bias, overshoot, backward: alpha_max, eta and beta of the paper.

    Returns an AttackResult; `norms(x_adv - x, norm)` are the distances, and x_adv is x where nothing was found.
    """
    rows = as_rows(x, y, 0.0 if epsilon is None else epsilon, bounds)
    row_apply = by_row(apply, x)
    search = AdaptiveBoundary(largest_bias, overshoot, backward, norm, steps, num_targets is not None)
    logits = row_apply(rows.x)
    clean = margins(logits, rows.y)
    targets = rows.y[None]
    if num_targets is not None:
        targets = ranked_classes(logits, rows.y, min(num_targets, logits.shape[1] - 1))
    walk = search.init(key, rows)
    walk = walk._replace(distance=jnp.where(clean < 0, 0.0, walk.distance), done=clean < 0)

    def attempt(walk: Walk, inputs: tuple[Array, Array, Key]) -> tuple[Walk, None]:
        target, first, key = inputs
        start_key, run_key = jax.random.split(key)
        # Half as far as the nearest point found, or else as the last walk ended.
        radius = jnp.where(jnp.isfinite(walk.distance), walk.distance, norms(walk.x - rows.x, norm)) / 2
        start = rows.in_box(rows.x + random_in_ball(start_key, rows.x, jnp.where(first, 0.0, radius), norm))
        aimed = rows._replace(target=target)
        return advance(search, run_key, row_apply, aimed, walk._replace(x=start), 0, search.length), None

    targets, first = jnp.tile(targets, (restarts, 1)), jnp.arange(restarts * len(targets)) < len(targets)
    walk, _ = jax.lax.scan(attempt, walk, (targets, first, jax.random.split(key, len(targets))))
    nearest = _closer(row_apply, rows, walk.nearest, clean)
    return checked_result(apply, x, unflatten_rows(nearest, x), y, epsilon, norm=norm, bounds=bounds)


def _closer(apply: Apply, rows: Rows, nearest: Array, clean: Array) -> Array:
    """Nearer misclassified points on the segments from x to `nearest` [B, D], by regula falsi on the margins.

    `clean` [B] are the margins at x; where they are negative, or `nearest` is x itself, it is left alone.
    """

    def body(_: int, ends: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        right, right_margin, wrong, wrong_margin = ends
        share = right_margin / jnp.where(right_margin > wrong_margin, right_margin - wrong_margin, 1.0)
        share += AIM * (1 - share)  # a point on the boundary itself is not misclassified
        middle = rows.in_box(right + share[:, None] * (wrong - right))
        margin = margins(apply(middle), rows.y)
        falls = margin < 0
        return (
            jnp.where(falls[:, None], right, middle),
            jnp.where(falls, right_margin, margin),
            jnp.where(falls[:, None], middle, wrong),
            jnp.where(falls, margin, wrong_margin),
        )

    margin = margins(apply(nearest), rows.y)
    found = (clean >= 0) & (margin < 0)
    _, _, wrong, _ = jax.lax.fori_loop(0, FINAL_STEPS, body, (rows.x, clean, nearest, margin))
    return jnp.where(found[:, None], wrong, nearest)
