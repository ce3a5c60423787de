"""Convolution as a matrix product where that is faster: on CPUs, above all inside loops."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxalign.types import Array

MOST_SHIFTS = 64  # window positions beyond which the copies of the input cost more than they save


def convolve(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`lax.conv_general_dilated` with its arguments and its result; on a CPU, one matrix product.

    `out[b, p, o] = sum over shifts k and channels i of lhs[b, p stride + k, i] rhs[k, i, o]`: the shifted copies of the
    input side by side, [B, P, K I], times the kernel as a matrix [K I, O]. XLA's own CPU convolution takes up to twice
    as long, and several times that inside a loop. Dilated inputs, groups, more than 64 window positions and other
    backends are left to XLA. In a Flax network: `nn.Conv(features, (3, 3), conv_general_dilated=convolve)`.

    Args:
        lhs: input [B, ..., I] or in the order that `dimension_numbers` gives.
        rhs: kernel [..., I, O] or likewise.

    The others are those of `lax.conv_general_dilated`.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    window = [rhs.shape[axis] for axis in numbers.rhs_spec[2:]]
    plain = (
        feature_group_count == batch_group_count == 1
        and all(d == 1 for d in lhs_dilation or ())
        and math.prod(window) <= MOST_SHIFTS
    )
    if not plain or jax.default_backend() != "cpu":
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, numbers, feature_group_count,
            batch_group_count, precision, preferred_element_type,
        )  # fmt: skip
    dilation = tuple(rhs_dilation or (1,) * len(window))
    if isinstance(padding, str):
        reach = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
        sizes = [lhs.shape[axis] for axis in numbers.lhs_spec[2:]]
        padding = lax.padtype_to_pads(sizes, reach, window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _product(lhs, rhs, tuple(window_strides), pads, dilation, numbers, precision, preferred_element_type)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7), inline=True)  # called outside a trace, one compilation
def _product(
    lhs: Array, rhs: Array, strides: Any, padding: Any, dilation: Any, numbers: Any, precision: Any, dtype: Any
) -> Array:
    images = jnp.transpose(lhs, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    kernel = jnp.transpose(rhs, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    patches = _patches(images, kernel.shape[:-2], strides, padding, dilation)
    rows, columns = patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, kernel.shape[-1])
    out = jnp.matmul(rows, columns, precision=precision, preferred_element_type=dtype)
    out = out.reshape(*patches.shape[:-1], kernel.shape[-1])
    places = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return jnp.transpose(out, [places.index(axis) for axis in range(out.ndim)])


def _patches(
    images: Array, window: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Any
) -> Array:
    """The shifted copies of images [B, ..., I] side by side: [B, P..., K I], K window positions in row-major order."""
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *((lo, hi, 0) for lo, hi in padding), (0, 0, 0)])
    reach = [(w - 1) * d for w, d in zip(window, dilation, strict=True)]
    sizes = [(n - r - 1) // s + 1 for n, r, s in zip(padded.shape[1:-1], reach, strides, strict=True)]
    shifts = [()]
    for w, d in zip(window, dilation, strict=True):
        shifts = [(*shift, k * d) for shift in shifts for k in range(w)]
    copies = []
    for shift in shifts:
        ends = [start + (n - 1) * s + 1 for start, n, s in zip(shift, sizes, strides, strict=True)]
        begin, end = (0, *shift, 0), (padded.shape[0], *ends, padded.shape[-1])
        copies.append(lax.slice(padded, begin, end, (1, *strides, 1)))
    return jnp.concatenate(copies, axis=-1)
