"""Auto-PGD as a search that can be stopped and gone on with (Croce & Hein 2020, arXiv:2003.01690, Algorithm 1)."""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.robustness.attack_losses import cross_entropy, margins
from jaxalign.robustness.survivors import Rows, improves
from jaxalign.robustness.threat_model import random_in_ball, steepest_direction
from jaxalign.robustness.traced_classifier import computed_once
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[..., Array]

STEP_WEIGHT = 0.75  # of the gradient step; the rest goes to the step before


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
    norm: "linf" or "l2" (for "l1" see SparseAutoPGD)
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
