"""Images as functions of unbounded parameters, for optimisation by gradients: pixels, or their Fourier coefficients."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike, Key

Bounds = tuple[ArrayLike, ArrayLike]


class ImageParameterization(NamedTuple):
    """init(key) -> params, a random start; image(params) -> image [H, W], [H, W, C] or [N, H, W, C] within bounds."""

    init: Callable[[Key], Any]
    image: Callable[[Any], Array]


def pixel_image(
    shape: tuple[int, ...], *, deviation: ArrayLike = 0.01, bounds: Bounds = (0.0, 1.0)
) -> ImageParameterization:
    """`image = low + (high - low) * sigmoid(params)`, params [H, W], [H, W, C] or [N, H, W, C] = `shape`.

    Args:
        deviation: of the normal start, before the sigmoid; 0 starts from plain grey.
        bounds: (low, high), never quite reached.
    """
    image_axes(shape)
    return ImageParameterization(
        lambda key: deviation * jax.random.normal(key, shape), lambda params: _within(params, bounds)
    )


def fourier_image(
    shape: tuple[int, ...],
    *,
    decay: ArrayLike = 1.0,
    deviation: ArrayLike = 0.01,
    colours: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> ImageParameterization:
    """An image by its Fourier coefficients, divided by frequency so that no spatial scale is preferred.

    `image = low + (high - low) * sigmoid(irfft2(s * (real + i imaginary)) @ colours.T)` with
    `s = max(frequency, 1 / max(H, W))^-decay`, scaled so that the sigmoid's argument begins with `deviation`. Gradient
    ascent in these coordinates gives smooth pictures where in pixels it gives noise (Olah, Mordvintsev & Schubert 2017,
    "Feature visualization", section "Preconditioning and parameterization").

    Args:
        shape: [H, W], [H, W, C] or [N, H, W, C].
        decay: 1 is natural images' 1 / f amplitude; larger is smoother.
        colours: [C, C] from uncorrelated channels to colours, such as `colour_root` of training images; None leaves
            channels as they are.

    The transform is two matrix products with cosines and sines, O(H W (H + W)), which under vmap and in loops runs on
    every backend. Parameters: {"real", "imaginary"}, each [N, H, W // 2 + 1, C].
    """
    images, height, width, channels = image_axes(shape)
    columns = width // 2 + 1
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency = np.maximum(frequency, 1 / max(height, width))
    # Columns that stand for their mirror image too count twice.
    mirrored = np.where((np.arange(columns) == 0) | (2 * np.arange(columns) == width), 1.0, 2.0)
    (cos_rows, sin_rows), (cos_columns, sin_columns) = _waves(height, height), _waves(width, columns)

    def init(key: Key) -> dict[str, Array]:
        keys = jax.random.split(key)
        size = (images, height, columns, channels)
        names = ("real", "imaginary")
        return {name: deviation * jax.random.normal(k, size) for name, k in zip(names, keys, strict=True)}

    def image(params: dict[str, Array]) -> Array:
        power = jnp.asarray(frequency, params["real"].dtype) ** -decay
        scale = power / jnp.sqrt(jnp.sum((power * mirrored[None, :]) ** 2))
        real, imaginary = (params[name] * scale[None, :, :, None] for name in ("real", "imaginary"))
        rows = [
            jnp.einsum("hk,nklc->nhlc", cos_rows, real) - jnp.einsum("hk,nklc->nhlc", sin_rows, imaginary),
            jnp.einsum("hk,nklc->nhlc", sin_rows, real) + jnp.einsum("hk,nklc->nhlc", cos_rows, imaginary),
        ]
        raw = jnp.einsum("wl,nhlc->nhwc", cos_columns * mirrored, rows[0])
        raw = raw - jnp.einsum("wl,nhlc->nhwc", sin_columns * mirrored, rows[1])
        if colours is not None:
            raw = jnp.einsum("dc,nhwc->nhwd", jnp.asarray(colours, raw.dtype), raw)
        return _within(raw, bounds).reshape(shape)

    return ImageParameterization(init, image)


def colour_root(images: ArrayLike) -> Array:
    """[C, C] R with R R^T proportional to the covariance of the colours of images [N, H, W, C], for `fourier_image`.

    Its largest column has norm 1. Raises ValueError if images are not of rank 4.
    """
    pixels = jnp.asarray(images)
    if pixels.ndim != 4:
        raise ValueError(f"colour_root: needs images [N, H, W, C], got {pixels.shape}")
    centred = pixels.reshape(-1, pixels.shape[-1]) - jnp.mean(pixels, axis=(0, 1, 2))[None, :]
    values, vectors = jnp.linalg.eigh(centred.T @ centred)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    return root / jnp.max(jnp.linalg.norm(root, axis=0))


def image_axes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(N, H, W, C) of a shape [H, W], [H, W, C] or [N, H, W, C]. Raises ValueError if it is none of these."""
    if len(shape) not in (2, 3, 4) or not all(n >= 1 for n in shape):
        raise ValueError(f"an image is [H, W], [H, W, C] or [N, H, W, C]; got the shape {tuple(shape)}")
    height, width, channels = (*shape, 1) if len(shape) == 2 else shape[-3:]
    return math.prod(shape[:-3]), height, width, channels


def _waves(places: int, frequencies: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of 2 pi p f / places, each [places, frequencies]."""
    angle = 2 * np.pi * (np.outer(np.arange(places), np.arange(frequencies)) % places) / places
    return np.cos(angle), np.sin(angle)


def _within(raw: Array, bounds: Bounds) -> Array:
    low, high = bounds
    return low + (high - low) * jax.nn.sigmoid(raw)
