"""Feature absorption: a child's latent takes over its parent's direction, and the parent's latent stays silent there.

Named by Chanin et al. 2024, "A is for Absorption" (arXiv:2409.14507), who must guess the features; on a synthetic
hierarchy they are known.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from jaxalign.interpretability.feature_recovery import absolute_cosines
from jaxalign.types import Array, ArrayLike


class FeatureAbsorption(NamedTuple):
    """By feature [N]; NaN where not measured: no parent, no sample, or a parent or child that no latent found.

    rate: of the samples where the child fires, the share in which it absorbs its parent
    missed: of those samples, the share in which the parent's latent is silent
    missed_alone: the share in which it is silent where the parent fires without any child; what is missed anyway
    mean: scalar, the mean rate over the pairs measured
    pairs: scalar int32, how many those are
    """

    rate: Array
    missed: Array
    missed_alone: Array
    mean: Array
    pairs: Array


def feature_absorption(
    latents: ArrayLike,
    features: ArrayLike,
    decoder: ArrayLike,
    dictionary: ArrayLike,
    parent: ArrayLike,
    *,
    share: ArrayLike = 0.5,
    found: ArrayLike = 0.5,
) -> FeatureAbsorption:
    """How often child latents absorb their parents, on samples of a known hierarchy.

    Let l(i) be the latent of largest |cos| with feature i's direction d_i. Child c absorbs its parent p in a sample
    where c fires, l(p) is silent, and l(c) != l(p) fires and puts back at least `share` of p's magnitude:
    latents[l(c)] decoder[l(c)] . u / |u|^2 >= share features[p], with u = d_p - (d_p . d_c) d_c. Along u the child's
    own direction counts nothing, so that a latent of d_c alone absorbs nothing, one of f_p d_p + f_c d_c all.

    Args:
        latents: [B, F].
        features: [B, N], as `sample_features` gives them.
        decoder: [F, D] with x_hat = latents @ decoder + b; rows of norm 1 where the SAE has `rescale_by_decoder_norm`.
        dictionary: [N, D] unit directions.
        parent: [N] int, -1 for none.
        share: see above.
        found: the |cos| from which a direction counts as found.
    """
    chex.assert_rank([latents, features, decoder, dictionary, parent], [2, 2, 2, 2, 1])
    chex.assert_equal_shape_prefix([latents, features], 1)
    latents, features, decoder = (jnp.asarray(a) for a in (latents, features, decoder))
    dictionary, parent = jnp.asarray(dictionary), jnp.asarray(parent)
    similarity = absolute_cosines(decoder, dictionary)
    latent, known = jnp.argmax(similarity, axis=0), similarity.max(axis=0) >= found
    above = jnp.maximum(parent, 0)  # a valid row for those without a parent, masked below
    along = dictionary[above] - jnp.sum(dictionary[above] * dictionary, axis=1, keepdims=True) * dictionary
    length = jnp.sum(along**2, axis=1)
    carried = jnp.sum(decoder[latent] * along, axis=1) / jnp.where(length > 0, length, 1.0)

    fires, silent = features > 0, latents[:, latent[above]] == 0
    takes_over = (latents[:, latent] * carried[None] >= share * features[:, above]) & (latents[:, latent] > 0)
    absorbs = fires & silent & takes_over & (latent != latent[above])[None]
    children = jnp.zeros(features.shape, jnp.int32).at[:, above].add(fires & (parent >= 0)[None])
    alone = (fires & (children == 0))[:, above]
    measured = (parent >= 0) & known & known[above]

    def share_of(part: Array, whole: Array) -> Array:
        total = whole.sum(axis=0)
        return jnp.where(measured & (total > 0), (part & whole).sum(axis=0) / jnp.maximum(total, 1), jnp.nan)

    rate = share_of(absorbs, fires)
    seen = ~jnp.isnan(rate)
    mean = jnp.where(seen.any(), jnp.sum(jnp.where(seen, rate, 0.0)) / jnp.maximum(seen.sum(), 1), jnp.nan)
    return FeatureAbsorption(rate, share_of(silent, fires), share_of(silent, alone), mean, seen.sum(dtype=jnp.int32))
