"""A certificate against an attack: if the attack wins inside it, one of the two is wrong."""

import jax.numpy as jnp

from jaxalign.robustness.attack_result import AttackResult, within
from jaxalign.types import Array, ArrayLike


def contradictions(
    certified: ArrayLike, attack: AttackResult, x: ArrayLike, epsilon: ArrayLike, *, norm: str = "linf"
) -> Array:
    """Rows that are certified and yet broken: `certified & attack.success & (|attack.x_adv - x| <= epsilon)`, [B] bool.

    Args:
        certified: [B] bool, whether row b is proven right in the whole ball.
        attack: of the same rows; it may have searched a larger ball, what counts is where it found something. A row
            that is wrong as it is counts too: x lies in every ball.
        x: [B, ...], the rows.
        epsilon: the radius certified, scalar or [B] (a radius of each row's own), in the units of x.
        norm: of the ball.

    The ball is meant up to the rounding of x + delta in the dtype of x, as in `checked_result`; a float32 certificate
    whose margin is as small as the rounding may be contradicted by rounding alone.
    Raises ValueError if `certified` has not one entry for each row of the attack.
    """
    certified, success = jnp.asarray(certified), jnp.asarray(attack.success)
    if certified.ndim != 1 or certified.shape != success.shape:
        raise ValueError(
            f"contradictions: certified [B] and attack.success [B] must agree, got {certified.shape}, {success.shape}"
        )
    return certified.astype(bool) & success & within(x, attack.x_adv, epsilon, norm=norm, bounds=None)
