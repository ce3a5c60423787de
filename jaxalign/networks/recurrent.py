"""A recurrent layer: a memory that is carried from step to step and emptied where an episode begins."""

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.networks.initializers import orthogonal
from jaxalign.types import Array


class GRU(nn.Module):
    """One step of gated recurrent units: (memory [..., M], x [..., I], starts bool [...]) -> memory [..., M].

    The memory of rows that start anew is set to 0 first; the new memory is also the output. Kernels are orthogonal,
    biases zero; no linear-algebra library is called. Cho et al., arXiv:1406.1078.
    """

    size: int

    @nn.compact
    def __call__(self, memory: Array, x: Array, starts: Array) -> Array:
        cell = nn.GRUCell(self.size, kernel_init=orthogonal(), recurrent_kernel_init=orthogonal())
        memory, _ = cell(jnp.where(starts[..., None], 0.0, memory), x)
        return memory
