"""SABR: certified training on a small box around the point of a ball where an attack does best."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Network
from jaxalign.robustness.adversarial_training import attacked
from jaxalign.robustness.labelled_batch import LabelledBatch
from jaxalign.robustness.threat_model import clip_to_box
from jaxalign.types import ArrayLike, Key, Params


def small_boxes(
    key: Key,
    attack: Callable[..., Any],
    network: Network,
    params: Params,
    batch: LabelledBatch,
    epsilon: ArrayLike,
    *,
    share: ArrayLike,
    bounds: Any = (0.0, 1.0),
) -> LabelledBatch:
    """The batch [B, ...] with each x replaced by `small_box_centre` of x and what `attack` makes of it in the ball.

    attack: `(key, apply, x, y, epsilon) -> x_adv` or an AttackResult; no gradient goes through it.
    """
    x_adv = attacked(attack, network, params, batch, key, epsilon)
    return batch._replace(x=small_box_centre(batch.x, x_adv, epsilon, share=share, bounds=bounds))


def small_box_centre(x: Any, x_adv: Any, epsilon: ArrayLike, *, share: ArrayLike, bounds: Any = (0.0, 1.0)) -> Any:
    """The centre nearest to `x_adv` of a box of radius `share epsilon` that lies inside the ball of `x`.

    centre = clip(x + clip(x_adv - x, -(1 - share) epsilon, (1 - share) epsilon), bounds), so that
    |centre - x| + share epsilon <= epsilon in every coordinate (Mueller et al. 2023, arXiv:2210.04871, section 3).
    With share 1 it is x, and the box is the ball itself.

    Args:
        x, x_adv: leaves [B, ...]; x inside `bounds`.
        epsilon: scalar, radius of the ball in the L-infinity norm, in the units of x.
        share: lambda, scalar in [0, 1].
        bounds: the box (lower, upper) that inputs live in, or None.

    Returns leaves [B, ...].
    """
    room = (1.0 - jnp.asarray(share)) * jnp.asarray(epsilon)

    def pulled_in(x: Any, x_adv: Any) -> Any:
        reach = room.astype(x.dtype)
        return x + jnp.clip(x_adv - x, -reach, reach)

    return clip_to_box(jax.tree.map(pulled_in, x, x_adv), bounds)
