"""A multilayer perceptron."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.networks.dense import Dense
from jaxalign.networks.initializers import orthogonal
from jaxalign.types import Array


class MLP(nn.Module):
    """Dense layers with `activation` between them: x[..., I] -> [..., layer_sizes[-1]].

    Kernels are orthogonal, scaled by sqrt(2) before an activation and by `final_scale` at the output; biases are zero.
    Use it as a Network with `Network.from_linen(MLP((64, 64, 2)), x)`.
    """

    layer_sizes: Sequence[int]
    activation: Callable[[Array], Array] = nn.relu
    final_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for size in self.layer_sizes[:-1]:
            x = self.activation(Dense(size, dtype=x.dtype, kernel_init=orthogonal(jnp.sqrt(2.0)))(x))
        return Dense(self.layer_sizes[-1], dtype=x.dtype, kernel_init=orthogonal(self.final_scale))(x)
