"""The jump of a JumpReLU, with gradients for its threshold by a kernel of finite width."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


def _rectangle(z: Array, threshold: Array, bandwidth: ArrayLike) -> Array:
    return (jnp.abs(z - threshold[None]) < jnp.asarray(bandwidth, z.dtype) / 2).astype(z.dtype)


@jax.custom_vjp
def jump_relu(z: Array, threshold: Array, bandwidth: ArrayLike) -> Array:
    """z [B, F] where z > threshold [F], else 0. d / d threshold = -(threshold / bandwidth) where |z - threshold| <
    bandwidth / 2, else 0 (arXiv:2407.14435, eq. 11)."""
    return jnp.where(z <= threshold[None], 0.0, z)  # a NaN passes


def _jump_forward(z: Array, threshold: Array, bandwidth: ArrayLike) -> tuple[Array, Any]:
    return jump_relu(z, threshold, bandwidth), (z, threshold, bandwidth)


def _jump_backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    z, threshold, bandwidth = saved
    near = (_rectangle(z, threshold, bandwidth) * g).sum(axis=0)
    return g * (z > threshold[None]), -threshold / bandwidth * near, None


jump_relu.defvjp(_jump_forward, _jump_backward)


@jax.custom_vjp
def step_above(z: Array, threshold: Array, bandwidth: ArrayLike) -> Array:
    """1 where z [B, F] > threshold [F], else 0. d / d threshold = -1 / bandwidth where |z - threshold| < bandwidth / 2,
    else 0 (arXiv:2407.14435, eq. 12); no gradient to z."""
    return (z > threshold[None]).astype(z.dtype)


def _step_forward(z: Array, threshold: Array, bandwidth: ArrayLike) -> tuple[Array, Any]:
    return step_above(z, threshold, bandwidth), (z, threshold, bandwidth)


def _step_backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    z, threshold, bandwidth = saved
    near = (_rectangle(z, threshold, bandwidth) * g).sum(axis=0)
    return jnp.zeros_like(z), -near / bandwidth, None


step_above.defvjp(_step_forward, _step_backward)
