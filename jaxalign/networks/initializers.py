"""Initialisers that need no linear-algebra library."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Key


def orthogonal(scale: float = 1.0, *, iterations: int = 40) -> Callable[..., Array]:
    """An initialiser `(key, shape, dtype) -> w[..., I, O]` with orthonormal columns (rows if I < O), times `scale`.

    Starts from a Gaussian matrix g and iterates the Newton-Schulz map towards its polar factor g (g^T g)^(-1/2):
    x <- 1.5 x - 0.5 x x^T x, from x = g / |g|. The polar factor of a Gaussian is Haar-distributed, as the Q of a
    sign-corrected QR is (Mezzadri, arXiv math-ph/0609050), but only matrix products are used: batched QR calls LAPACK,
    which can deadlock XLA on a CPU inside a vmapped, jitted program. Axes before the last two are flattened into I, as
    for convolution kernels.

    Raises ValueError for shapes of fewer than two axes.
    """

    def init(key: Key, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        if len(shape) < 2:
            raise ValueError(f"orthogonal: needs at least two axes, got shape {shape}")
        columns = shape[-1]
        rows = 1
        for size in shape[:-1]:
            rows *= size
        long, short = max(rows, columns), min(rows, columns)
        work = jnp.promote_types(dtype, jnp.float32)
        g = jax.random.normal(key, (long, short), work)
        # The Frobenius norm bounds every singular value, so all start inside (0, 1], where the map converges.
        x = g / jnp.linalg.norm(g)

        def sharpen(x: Array, _: None) -> tuple[Array, None]:
            gram = jnp.matmul(x.T, x, precision="highest")
            return 1.5 * x - 0.5 * jnp.matmul(x, gram, precision="highest"), None

        x, _ = jax.lax.scan(sharpen, x, None, length=iterations)
        x = x if rows >= columns else x.T
        return (scale * x).reshape(shape).astype(dtype)

    return init
