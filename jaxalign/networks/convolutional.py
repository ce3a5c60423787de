"""A small convolutional network for images."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.networks.convolution import convolve
from jaxalign.networks.mlp import MLP
from jaxalign.networks.sites import site
from jaxalign.types import Array


class ConvNet(nn.Module):
    """Square convolutions, each followed by `activation` and halving by stride 2, then an MLP.

    images[B, H, W] or [B, H, W, C] -> outputs[B, num_outputs]. `channels` has one entry per convolution; H and W need
    not be multiples of 2^len(channels) (padding is SAME). `convolution` has the arguments of
    `lax.conv_general_dilated`; the default is the faster one on CPUs, save where bounds go through it in training.
    Its sites are `conv_0`, `conv_post_0`, ... (each convolution before and after its activation), then the MLP's.
    """

    num_outputs: int
    channels: Sequence[int] = (16, 32)
    hidden_sizes: Sequence[int] = (100,)
    activation: Callable[[Array], Array] = nn.relu
    kernel_size: int = 3
    convolution: Callable[..., Array] = convolve

    @nn.compact
    def __call__(self, images: Array) -> Array:
        if images.ndim not in (3, 4):
            raise ValueError(f"ConvNet: images must be [B, H, W] or [B, H, W, C], got shape {images.shape}")
        x = images if images.ndim == 4 else images[..., None]
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for i, features in enumerate(self.channels):
            conv = nn.Conv(
                features, (self.kernel_size,) * 2, strides=(2, 2), kernel_init=nn.initializers.he_normal(),
                dtype=x.dtype, conv_general_dilated=self.convolution,
            )  # fmt: skip
            x = site(self.activation(site(conv(x), f"conv_{i}")), f"conv_post_{i}")
        return MLP((*self.hidden_sizes, self.num_outputs), self.activation)(x.reshape(x.shape[0], -1))
