"""Small random changes `(key, image[H, W, C]) -> image[H', W', C]` under which a feature should persist."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike, Key

Transformation = Callable[[Key, Array], Array]


def pad(width: int, *, value: ArrayLike = 0.5) -> Transformation:
    """`width` pixels of one value on every side: [H, W, C] -> [H + 2 width, W + 2 width, C]."""
    return lambda key, image: jnp.pad(image, ((width, width), (width, width), (0, 0)), constant_values=value)


def jitter(most: int) -> Transformation:
    """A random crop that takes away `most` pixels: [H, W, C] -> [H - most, W - most, C]."""

    def crop(key: Key, image: Array) -> Array:
        height, width, channels = image.shape
        if most >= min(height, width):
            raise ValueError(f"jitter: {most} pixels cannot be taken from an image {image.shape}")
        row, column = jax.random.randint(key, (2,), 0, most + 1)
        return jax.lax.dynamic_slice(image, (row, column, 0), (height - most, width - most, channels))

    return crop


def random_scale(smallest: ArrayLike, largest: ArrayLike) -> Transformation:
    """Enlarged about the centre by a uniform factor, [H, W, C] as before; bilinear, the border repeated outside."""

    def scale(key: Key, image: Array) -> Array:
        factor = jax.random.uniform(key, minval=smallest, maxval=largest)
        return _resampled(image, jnp.eye(2) / factor)

    return scale


def random_rotation(degrees: ArrayLike) -> Transformation:
    """Turned about the centre by a uniform angle of at most `degrees`, [H, W, C] as before; bilinear."""

    def rotate(key: Key, image: Array) -> Array:
        angle = jnp.deg2rad(jax.random.uniform(key, minval=-1.0) * degrees)
        return _resampled(image, jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]]))

    return rotate


def robust_transformations(
    *,
    pixels: int = 1,
    scales: tuple[ArrayLike, ArrayLike] = (0.9, 1.1),
    degrees: ArrayLike = 10.0,
    background: ArrayLike = 0.5,
) -> tuple[Transformation, ...]:
    """Padding with `background`, jitter, scale, rotation, jitter: together they leave the size [H, W, C] as it was."""
    shift = jitter(pixels)
    return pad(pixels, value=background), shift, random_scale(*scales), random_rotation(degrees), shift


def transformed(key: Key, image: Array, transformations: Sequence[Transformation]) -> Array:
    """The image [H, W, C] after all of them in turn. Raises ValueError if its shape is not what it was."""
    result = image
    for transformation, its_key in zip(transformations, jax.random.split(key, len(transformations) or 1), strict=False):
        result = transformation(its_key, result)
    if result.shape != image.shape:
        raise ValueError(f"the transformations turn an image {image.shape} into {result.shape}; pad as jitter crops")
    return result


def _resampled(image: Array, matrix: Array) -> Array:
    """image[centre + matrix @ (place - centre)] by bilinear interpolation, places outside moved to the border."""
    size = jnp.array(image.shape[:2])
    centre = ((size - 1) / 2)[:, None]
    places = jnp.indices(image.shape[:2]).reshape(2, -1)
    at = jnp.clip(matrix @ (places - centre) + centre, 0, (size - 1)[:, None])
    corner = jnp.minimum(at.astype(jnp.int32), jnp.maximum(size - 2, 0)[:, None])
    part = at - corner  # [2, P] in [0, 1]
    # All four corners in one gather: four would take XLA four times as long to compile.
    rows, columns = (jnp.stack([first, jnp.minimum(first + 1, n - 1)]) for first, n in zip(corner, size, strict=True))
    corners = image.reshape(-1, image.shape[2])[rows[:, None] * size[1] + columns[None, :]]  # [2, 2, P, C]
    weights = jnp.stack([1 - part, part], axis=1)  # [2, 2, P]: rows or columns, first or second
    return jnp.einsum("ap,bp,abpc->pc", weights[0], weights[1], corners).reshape(image.shape).astype(image.dtype)
