"""Fixed points of contractions, with gradients by the implicit function theorem."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jaxalign.types import Array, ArrayLike

Norm = Callable[[Array], Array]


class FixedPoint(NamedTuple):
    """point: x with x = backup(x) but for the residual, |backup(x) - x| at the last step; iterations: int32."""

    point: Array
    residual: Array
    iterations: Array


def sup_norm(x: Array) -> Array:
    """max |x|, [...] -> scalar: expectations E_{s'} value[s'] do not enlarge it."""
    return jnp.max(jnp.abs(x))


def l1_norm(x: Array) -> Array:
    """sum |x|, [...] -> scalar: the dual of `sup_norm`, which moving mass between states does not enlarge."""
    return jnp.sum(jnp.abs(x))


def fixed_point(
    backup: Callable[[Array], Array],
    start: Array,
    *,
    tolerance: ArrayLike,
    max_iterations: int,
    norms: tuple[Norm, Norm] = (sup_norm, l1_norm),
) -> FixedPoint:
    """Iterate x <- backup(x) from `start` [...] until |backup(x) - x| <= tolerance, or `max_iterations`.

    Stops as well where the residual is a few rounding errors of |x|, beyond which no iteration helps. For a
    contraction of modulus g the point is within residual g / (1 - g) of the fixed point. `norms` are the norm |.| and
    its dual, in which transposed solves converge.

    Derivatives do not unroll the loop: with J the Jacobian of `backup` at the point,
    dx = (I - J)^-1 d(backup), forwards and backwards by one linear solve, itself a fixed-point iteration
    x <- b + J x (or its transpose) to the same relative tolerance; they can be taken again.
    """

    def iterate(step: Callable[[Array], Array], x: Array, tolerance: ArrayLike, norm: Norm) -> FixedPoint:
        rounding = 4.0 * jnp.finfo(x.dtype).eps

        def unfinished(carry: FixedPoint) -> Array:
            x, residual, count = carry
            enough = jnp.maximum(tolerance, rounding * norm(x))
            return (residual > enough) & (count < max_iterations)

        def advance(carry: FixedPoint) -> FixedPoint:
            x, _, count = carry
            new = step(x)
            return FixedPoint(new, norm(new - x), count + 1)

        return lax.while_loop(unfinished, advance, FixedPoint(x, jnp.full((), jnp.inf, x.dtype), jnp.int32(0)))

    def solve(_: Callable[[Array], Array], x: Array) -> tuple[Array, tuple[Array, Array]]:
        found = lax.stop_gradient(iterate(backup, x, tolerance, norms[0]))
        # custom_root gives tangents to all it returns, so the count passes through it as a float.
        return found.point, (found.residual, found.iterations.astype(x.dtype))

    def solve_linear(matvec: Callable[[Array], Array], b: Array) -> Array:
        def iterative(matvec: Callable[[Array], Array], b: Array, norm: Norm) -> Array:
            # matvec is I - J, so b + x - matvec(x) is b + J x.
            return iterate(lambda x: b + x - matvec(x), b, tolerance * norm(b), norm).point

        solve, transpose_solve = (partial(iterative, norm=norm) for norm in norms)
        return lax.custom_linear_solve(matvec, b, solve, transpose_solve)

    point, (residual, iterations) = lax.custom_root(
        lambda x: x - backup(x), start, solve, solve_linear, has_aux=True
    )
    return FixedPoint(point, residual, iterations.astype(jnp.int32))
