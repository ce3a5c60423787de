"""An activation that changes no norm: the numbers of each group, sorted."""

import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


def group_sort(x: ArrayLike, group_size: int = 2) -> Array:
    """Each `group_size` consecutive numbers of x[..., F] in rising order; `group_size` 2 is MaxMin.

    y[..., g] = sort(x[..., g]) for every group g. A permutation near almost every point: it is 1-Lipschitz in every Lp
    norm and passes gradients on with their norm unchanged, where ReLU drops some (Anil, Lucas & Grosse 2019, "Sorting
    out Lipschitz function approximation", arXiv:1811.05381, section 4.1).

    Raises ValueError unless `group_size` is at least 1 and divides F.
    """
    x = jnp.asarray(x)
    if x.ndim < 1 or group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"group_sort: group_size {group_size} does not divide the last axis of {x.shape}")
    return jnp.sort(x.reshape(*x.shape[:-1], -1, group_size), axis=-1).reshape(x.shape)
