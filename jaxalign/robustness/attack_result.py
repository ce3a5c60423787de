"""What an attack gives back, checked: only what is inside ball and box and really misclassified is a success."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.robustness.attack_losses import margins
from jaxalign.robustness.threat_model import clip_to_box, flatten_rows, norms
from jaxalign.types import Array, ArrayLike

ROUNDING = 16  # units in the last place by which x + delta - x may miss delta, coordinate by coordinate


class AttackResult(NamedTuple):
    """x_adv: leaves [B, ...] in the shapes of x; success: [B] bool; margin: [B], of the logits at x_adv.

    margin is `z[y] - max_{j != y} z[j]`, and in a targeted attack `max_{j != t} z[j] - z[t]`: negative exactly where
    the attacker has what it wants. `1 - mean(success)` is the robust accuracy.
    """

    x_adv: Any
    success: Array
    margin: Array


def checked_result(
    apply: Callable[[Any], Array],
    x: Any,
    x_adv: Any,
    y: ArrayLike,
    epsilon: ArrayLike | None,
    *,
    norm: str,
    bounds: Any,
    targeted: bool = False,
) -> AttackResult:
    """Evaluate `apply` once more at `x_adv` and call a success only what is one.

    Args:
        apply: x[B, ...] -> logits [B, C].
        x, x_adv: leaves [B, ...].
        y: [B] int, the true classes, or with `targeted` the classes wanted.
        epsilon: scalar or [B]; None is no ball.
        norm: of the ball.
        bounds: the box, or None.

    success: margin < 0, `norms(x_adv - x, norm) <= epsilon` and x_adv inside the box, the ball up to the rounding of
    x + delta in the dtype of x.
    """
    margin = attacker_margins(apply(x_adv), jnp.asarray(y), targeted=targeted)
    success = (margin < 0) & within(x, x_adv, epsilon, norm=norm, bounds=bounds)
    return AttackResult(x_adv, success, margin)


def attacker_margins(logits: Array, y: Array, *, targeted: bool) -> Array:
    """What the attacker wants below zero, [B]: `margins(logits [B, C], y [B])`, negated where y [B] is the target."""
    return -margins(logits, y) if targeted else margins(logits, y)


def within(x: Any, x_adv: Any, epsilon: ArrayLike | None, *, norm: str, bounds: Any) -> Array:
    """Whether each row of x_adv is inside ball and box: leaves [B, ...] -> [B] bool. NaN is outside."""
    result = jnp.all(flatten_rows(x_adv) == flatten_rows(clip_to_box(x_adv, bounds)), axis=1)
    if epsilon is None:
        return result
    slack = jax.tree.map(_rounding, x, x_adv)
    return result & (norms(jax.tree.map(jnp.subtract, x_adv, x), norm) <= epsilon + norms(slack, norm))


def _rounding(x: Array, x_adv: Array) -> Array:
    """By how much [B, ...] a coordinate of x + delta - x may differ from delta."""
    return ROUNDING * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(x), jnp.abs(x_adv))
