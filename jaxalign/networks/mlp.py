"""A multilayer perceptron."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.networks.dense import Dense
from jaxalign.networks.initializers import orthogonal
from jaxalign.networks.sites import site
from jaxalign.types import Array


class MLP(nn.Module):
    """Dense layers with `activation` between them: x[..., I] -> [..., layer_sizes[-1]].

    Kernels are orthogonal, scaled by sqrt(2) before an activation and by `final_scale` at the output; biases are zero.
    Use it as a Network with `Network.from_linen(MLP((64, 64, 2)), x)`. Its sites are `pre_0`, `post_0`, `pre_1`, ...:
    each layer before and after its activation; the last `pre` is the output.
    """

    layer_sizes: Sequence[int]
    activation: Callable[[Array], Array] = nn.relu
    final_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, size in enumerate(self.layer_sizes[:-1]):
            x = site(Dense(size, dtype=x.dtype, kernel_init=orthogonal(jnp.sqrt(2.0)))(x), f"pre_{i}")
            x = site(self.activation(x), f"post_{i}")
        x = Dense(self.layer_sizes[-1], dtype=x.dtype, kernel_init=orthogonal(self.final_scale))(x)
        return site(x, f"pre_{len(self.layer_sizes) - 1}")
