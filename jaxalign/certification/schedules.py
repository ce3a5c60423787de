"""How certified training is led from the natural loss to the worst case over a ball."""

import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


def ramp_fraction(step: ArrayLike, *, warm_up: ArrayLike, ramp: ArrayLike) -> Array:
    """`clip((step - warm_up) / ramp, 0, 1)`: 0 during the warm-up, then rising by 1 / ramp a step until it is 1.

    A ramp of 0 steps is a jump: 0 before step `warm_up` and 1 from it on (Gowal et al. 2018, arXiv:1810.12715,
    section 4, where epsilon rises and the weight of the natural loss falls in this way).

    Args:
        step: number of steps taken, an integer of any shape [...].
        warm_up, ramp: in steps, need not be whole.

    Returns [...], float.
    """
    since, length = jnp.asarray(step) - jnp.asarray(warm_up), jnp.asarray(ramp)
    return jnp.where(length > 0, jnp.clip(since / jnp.where(length > 0, length, 1), 0.0, 1.0), since >= 0)


def between(first: ArrayLike, last: ArrayLike, fraction: ArrayLike) -> Array:
    """`(1 - fraction) first + fraction last`, elementwise; [...] in the shape that they broadcast to."""
    fraction = jnp.asarray(fraction)
    return (1.0 - fraction) * first + fraction * last
