"""What a picture should maximise: logits, neurons, channels, directions, SAE latents, and terms to add to them.

Each function here returns an objective, images [N, H, W, C] -> [N], for `feature_visualization`. `apply` maps images to
outputs and has named sites inside (`jaxalign.networks.sites.site`); values at a site are [N, ..., F], and other axes
than the last are averaged over. An index may be [N], one for each image, so that one run draws many features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.interpretability.activations import capture_function
from jaxalign.types import Array, ArrayLike

Objective = Callable[[Array], Array]
Apply = Callable[[Array], Any]


def logit_objective(apply: Apply, index: ArrayLike) -> Objective:
    """`apply(images)[n, index[n]]`, for outputs [N, O]."""
    return lambda images: _chosen(apply(_batched(images)), index)


def channel_objective(apply: Apply, site: str, index: ArrayLike) -> Objective:
    """The mean over places of `activation[n, ..., index[n]]`: a convolution's channel, or a unit of a dense layer."""
    return lambda images: _chosen(_mean_over_places(_read(apply, site, images)), index)


def neuron_objective(apply: Apply, site: str, place: tuple[ArrayLike, ...]) -> Objective:
    """`activation[n, *place]`: one unit at one place, (row, column, channel) in a convolution's [N, h, w, K].

    Raises ValueError if `place` does not index every axis after the first.
    """

    def objective(images: Array) -> Array:
        value = _read(apply, site, images)
        if value.ndim != 1 + len(place):
            raise ValueError(f"neuron_objective: {site} is {value.shape}; {place} is no place in {value.shape[1:]}")
        return value[(slice(None), *place)]

    return objective


def direction_objective(apply: Apply, site: str, direction: Array, *, cosine_power: ArrayLike = 0.0) -> Objective:
    """`mean over places of (a . v) max(0.1, cos(a, v))^cosine_power`, v = `direction` [F].

    A power above 0 asks for activations along v alone rather than large ones with v among others (Olah et al. 2017).
    """

    def objective(images: Array) -> Array:
        value = _read(apply, site, images)
        along = value @ direction
        cosine = along / jnp.maximum(jnp.linalg.norm(value, axis=-1) * jnp.linalg.norm(direction), 1e-6)
        return jnp.mean((along * jnp.maximum(0.1, cosine) ** cosine_power).reshape(len(images), -1), axis=1)

    return objective


def latent_objective(apply: Apply, site: str, encode: Callable[[Array], Array], index: ArrayLike) -> Objective:
    """The mean over places of feature `index[n]` of `encode(activations [B, D]) -> [B, F]`.

    For a sparse autoencoder: `encode = lambda x: sae_encode(params, x, config)`. Where a latent is silent it has no
    gradient to climb; give the pre-activations then, or start from `direction_objective` on its encoder's column.
    """

    def objective(images: Array) -> Array:
        value = _read(apply, site, images)
        features = encode(value.reshape(-1, value.shape[-1]))
        return _chosen(_mean_over_places(features.reshape(*value.shape[:-1], -1)), index)

    return objective


def diversity(apply: Apply, site: str) -> Objective:
    """Minus the mean cosine similarity of an image's style to the other images' styles, in [-1, 1]; N >= 2.

    The style is the Gram matrix `sum over places of a a^T` of the activations [N, ..., F] (Olah et al. 2017). Added to
    an objective, it draws different faces of one feature.
    """

    def objective(images: Array) -> Array:
        value = _read(apply, site, images)
        flat = value.reshape(len(value), -1, value.shape[-1])
        style = jnp.einsum("npf,npg->nfg", flat, flat).reshape(len(value), -1)
        # A silent image has the style 0, where the norm has no gradient.
        unit = style / jnp.sqrt(jnp.sum(style**2, axis=1, keepdims=True) + 1e-12)
        similar = unit @ unit.T * (1 - jnp.eye(len(unit), dtype=unit.dtype))
        return -jnp.sum(similar, axis=1) / max(len(unit) - 1, 1)

    return objective


def smoothness(images: Array) -> Array:
    """Minus the total variation, `-mean over places of (|x[i+1, j] - x[i, j]| + |x[i, j+1] - x[i, j]|)`, as [N]."""
    images = _batched(images)
    differences = (jnp.abs(jnp.diff(images, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2))
    return -sum(differences, jnp.zeros(len(images), images.dtype))


def weighted(*terms: tuple[ArrayLike, Objective]) -> Objective:
    """`sum over (weight, objective) of weight * objective(images)`, as [N]."""
    return lambda images: sum(weight * objective(images) for weight, objective in terms)


def _read(apply: Apply, site: str, images: Array) -> Array:
    return capture_function(apply, [site])(_batched(images))[1][site]


def _mean_over_places(value: Array) -> Array:
    """[N, ..., F] -> [N, F]."""
    return jnp.mean(value.reshape(value.shape[0], -1, value.shape[-1]), axis=1)


def _chosen(values: Array, index: ArrayLike) -> Array:
    """values[n, index[n]] of [N, F], as [N]."""
    return jax.vmap(lambda row, i: row[i])(values, jnp.broadcast_to(jnp.asarray(index), (len(values),)))


def _batched(images: Array) -> Array:
    if images.ndim != 4:
        raise ValueError(f"this objective needs images [N, H, W, C], got {images.shape}; give such a shape to draw")
    return images
