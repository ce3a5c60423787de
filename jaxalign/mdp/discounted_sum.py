"""Sums over infinitely many steps, (I - M)^-1 b = b + M b + M^2 b + ..., by matrix products alone."""

import functools

import jax.numpy as jnp
from jax import lax

from jaxalign.types import Array


def discounted_sum(matrix: Array, right: Array) -> Array:
    """x with x = right + matrix @ x: matrix M >= 0 [S, S] (discount times a stochastic matrix), right [S] -> [S].

    Each doubling adds as many steps as there are so far: x <- x + M x, M <- M M; seven for a discount of 0.9. Entries
    that still grow when a step is lost in rounding (discount 1 and no way to a terminal state) are infinite.

    Not `jnp.linalg.solve`: on a CPU with several devices LAPACK calls that run at once can wait for each other for
    ever, and on accelerators products are quicker. Differentiable as a linear solve is, in `matrix` and `right`.
    """

    def solve(matrix: Array, _: object, b: Array) -> Array:
        rounding, most = jnp.finfo(b.dtype).eps, jnp.finfo(b.dtype).nmant - 3

        def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
            x, added, _, count = carry
            return jnp.any(jnp.abs(added) > rounding * jnp.abs(x)) & (count < most)

        def double(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            x, _, power, count = carry
            added = power @ x
            return x + added, added, power @ power, count + 1

        x, added, _, _ = lax.while_loop(unfinished, double, (b, b, matrix, jnp.int32(0)))
        return jnp.where(jnp.abs(added) > 0.1 * jnp.abs(x), jnp.sign(x) * jnp.inf, x)

    fixed = lax.stop_gradient(matrix)
    return lax.custom_linear_solve(
        lambda x: x - matrix @ x,
        right,
        functools.partial(solve, fixed),
        functools.partial(solve, fixed.T),
    )
