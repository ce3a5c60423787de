"""Layers that stretch nothing: dense ones with orthonormal weights, and a network of Lipschitz constant 1 made of them.

With GroupSort between them such networks can be any 1-Lipschitz function (Anil, Lucas & Grosse 2019, arXiv:1811.05381,
theorem 3), and the margin of a classifier certifies it: see `lipschitz_radius` of `jaxalign.certification.lipschitz`.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.networks.dense import matmul
from jaxalign.networks.group_sort import group_sort
from jaxalign.networks.initializers import orthogonal
from jaxalign.types import Array, ArrayLike


def orthonormalized(kernel: ArrayLike, *, iterations: int = 25) -> Array:
    """The matrix nearest to kernel[I, O] with orthonormal columns (rows if I < O): its polar factor.

    W <- 1.5 W - 0.5 W W^T W (Bjorck & Bowie 1971, "An iterative algorithm for computing the best estimate of an
    orthogonal matrix", order 1), from W / |(W^T W)^2|_F^(1/4): every turn multiplies small singular values by 1.5 and
    lifts none above 1. After 25 turns those down to 1e-3 of the largest are 1 within 1e-5. Products only, no LAPACK;
    differentiable.

    Raises ValueError unless the kernel is a matrix.
    """
    w = jnp.asarray(kernel)
    if w.ndim != 2:
        raise ValueError(f"orthonormalized: needs a matrix [I, O], got shape {w.shape}")
    tall = w.shape[0] >= w.shape[1]
    w = w if tall else w.T
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    w = w / jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(w))), jnp.finfo(w.dtype).tiny)
    gram = _product(w.T, w)
    # A bound of the largest singular value that is only (min(I, O))^(1/8) too large for orthonormal weights.
    largest = jnp.sqrt(jnp.sqrt(jnp.linalg.norm(_product(gram, gram))))

    def turn(w: Array, _: None) -> tuple[Array, None]:
        return 1.5 * w - 0.5 * _product(w, _product(w.T, w)), None

    w, _ = jax.lax.scan(turn, w / jnp.maximum(largest, jnp.finfo(w.dtype).tiny), None, length=iterations)
    return (w if tall else w.T).astype(jnp.asarray(kernel).dtype)


class OrthogonalDense(nn.Module):
    """y = x @ orthonormalized(kernel) + bias on x[..., I] -> [..., O]: 1-Lipschitz in L2; |y - bias| = |x| if O >= I.

    Parameters: kernel [I, O], which is only orthogonal as it is drawn; bias [O] if `use_bias`.
    """

    features: int
    use_bias: bool = True
    iterations: int = 25

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", orthogonal(), (x.shape[-1], self.features))
        weights = orthonormalized(kernel, iterations=self.iterations)
        y = matmul(x.reshape(-1, x.shape[-1]), weights, x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(y.dtype)[None, :]
        return y.reshape(*x.shape[:-1], self.features)


class LipschitzMLP(nn.Module):
    """OrthogonalDense layers with GroupSort between them: x[..., I] -> [..., layer_sizes[-1]], 1-Lipschitz in L2.

    |f(a) - f(b)|_2 <= |a - b|_2, up to rounding, whatever its parameters. Train it with a loss that wants margins:
    cross-entropy of `temperature * logits`, say, since logits that differ by at most |a - b| are small.
    Use it as a Network with `Network.from_linen(LipschitzMLP((64, 64, 10)), x)`.
    """

    layer_sizes: Sequence[int]
    group_size: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for size in self.layer_sizes[:-1]:
            x = group_sort(OrthogonalDense(size)(x), self.group_size)
        return OrthogonalDense(self.layer_sizes[-1])(x)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
