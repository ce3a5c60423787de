"""Gradient attacks in a ball: the fast gradient method, and projected gradient descent with restarts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, attacker_margins, checked_result
from jaxalign.robustness.threat_model import (
    clip_to_box,
    flatten_rows,
    project_onto,
    random_in_ball,
    steepest_direction,
    unflatten_rows,
)
from jaxalign.robustness.traced_classifier import computed_once
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[[Any], Array]
Loss = Callable[[Array, Array], Array]

SPARSITY = 0.01  # the share of coordinates that an L1 step moves


@attack_program(static=("norm", "targeted"))
def fgsm(
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    targeted: bool = False,
    bounds: Any = (0.0, 1.0),
) -> Any:
    """One step to the edge of the ball: `clip(x + epsilon argmax_{|d| <= 1} <d, gradient of the loss at x>)`.

    For "linf" that is `x + epsilon sign(gradient)` (Goodfellow et al. 2015, arXiv:1412.6572, equation 1); the loss is
    the cross-entropy of y, and `targeted` descends it.

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes, or the classes wanted.
        epsilon: scalar or [B], in the units of x.
        norm: "linf", "l2" or "l1".
        bounds: the box (lower, upper) or None.

    Returns x_adv, leaves [B, ...].
    """
    gradient = jax.grad(lambda x: jnp.sum(_signed(cross_entropy, targeted)(apply(x), y)))(x)
    step = _scale(steepest_direction(gradient, norm), epsilon)
    return clip_to_box(jax.tree.map(jnp.add, x, step), bounds)


class _Climb(NamedTuple):
    """Where a climb is, every row by itself; `best` is the perturbation with the smallest margin so far."""

    step: Array
    delta: Any
    velocity: Any
    best: Any
    best_margin: Array


@attack_program(static=("norm", "steps", "restarts", "targeted", "loss", "random_start"))
def pgd(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    steps: int = 40,
    step_size: ArrayLike | None = None,
    restarts: int = 1,
    momentum: ArrayLike = 0.0,
    targeted: bool = False,
    bounds: Any = (0.0, 1.0),
    loss: Loss = cross_entropy,
    random_start: bool = True,
) -> AttackResult:
    """Projected gradient ascent on the loss from random starts (Madry et al. 2018, arXiv:1706.06083, section 2.1).

    `velocity = momentum velocity + gradient / |gradient|_1;  delta = project(delta + step_size steepest(velocity))`

    with the projection onto ball and box. A step moves along the norm's steepest direction; for "l1", where that is a
    single coordinate, along the signs of the largest hundredth of them (Tramer & Boneh 2019, arXiv:1904.13000). Each
    row keeps the point of smallest margin it has met, over steps and restarts, and the climb ends when all rows have
    fallen: a result is never weaker than the last iterate's.

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes, or with `targeted` the classes wanted.
        epsilon: scalar or [B], in the units of x.
        norm: "linf", "l2" or "l1".
        steps, restarts: how many of each.
        step_size: scalar or [B], in the units of x; None is 2.5 epsilon / steps.
        momentum: 0 is plain; 1 the momentum method of Dong et al. 2018 (arXiv:1710.06081, equation 6).
        bounds: the box (lower, upper) or None.
        loss: `(logits [B, C], y [B]) -> [B]`, climbed; with `targeted` descended.
        random_start: begin uniformly in the ball, or at x.

    Returns an AttackResult.
    """
    x, y = jax.tree.map(jnp.asarray, (x, y))
    size = 2.5 * jnp.asarray(epsilon) / steps if step_size is None else step_size
    climb_loss = _signed(loss, targeted)

    def evaluate(delta: Any) -> tuple[Array, Any]:
        def scalar(delta: Any) -> tuple[Array, Array]:
            logits = apply(jax.tree.map(jnp.add, x, delta))
            return jnp.sum(climb_loss(logits, y)), attacker_margins(logits, y, targeted=targeted)

        gradient, margin = jax.grad(scalar, has_aux=True)(delta)
        return margin, gradient

    def body(state: _Climb) -> _Climb:
        margin, gradient = computed_once(evaluate(state.delta), state.best_margin < 0)
        best, best_margin = _better(margin, state.delta, state.best_margin, state.best)
        velocity = _accumulate(state.velocity, gradient, momentum)
        step = _scale(_direction(velocity, norm), size)
        delta = project_onto(x, jax.tree.map(jnp.add, state.delta, step), epsilon, norm, bounds)
        return _Climb(state.step + 1, delta, velocity, best, best_margin)

    def restart(carry: tuple[Any, Array], key: Key) -> tuple[tuple[Any, Array], None]:
        start = random_in_ball(key, x, epsilon, norm) if random_start else jax.tree.map(jnp.zeros_like, x)
        start = project_onto(x, start, epsilon, norm, bounds)
        state = _Climb(jnp.zeros((), jnp.int32), start, jax.tree.map(jnp.zeros_like, x), *carry)
        unfinished = lambda s: (s.step < steps) & ~jnp.all(s.best_margin < 0)  # noqa: E731
        state = jax.lax.while_loop(unfinished, body, state)
        margin = attacker_margins(apply(jax.tree.map(jnp.add, x, state.delta)), y, targeted=targeted)
        return _better(margin, state.delta, state.best_margin, state.best), None

    margin = attacker_margins(apply(x), y, targeted=targeted)
    (delta, _), _ = jax.lax.scan(restart, (jax.tree.map(jnp.zeros_like, x), margin), jax.random.split(key, restarts))
    x_adv = clip_to_box(jax.tree.map(jnp.add, x, delta), bounds)
    return checked_result(apply, x, x_adv, y, epsilon, norm=norm, bounds=bounds, targeted=targeted)


def _signed(loss: Loss, targeted: bool) -> Loss:
    """The loss that the attacker climbs: [B, C], [B] -> [B]."""
    return (lambda logits, y: -loss(logits, y)) if targeted else loss


def _scale(direction: Any, size: ArrayLike) -> Any:
    """Every row of leaves [B, ...] times a scalar or its own entry of `size` [B]."""
    size = jnp.asarray(size)
    return jax.tree.map(lambda d: d * size.astype(d.dtype).reshape(size.shape + (1,) * (d.ndim - size.ndim)), direction)


def _better(margin: Array, delta: Any, best_margin: Array, best: Any) -> tuple[Any, Array]:
    """(the perturbation with the smaller margin, that margin), row by row."""
    better = margin < best_margin
    chosen = jax.tree.map(lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old), delta, best)
    return chosen, jnp.where(better, margin, best_margin)


def _accumulate(velocity: Any, gradient: Any, momentum: ArrayLike) -> Any:
    rows = flatten_rows(gradient)
    size = jnp.sum(jnp.abs(rows), axis=1)
    unit = _scale(gradient, 1 / jnp.maximum(size, jnp.finfo(rows.dtype).tiny))
    return jax.tree.map(lambda v, g: jnp.asarray(momentum, v.dtype) * v + g, velocity, unit)


def _direction(velocity: Any, norm: str) -> Any:
    """The steepest direction; for "l1" the signs of the largest hundredth of the coordinates, of norm 1 together."""
    if norm != "l1":
        return steepest_direction(velocity, norm)
    rows = flatten_rows(velocity)
    count = max(1, round(SPARSITY * rows.shape[1]))
    smallest = jax.lax.top_k(jnp.abs(rows), count)[0][:, -1:]
    chosen = jnp.where(jnp.abs(rows) >= smallest, jnp.sign(rows), 0.0)
    return unflatten_rows(chosen / jnp.maximum(jnp.sum(jnp.abs(chosen), axis=1, keepdims=True), 1.0), velocity)
