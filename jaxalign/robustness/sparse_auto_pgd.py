"""Auto-PGD in the L1 ball, whose steps move as few coordinates as pay (Croce & Hein 2021, arXiv:2103.01208)."""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp

from jaxalign.robustness.auto_pgd import AutoPGD
from jaxalign.robustness.survivors import Rows, improves
from jaxalign.robustness.threat_model import project_l1_in_box, random_in_ball
from jaxalign.robustness.traced_classifier import computed_once
from jaxalign.types import Array, Key

FIRST_SHARE, SHRINK, LEAST_STEP, SETTLED = 0.2, 1.5, 10.0, 0.95
CHECK_EVERY = 0.04  # of the steps


class SparseClimb(NamedTuple):
    """A climb at x, every leaf [B, ...]; `best*` belong to the largest loss, x_adv to the smallest margin."""

    x: Array
    best: Array
    best_gradient: Array
    best_loss: Array
    step_size: Array
    share: Array  # of the coordinates, that a step moves
    changed: Array  # coordinates of `best` that differ from the input at the last check
    x_adv: Array
    margin: Array
    done: Array


@flax.struct.dataclass
class SparseAutoPGD(AutoPGD):
    """Auto-PGD for "l1" as a Search (see survivors.py); `rho` is not used.

    `x' = P(x + size sign(g) / k on the k largest |g_i|)`, P the nearest point of ball and box. At every 25th of the
    steps k becomes the number of coordinates that the best point changes, over 1.5; where that number fell by more than
    5% the size returns to epsilon and the climb to its best point, elsewhere the size is divided by 1.5, down to
    epsilon / 10 (Algorithm 1 of the paper, one radius).
    """

    def init(self, key: Key, rows: Rows) -> SparseClimb:
        """A random start in the ball of each row, x [B, D]."""
        x = _inside(rows, rows.x + random_in_ball(key, rows.x, rows.epsilon, "l1"))
        worst = jnp.full(rows.y.shape, jnp.inf, x.dtype)
        share, changed = jnp.full_like(worst, FIRST_SHARE), jnp.full_like(worst, x.shape[1])
        no = jnp.zeros(rows.y.shape, bool)
        return SparseClimb(x, x, jnp.zeros_like(x), -worst, rows.epsilon, share, changed, x, worst, no)

    def step(self, key: Key, apply: Callable[..., Array], rows: Rows, state: SparseClimb, i: Array) -> SparseClimb:
        """Evaluate x^(i), now and then set size and share anew, and step on."""
        loss, margin, gradient = computed_once(self._evaluate(key, apply, rows, state.x), state.done)
        fallen, higher = improves(margin, state.margin), loss > state.best_loss
        best, best_gradient = (
            jnp.where(higher[:, None], new, old)
            for new, old in ((state.x, state.best), (gradient, state.best_gradient))
        )
        check = (i > 0) & (i % max(1, round(CHECK_EVERY * self.steps)) == 0)
        changed = jnp.sum(best != rows.x, axis=1).astype(loss.dtype)
        sparser = changed < SETTLED * state.changed
        size = jnp.where(sparser, rows.epsilon, jnp.maximum(state.step_size / SHRINK, rows.epsilon / LEAST_STEP))
        size = jnp.where(check, size, state.step_size)
        share = jnp.where(check, changed / best.shape[1] / SHRINK, state.share)
        back = (check & sparser)[:, None]
        x, uphill = jnp.where(back, best, state.x), jnp.where(back, best_gradient, gradient)
        return SparseClimb(
            x=_inside(rows, x + size[:, None] * _sparse_direction(uphill, share)),
            best=best,
            best_gradient=best_gradient,
            best_loss=jnp.where(higher, loss, state.best_loss),
            step_size=size,
            share=share,
            changed=jnp.where(check, changed, state.changed),
            x_adv=jnp.where(fallen[:, None], state.x, state.x_adv),
            margin=jnp.where(fallen, margin, state.margin),
            done=state.done | (margin < 0),
        )


def _inside(rows: Rows, x: Array) -> Array:
    """The nearest points to x [B, D] of ball and box."""
    return rows.in_box(rows.x + project_l1_in_box(x - rows.x, rows.lower - rows.x, rows.upper - rows.x, rows.epsilon))


def _sparse_direction(gradient: Array, share: Array) -> Array:
    """The signs of the largest `share` [B] of the coordinates of [B, D], at least one, of L1 norm 1 together."""
    size = jnp.abs(gradient)
    count = jnp.clip(jnp.round(share * size.shape[1]), 1, size.shape[1]).astype(jnp.int32)
    least = jnp.take_along_axis(jnp.sort(size, axis=1), size.shape[1] - count[:, None], axis=1)
    signs = jnp.where(size >= least, jnp.sign(gradient), 0.0)
    return signs / jnp.maximum(jnp.sum(jnp.abs(signs), axis=1, keepdims=True), 1.0)
