"""Networks that make images: from a latent vector, and from another image."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.networks.convolution import convolve
from jaxalign.networks.dense import Dense
from jaxalign.networks.mlp import MLP
from jaxalign.types import Array

HE_NORMAL = nn.initializers.he_normal()


class Generator(nn.Module):
    """latents [B, D] -> images [B, *image_shape] in (0, 1); with `num_classes`, (latents, labels [B] int) -> images.

    A dense layer to [B, H / 2^n, W / 2^n, channels[0]]; then for each of the n `channels` the image is doubled by
    repeating pixels and convolved, 3x3 (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts": no transposed
    convolution); then a convolution to C channels and a sigmoid. Without `channels` it is an MLP of `hidden_sizes`.
    Labels enter as one-hot vectors beside the latents. Raises ValueError if H or W is not a multiple of 2^n.
    """

    image_shape: tuple[int, int, int]
    channels: Sequence[int] = (64, 32)
    hidden_sizes: Sequence[int] = ()
    num_classes: int | None = None
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, latents: Array, labels: Array | None = None) -> Array:
        height, width, depth = self.image_shape
        scale = 2 ** len(self.channels)
        if height % scale or width % scale:
            raise ValueError(f"Generator: {height} x {width} must be multiples of {scale}, channels {self.channels}")
        x = latents if self.num_classes is None else jnp.concatenate([latents, one_hot(labels, self.num_classes)], 1)
        first = self.channels[0] if self.channels else depth
        x = MLP((*self.hidden_sizes, height // scale * (width // scale) * first), self.activation)(x)
        x = x.reshape(-1, height // scale, width // scale, first)
        for features in self.channels:
            x = convolution(features)(doubled(self.activation(x)))
        if self.channels:
            x = convolution(depth)(self.activation(x))
        return jax.nn.sigmoid(x)


class ImageToImage(nn.Module):
    """images [B, H, W, C] -> [B, H, W, C] without bounds: the generator of a perturbation for each image.

    Each of `channels` halves the image by a convolution of stride 2; a dense layer of `hidden_size` joins everything;
    then each doubles it again, the input of that size put beside it (Ronneberger et al. 2015, arXiv:1505.04597).
    H and W must be multiples of 2^len(channels). The last convolution starts small, so the first outputs are near 0.
    """

    channels: Sequence[int] = (16, 32)
    hidden_size: int = 64
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if images.ndim != 4:
            raise ValueError(f"ImageToImage: images must be [B, H, W, C], got shape {images.shape}")
        x, skipped = images, []
        for features in self.channels:
            skipped.append(x)
            x = self.activation(convolution(features, strides=(2, 2))(x))
        flat = self.activation(Dense(self.hidden_size, dtype=x.dtype)(x.reshape(x.shape[0], -1)))
        x = self.activation(Dense(math.prod(x.shape[1:]), dtype=x.dtype)(flat)).reshape(x.shape)
        for features, beside in zip(reversed(self.channels), reversed(skipped), strict=True):
            x = self.activation(convolution(features)(jnp.concatenate([doubled(x), beside], axis=-1)))
        return convolution(images.shape[-1], kernel_init=nn.initializers.normal(0.01))(x)


def convolution(
    features: int,
    *,
    strides: tuple[int, int] = (1, 1),
    kernel_init: nn.initializers.Initializer = HE_NORMAL,
) -> nn.Conv:
    """A 3x3 convolution of [B, H, W, C] with SAME padding, through `convolve`."""
    return nn.Conv(features, (3, 3), strides=strides, kernel_init=kernel_init, conv_general_dilated=convolve)


def doubled(images: Array) -> Array:
    """Each pixel four times: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    return jnp.repeat(jnp.repeat(images, 2, axis=1), 2, axis=2)


def one_hot(labels: Array | None, num_classes: int) -> Array:
    """Labels [B] as [B, num_classes]. Raises ValueError where a conditional network is called without labels."""
    if labels is None:
        raise ValueError("a network with num_classes needs labels [B]")
    return jax.nn.one_hot(labels, num_classes)
