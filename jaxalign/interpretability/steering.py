"""Steering: adding a direction to the residual stream while the model runs."""

import chex
import jax.numpy as jnp

from jaxalign.algorithm import Network
from jaxalign.interpretability.activations import capture_function, patch
from jaxalign.types import Array, ArrayLike, Params


def steering_vector(
    network: Network,
    params: Params,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    site: str,
    positive_mask: ArrayLike | None = None,
    negative_mask: ArrayLike | None = None,
) -> Array:
    """Mean activation on texts that show a trait minus that on texts that show its opposite: [D].

    vector = mean_{b, t: mask} x_positive[b, t] - mean_{b, t: mask} x_negative[b, t], x = the value at `site`
    (Turner et al. 2023, arXiv 2308.10248; Rimsky et al. 2023, arXiv 2312.06681, section 3).

    Args:
        positive, negative: tokens [B, T], [B', T'].
        site: one occurrence of a site [B, T, D], such as "resid_post[15]".
        positive_mask, negative_mask: [B, T], [B', T'], the positions that count; None: the last of each text.

    Raises ValueError naming the sites if there is no such site, or the mask whose shape is not its tokens'.
    """

    def mean(name: str, tokens: ArrayLike, mask: ArrayLike | None) -> Array:
        tokens = jnp.asarray(tokens)
        chex.assert_rank(tokens, 2)
        last = jnp.arange(tokens.shape[1])[None] == tokens.shape[1] - 1
        weights = jnp.broadcast_to(last, tokens.shape) if mask is None else jnp.asarray(mask)
        if weights.shape != tokens.shape:
            raise ValueError(f"steering_vector: {name}_mask is {weights.shape}, {name} is {tokens.shape}")
        x = capture_function(network.apply, (site,))(params, tokens)[1][site]
        chex.assert_rank(x, 3)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.einsum("btd,bt->d", x, weights.astype(x.dtype)) / jnp.sum(weights)

    return mean("positive", positive, positive_mask) - mean("negative", negative, negative_mask)


def steer(network: Network, site: str, vector: ArrayLike, scale: ArrayLike = 1.0, *, keep_first: int = 0) -> Network:
    """The network with x[B, T, D] + scale * vector[D] for x at a site, from position `keep_first` on.

    Of a LanguageModel `decode` is steered too (at every position: it cannot tell the first), so `rlhf.generate` speaks
    steered. `scale` may be traced and swept.
    """
    vector = jnp.asarray(vector)

    def add(x: Array) -> Array:
        later = (jnp.arange(x.shape[1]) >= keep_first) | (x.shape[1] == 1)
        return x + scale * later[None, :, None] * vector[None, None]

    return patch(network, {site: add})


def project_out(network: Network, site: str, direction: ArrayLike) -> Network:
    """The network without one direction d [D] at a site: x - (x . d) d / ||d||^2 for x[B, T, D]; in every layer if the
    site names none.

    Arditi et al. 2024, arXiv 2406.11717, equation 4.
    """
    direction = jnp.asarray(direction)
    unit = direction / jnp.linalg.norm(direction)

    def remove(x: Array) -> Array:
        along = jnp.einsum("btd,d->bt", x, unit)
        return x - along[..., None] * unit[None, None]

    return patch(network, {site: remove})
