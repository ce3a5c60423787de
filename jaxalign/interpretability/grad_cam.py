"""Grad-CAM: where in an image a convolution saw what speaks for an output."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.interpretability.activations import site_gradients
from jaxalign.interpretability.attribution import checked_output
from jaxalign.types import Array


def grad_cam(fn: Callable[[Any], Array], images: Array, site: str, *, size: tuple[int, int] | None = None) -> Array:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, equations 1 and 2).

    `relu(sum over k of weight[b, k] A[b, :, :, k])`, weight[b, k] the mean over places of d fn(images)[b] / d A, where
    A [B, h, w, K] is the activation at `site`, such as "conv_post_1" of our ConvNet.

    Args:
        fn: images -> [B], the output to explain, with sites inside (see `jaxalign.networks.sites.site`).
        images: [B, H, W, C].
        size: (H, W) to which the map is enlarged bilinearly; None leaves it as coarse as A.

    Returns [B, h, w] or [B, *size] in units of fn per place. Raises ValueError on an unknown site, listing those there
    are, and on one that is not [B, h, w, K].
    """
    _, activations, gradients = site_gradients(lambda x: jnp.sum(checked_output(fn(x), x)), [site])(images)
    seen, gradient = activations[site], gradients[site]
    if seen.ndim != 4 or seen.shape[0] != images.shape[0]:
        raise ValueError(f"grad_cam: {site} is {seen.shape}; needs a convolution's [B, h, w, K]")
    weight = jnp.mean(gradient, axis=(1, 2))
    cam = jax.nn.relu(jnp.einsum("bhwk,bk->bhw", seen, weight))
    return cam if size is None else jax.image.resize(cam, (len(cam), *size), "bilinear")
