"""Spectral normalisation: every kernel divided by its largest singular value."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Network, path_name
from jaxalign.types import Array, ArrayLike, Params


def spectral_norm(kernel: ArrayLike, *, iterations: int = 16) -> Array:
    """The largest singular value of kernel[..., O] as a matrix [I, O], by power iteration on the smaller Gram matrix.

    sigma = |W v| after v <- W^T W v / |W^T W v|, from a fixed random v. It is never too large; where many singular
    values crowd the largest it is too small, by about log(min(I, O)) / (2 iterations) of itself at the worst
    (Kuczynski & Wozniakowski 1992, "Estimating the largest eigenvalue by the power and Lanczos algorithms"), else by
    far less. The gradient is that of u^T W v with the pair (u, v) held, exact once it has converged (Miyato et al.
    2018, arXiv:1802.05957, equation 12).

    A convolution kernel [h, w, I, O] is taken as the matrix [h w I, O], as in the paper: not the norm of the
    convolution as an operator, which is at most sqrt(h w) times as large.

    Returns a scalar; 0 for a kernel of zeros. Raises ValueError for a kernel of fewer than two axes.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2:
        raise ValueError(f"spectral_norm: a kernel needs at least two axes, got shape {kernel.shape}")
    w = kernel.reshape(-1, kernel.shape[-1])
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    fixed = jax.lax.stop_gradient(w if w.shape[0] >= w.shape[1] else w.T)
    start = jax.random.normal(jax.random.key(0), (fixed.shape[1],), fixed.dtype)

    def turn(v: Array, _: None) -> tuple[Array, None]:
        return _unit(_product(_product(fixed, v), fixed)), None

    v, _ = jax.lax.scan(turn, _unit(start), None, length=iterations)
    u = _unit(_product(fixed, v))
    u, v = (u, v) if w.shape[0] >= w.shape[1] else (v, u)
    return jnp.vdot(u, _product(w, v), precision="highest")


def spectral_normalized(
    network: Network,
    *,
    bound: ArrayLike = 1.0,
    iterations: int = 16,
    select: Callable[[str], bool] = lambda name: name.rsplit("/", 1)[-1] == "kernel",
) -> Network:
    """The same network with each kernel W used as `bound W / spectral_norm(W)`: layers of slope at most `bound`.

    The parameters stay those of `network`, and each `apply` finds the norms anew from them, so there is no vector to
    carry from step to step as in the paper; that is 2 `iterations` products of a matrix and a vector for each kernel.
    Between 1-Lipschitz activations dense layers of bound 1 make a 1-Lipschitz network; convolutions do not, see
    `spectral_norm`. Miyato et al. 2018, arXiv:1802.05957, equation 8.

    Args:
        bound: > 0, the largest singular value that each kernel [..., O] is given.
        iterations: of the power method.
        select: which leaves are kernels, by name ("Dense_0/kernel"); those of fewer than two axes never are.
    """

    def normalized(path: tuple[Any, ...], leaf: Array) -> Array:
        if leaf.ndim < 2 or not select(path_name(path)):
            return leaf
        sigma = spectral_norm(leaf, iterations=iterations)
        return (leaf * (bound / jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny))).astype(leaf.dtype)

    def apply(params: Params, *inputs: Any) -> Any:
        return network.apply(jax.tree.map_with_path(normalized, params), *inputs)

    return dataclasses.replace(network, apply=apply)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _unit(v: Array) -> Array:
    return v / jnp.maximum(jnp.sqrt(jnp.sum(v * v)), jnp.finfo(v.dtype).tiny)
