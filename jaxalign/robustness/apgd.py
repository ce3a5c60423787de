"""Auto-PGD: projected gradient ascent that sets its own step sizes (Croce & Hein 2020, arXiv:2003.01690)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.robustness.attack_losses import cross_entropy, dlr_loss, margins, targeted_dlr_loss
from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.survivors import (
    Best,
    Rows,
    as_rows,
    attempts,
    by_row,
    check_norm,
    improves,
    mean_logits,
    ranked_classes,
)
from jaxalign.robustness.threat_model import random_in_ball, steepest_direction, unflatten_rows
from jaxalign.robustness.traced_classifier import computed_once
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[..., Array]
Loss = Callable[[Array, Array], Array]

STEP_WEIGHT = 0.75  # of the gradient step; the rest goes to the step before
LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr_loss}


def checkpoints(steps: int) -> list[int]:
    """The iterations w_j = ceil(p_j steps) at which a step size may be halved, 0 first.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06) while p_j <= 1: stretches of 22, 19, 16, ...
    hundredths of the steps, and no fewer than 6 (arXiv:2003.01690, section 3.1). No arrays [...] are involved.
    """
    hundredths, stretch = [0, 22], 22
    while hundredths[-1] + max(stretch - 3, 6) <= 100:
        stretch = max(stretch - 3, 6)
        hundredths.append(hundredths[-1] + stretch)
    return sorted({-(-p * steps // 100) for p in hundredths})


class Climb(NamedTuple):
    """A climb at x = x^(k), every leaf [B, ...]; `best*` belong to the largest loss, x_adv to the smallest margin."""

    x: Array
    previous: Array  # x^(k - 1)
    loss: Array
    best: Array
    best_gradient: Array
    best_loss: Array
    step_size: Array
    rises: Array  # steps since the last checkpoint that raised the loss
    checked_loss: Array  # best_loss at the last checkpoint
    halved: Array  # whether the step size was halved there
    x_adv: Array
    margin: Array
    done: Array


@flax.struct.dataclass
class AutoPGD:
    """Auto-PGD as a Search (see survivors.py).

    rho: the share of steps that must raise the loss
    norm: "linf" or "l2"
    steps: gradient steps
    loss: `(logits [B, C], y [B]) -> [B]`, or with `targeted` `(logits, y, target [B]) -> [B]`
    draws: keys that a randomised classifier is averaged over, or None
    """

    rho: ArrayLike = 0.75
    norm: str = flax.struct.field(pytree_node=False, default="linf")
    steps: int = flax.struct.field(pytree_node=False, default=100)
    loss: Callable[..., Array] = flax.struct.field(pytree_node=False, default=cross_entropy)
    targeted: bool = flax.struct.field(pytree_node=False, default=False)
    draws: int | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def length(self) -> int:
        """Evaluations of the gradient: one at the start and one after each step."""
        return self.steps + 1

    def init(self, key: Key, rows: Rows) -> Climb:
        """A random start in the ball of each row, x [B, D], and step sizes of twice its radius."""
        x = rows.inside(rows.x + random_in_ball(key, rows.x, rows.epsilon, self.norm), self.norm)
        worst = jnp.full(rows.y.shape, jnp.inf, x.dtype)
        no = jnp.zeros(rows.y.shape, bool)
        count = jnp.zeros(rows.y.shape, jnp.int32)
        size = 2 * rows.epsilon
        return Climb(x, x, -worst, x, jnp.zeros_like(x), -worst, size, count, -worst, no, x, worst, no)

    def step(self, key: Key, apply: Apply, rows: Rows, state: Climb, i: Array) -> Climb:
        """Evaluate x^(i), at a checkpoint halve step sizes and go back to the best point, and step on (Algorithm 1)."""
        loss, margin, gradient = computed_once(self._evaluate(key, apply, rows, state.x), state.done)
        fallen = improves(margin, state.margin)
        rises = state.rises + (loss > state.loss) * (i > 0)
        higher = loss > state.best_loss
        best = jnp.where(higher[:, None], state.x, state.best)
        best_gradient = jnp.where(higher[:, None], gradient, state.best_gradient)
        best_loss = jnp.where(higher, loss, state.best_loss)

        stretch = self._stretches()[i]
        stalled = ~state.halved & (state.checked_loss == best_loss)
        halve = (stretch > 0) & ((rises < self.rho * stretch) | stalled)
        checked = (stretch > 0) | (i == 0)
        x = jnp.where(halve[:, None], best, state.x)
        gradient = jnp.where(halve[:, None], best_gradient, gradient)
        size = jnp.where(halve, state.step_size / 2, state.step_size)
        return Climb(
            x=self._moved(rows, x, state.previous, gradient, size, i),
            previous=x,
            loss=jnp.where(halve, best_loss, loss),
            best=best,
            best_gradient=best_gradient,
            best_loss=best_loss,
            step_size=size,
            rises=jnp.where(checked, 0, rises),
            checked_loss=jnp.where(checked, best_loss, state.checked_loss),
            halved=jnp.where(checked, halve, state.halved),
            x_adv=jnp.where(fallen[:, None], state.x, state.x_adv),
            margin=jnp.where(fallen, margin, state.margin),
            done=state.done | (margin < 0),
        )

    def _evaluate(self, key: Key, apply: Apply, rows: Rows, x: Array) -> tuple[Array, Array, Array]:
        """Loss [B], margin [B] and the loss's gradient [B, D], the mean ones over `draws` keys if there are any."""

        def total(x: Array, *key: Key) -> tuple[Array, tuple[Array, Array]]:
            logits = apply(x, *key)
            loss = self.loss(logits, rows.y, rows.target) if self.targeted else self.loss(logits, rows.y)
            return jnp.sum(loss), (loss, logits)

        climbed = jax.grad(total, has_aux=True)
        if not self.draws:
            gradient, (loss, logits) = climbed(x)
            return loss, margins(logits, rows.y), gradient
        each = jax.lax.map(lambda k: climbed(x, k), jax.random.split(key, self.draws))
        gradient, (loss, logits) = jax.tree.map(lambda v: jnp.mean(v, axis=0), each)
        return loss, margins(logits, rows.y), gradient

    def _moved(self, rows: Rows, x: Array, previous: Array, gradient: Array, size: Array, i: Array) -> Array:
        """x^(i+1) = P(x + a (P(x + size direction) - x) + (1 - a) (x - previous)), P onto ball and box."""
        target = rows.inside(x + size[:, None] * steepest_direction(gradient, self.norm), self.norm)
        weight = jnp.where(i == 0, 1.0, STEP_WEIGHT).astype(x.dtype)
        return rows.inside(x + weight * (target - x) + (1 - weight) * (x - previous), self.norm)

    def _stretches(self) -> Array:
        """[steps + 1]: at a checkpoint the iterations since the one before, elsewhere 0."""
        stretches, places = np.zeros(self.steps + 1, np.int32), checkpoints(self.steps)
        stretches[places[1:]] = np.diff(places)
        return jnp.asarray(stretches)


def targeted_margin(logits: Array, y: Array, target: Array) -> Array:
    """z[target] - z[y] of logits z [B, C]: [B], what a targeted attack climbs where C is too small for DLR."""
    at = lambda labels: jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]  # noqa: E731
    return at(target) - at(y)


def targeted_loss(classes: int) -> Callable[[Array, Array, Array], Array]:
    """The targeted DLR loss, or the difference of two logits [B, C] where C < 4 leaves it undefined."""
    return targeted_dlr_loss if classes >= 4 else targeted_margin


@attack_program(static=("norm", "steps", "restarts", "loss", "eot"))
def apgd(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str | Loss = "ce",
    bounds: Any = (0.0, 1.0),
    rho: ArrayLike = 0.75,
    eot: int | None = None,
) -> AttackResult:
    """Auto-PGD: ascent on the loss with momentum, whose step sizes start at 2 epsilon and halve where it stalls.

    `z = P(x + size direction);  x' = P(x + 0.75 (z - x) + 0.25 (x - previous))`

    with P onto ball and box and the norm's steepest direction. At the checkpoints w_j (see `checkpoints`) a row's size
    is halved, and the row goes back to its point of largest loss, if fewer than rho (w_j - w_{j-1}) steps since
    w_{j-1} raised the loss, or if neither the size nor the largest loss have changed since (Croce & Hein 2020,
    arXiv:2003.01690, Algorithm 1). It ends when every row has met a point that is misclassified.

    Args:
        apply: x[B, ...] -> logits [B, C]; with `eot` (x, key) -> logits.
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes.
        epsilon: scalar or [B], in the units of x.
        norm: "linf" or "l2".
        steps, restarts: how many of each.
        loss: "ce" the cross-entropy, "dlr" the difference of logits ratio, or `(logits [B, C], y [B]) -> [B]`.
        bounds: the box (lower, upper) or None.
        rho: see above.
        eot: for a randomised classifier, the keys over which each gradient, and at the end the logits, are averaged.

    Returns an AttackResult. Raises ValueError if the norm is "l1", or for "dlr" with fewer than three classes.
    """
    check_norm("apgd", norm)
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"apgd: loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
    search = AutoPGD(rho, norm, steps, LOSSES[loss] if isinstance(loss, str) else loss, False, eot)
    start_key, key, end_key = jax.random.split(key, 3)
    rows, row_apply = as_rows(x, y, epsilon, bounds), by_row(apply, x)
    start = Best(rows.x, margins(mean_logits(start_key, row_apply, rows.x, eot), rows.y))
    best = attempts(search, key, row_apply, rows, jnp.tile(rows.y, (restarts, 1)), start)
    final = lambda x_adv: mean_logits(end_key, apply, x_adv, eot)  # noqa: E731
    return checked_result(final, x, unflatten_rows(best.x_adv, x), y, epsilon, norm=norm, bounds=bounds)


@attack_program(static=("norm", "steps", "num_targets", "loss"))
def apgd_targeted(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    steps: int = 100,
    num_targets: int = 9,
    loss: str | Callable[[Array, Array, Array], Array] = "dlr",
    bounds: Any = (0.0, 1.0),
    rho: ArrayLike = 0.75,
) -> AttackResult:
    """Auto-PGD towards one class after another: any misclassification is a success.

    The targets of a row are the `num_targets` classes other than y with the largest logits at x, the largest first, and
    no more than there are (Croce & Hein 2020, arXiv:2003.01690, section 5).

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes.
        epsilon: scalar or [B], in the units of x.
        norm: "linf" or "l2".
        steps: for each target.
        loss: "dlr" the targeted difference of logits ratio (equation 7; with fewer than four classes, where that is
            undefined, `z[target] - z[y]`), or `(logits [B, C], y [B], target [B]) -> [B]`.
        bounds: the box (lower, upper) or None.
        rho: as in `apgd`.

    Returns an AttackResult. Raises ValueError if the norm is "l1".
    """
    check_norm("apgd_targeted", norm)
    if isinstance(loss, str) and loss != "dlr":
        raise ValueError(f"apgd_targeted: loss must be 'dlr' or a function, got {loss!r}")
    rows, row_apply = as_rows(x, y, epsilon, bounds), by_row(apply, x)
    logits = row_apply(rows.x)
    search = AutoPGD(rho, norm, steps, targeted_loss(logits.shape[1]) if isinstance(loss, str) else loss, True)
    targets = ranked_classes(logits, rows.y, min(num_targets, logits.shape[1] - 1))
    best = attempts(search, key, row_apply, rows, targets, Best(rows.x, margins(logits, rows.y)))
    return checked_result(apply, x, unflatten_rows(best.x_adv, x), y, epsilon, norm=norm, bounds=bounds)
