"""The exact k-th largest of many numbers for a k that may be traced: one program serves every k."""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike

MOST_SLICES = 96  # that are summed in one expression


def ordered_bits(x: Array) -> Array:
    """Unsigned integers of x's width [...] in the order of the floats x [...]; NaN is above infinity, -0 below +0."""
    width = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{width}")
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    sign = jnp.asarray(1 << (width - 1), unsigned)
    # A NaN counts as positive whatever its sign bit, as lax.top_k has it.
    negative = (bits >= sign) & ~jnp.isnan(x)
    return jnp.where(negative, ~bits, bits | sign)


def _floats(bits: Array, dtype: jnp.dtype) -> Array:
    """Undo `ordered_bits`."""
    sign = jnp.asarray(1 << (jnp.finfo(dtype).bits - 1), bits.dtype)
    return jax.lax.bitcast_convert_type(jnp.where(bits >= sign, bits ^ sign, ~bits), dtype)


def _count(above: Array) -> Array:
    """How many of above [..., N] are true, [...].

    A CPU sums a last axis one number after another; sums of slices beside each other go through its vector units, three
    times faster in all.
    """
    lanes = 64 if above.shape[-1] >= 1024 else 16
    while above.shape[-1] > lanes and jax.default_backend() == "cpu":
        lead, pieces = above.shape[:-1], -(-above.shape[-1] // lanes)
        blocks = -(-pieces // MOST_SLICES)
        slices = -(-pieces // blocks)
        padding = blocks * slices * lanes - above.shape[-1]
        above = jnp.pad(above, [(0, 0)] * len(lead) + [(0, padding)]).reshape(*lead, blocks, slices, lanes)
        above = sum(above[..., i, :].astype(jnp.int32) for i in range(slices)).reshape(*lead, blocks * lanes)
    return above.sum(axis=-1, dtype=jnp.int32)


def kth_largest(x: ArrayLike, k: ArrayLike, *, axis_name: str | None = None) -> Array:
    """The k-th largest of x [..., N] along its last axis, [...]: `lax.top_k(x, k)[0][..., -1]`, to the bit.

    The answer's bits are found from the highest down: a bit is set if at least k numbers are still as large, floats
    being compared as the integers of the same order. That is one pass over x for each bit and no sort.

    Args:
        x: [..., N] floats.
        k: scalar or [...], integers in 1..N; may be traced. Below 1 counts as 1, above N as N.
        axis_name: a mesh axis over which N is divided, inside `shard_map`; counts are summed over it.

    The gradient is taken as zero. Raises ValueError if x has no last axis or it is empty.
    """
    x = jax.lax.stop_gradient(jnp.asarray(x))
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"kth_largest: x needs at least one number along its last axis, its shape is {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"kth_largest: x must be floating, it is {x.dtype}")
    bits = ordered_bits(x)
    total = x.shape[-1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    k = jnp.clip(jnp.asarray(k), 1, total).astype(jnp.int32)
    width = jnp.finfo(x.dtype).bits

    def settle(i: Array, low: Array) -> Array:
        trial = low | (jnp.ones((), bits.dtype) << (width - 1 - i).astype(bits.dtype))
        count = _count(bits >= trial[..., None])
        if axis_name is not None:
            count = jax.lax.psum(count, axis_name)
        return jnp.where(count >= k, trial, low)

    # Inside shard_map these vary over the mesh if the counts do.
    zeros = jnp.zeros(x.shape[:-1], bits.dtype) if axis_name is not None else bits[..., 0] ^ bits[..., 0]
    low = jax.lax.fori_loop(0, width, settle, zeros)
    return _floats(low, x.dtype)
