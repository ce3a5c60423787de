"""A network that tells real images from made ones."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.networks.dense import Dense
from jaxalign.networks.generator import convolution, one_hot
from jaxalign.networks.initializers import orthogonal
from jaxalign.types import Array


def leaky(x: Array) -> Array:
    """max(x, 0.2 x) on [...], the usual activation of a discriminator."""
    return jax.nn.leaky_relu(x, 0.2)


class Discriminator(nn.Module):
    """images [B, H, W, C] in [0, 1] -> logits [B]; with `num_classes`, (images, labels [B] int) -> logits.

    A 3x3 convolution of stride 2 for each of `channels`, then dense layers of `hidden_sizes`, then one output; without
    `channels` an MLP. No normalisation layer, so that each output depends on its own row alone, which the gradient
    penalties need. Labels enter by projection: logit += <embedding of the label, last hidden layer>
    (Miyato & Koyama 2018, arXiv:1802.05637, equation 3).
    """

    channels: Sequence[int] = (32, 64)
    hidden_sizes: Sequence[int] = ()
    num_classes: int | None = None
    activation: Callable[[Array], Array] = leaky

    @nn.compact
    def __call__(self, images: Array, labels: Array | None = None) -> Array:
        x = 2.0 * images - 1.0  # centred
        for features in self.channels:
            x = self.activation(convolution(features, strides=(2, 2))(x))
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden_sizes:
            x = self.activation(Dense(size, dtype=x.dtype, kernel_init=orthogonal(jnp.sqrt(2.0)))(x))
        logits = Dense(1, dtype=x.dtype, kernel_init=orthogonal())(x)[:, 0]
        if self.num_classes is not None:
            embedding = Dense(x.shape[-1], use_bias=False, dtype=x.dtype, name="label")
            logits = logits + jnp.sum(embedding(one_hot(labels, self.num_classes)) * x, axis=1)
        return logits
