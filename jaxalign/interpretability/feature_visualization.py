"""Pictures of what a network's parts look for, by gradient ascent on the image."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.interpretability.image_parameterization import ImageParameterization, fourier_image, image_axes
from jaxalign.interpretability.image_transformations import Transformation, robust_transformations, transformed
from jaxalign.types import Array, Key


class Visualization(NamedTuple):
    """images: the `shape` asked for, within the parameterisation's bounds
    value: the objective of these images as they are, scalar or [N]
    history: [steps] or [steps, N] the objective of the transformed images before each step
    """

    images: Array
    value: Array
    history: Array


def feature_visualization(
    key: Key,
    objective: Callable[[Array], Array],
    shape: tuple[int, ...],
    *,
    steps: int = 256,
    optimizer: optax.GradientTransformation | None = None,
    transforms: Sequence[Transformation] | None = None,
    parameterization: ImageParameterization | None = None,
) -> Visualization:
    """Images that maximise an objective, robustly under small transformations (Olah et al. 2017).

    `params <- params + optimizer(d sum(objective(T(image(params)))) / d params)`, T drawn anew at each step and for
    each image.

    Args:
        objective: images of `shape` -> a scalar or [N]; see `visualization_objectives`.
        shape: [H, W], [H, W, C], or [N, H, W, C] for several images at once.
        optimizer: Optax; None is Adam with step 5e-2.
        transforms: see `image_transformations`; None is `robust_transformations(pixels=max(1, min(H, W) // 16))`, and
            () leaves images as they are.
        parameterization: None is `fourier_image(shape)`.

    Pure: vmap over keys draws several, jit compiles one loop. Raises ValueError on a shape that is no image's, and if
    the transformations change it.
    """
    parameterization = parameterization or fourier_image(shape)
    optimizer = optimizer or optax.adam(5e-2)
    axes = image_axes(shape)
    if transforms is None:
        transforms = robust_transformations(pixels=max(1, min(axes[1:3]) // 16))
    init_key, run_key = jax.random.split(key)

    def change(step_key: Key, images: Array) -> Array:
        keys = jax.random.split(step_key, axes[0])
        changed = jax.vmap(lambda k, image: transformed(k, image, transforms))(keys, images.reshape(axes))
        return changed.reshape(shape)

    def loss(params: Any, step_key: Key) -> tuple[Array, Array]:
        value = objective(change(step_key, parameterization.image(params)))
        return -jnp.sum(value), value

    def step(carry: tuple[Any, Any], step_key: Key) -> tuple[tuple[Any, Any], Array]:
        params, opt_state = carry
        gradient, value = jax.grad(loss, has_aux=True)(params, step_key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    params = parameterization.init(init_key)
    (params, _), history = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(run_key, steps))
    images = parameterization.image(params)
    return Visualization(images, objective(images), history)
