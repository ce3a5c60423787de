"""How good a sparse autoencoder is, on one batch or on a stream of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.types import Array, ArrayLike, Metrics, Params


class SAEMoments(NamedTuple):
    """What the metrics of some rows are made of; `add_moments` joins two.

    rows [] int32 and fired [F] int32, the rows in which each feature was above zero; mean [D] of the targets x and
    spread [], sum |x - mean|^2; sums over rows errors [] of |x - x_hat|^2, cosines [], lengths [] of |x|,
    lengths_hat [] of |x_hat|, products [] of x . x_hat, energies [] of |x_hat|^2
    """

    rows: Array
    fired: Array
    mean: Array
    spread: Array
    errors: Array
    cosines: Array
    lengths: Array
    lengths_hat: Array
    products: Array
    energies: Array


def sae_moments(x: ArrayLike, x_hat: ArrayLike, features: ArrayLike) -> SAEMoments:
    """Moments of targets x [B, D], reconstructions x_hat [B, D] and features [B, F]; a crosscoder's are [B, L, D]."""
    x, x_hat, features = jnp.asarray(x), jnp.asarray(x_hat), jnp.asarray(features)
    rows = x.shape[0] if x.ndim else 0
    if x.shape != x_hat.shape or x.ndim < 2 or features.ndim != 2 or features.shape[0] != rows or rows == 0:
        raise ValueError(
            f"sae_metrics: needs x and x_hat [B, D], features [B, F]; got {x.shape}, {x_hat.shape}, {features.shape}"
        )
    x, x_hat = (a.reshape(rows, -1).astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, x_hat))
    mean = x.mean(axis=0)
    products = (x * x_hat).sum(axis=1)
    energies = jnp.square(x_hat).sum(axis=1)
    lengths, lengths_hat = jnp.linalg.norm(x, axis=1), jnp.sqrt(energies)
    return SAEMoments(
        rows=jnp.asarray(rows, jnp.int32),
        fired=jnp.sum(features > 0, axis=0, dtype=jnp.int32),
        mean=mean,
        spread=jnp.square(x - mean[None]).sum(),
        errors=jnp.square(x - x_hat).sum(),
        cosines=(products / jnp.maximum(lengths * lengths_hat, 1e-12)).sum(),
        lengths=lengths.sum(),
        lengths_hat=lengths_hat.sum(),
        products=products.sum(),
        energies=energies.sum(),
    )


def add_moments(one: SAEMoments, other: SAEMoments) -> SAEMoments:
    """Moments of the rows of both, [N, D] and [M, D], without a difference of large sums (Chan et al. 1979)."""
    rows = one.rows + other.rows
    share = other.rows / jnp.maximum(rows, 1)
    step = other.mean - one.mean
    summed = jax.tree.map(jnp.add, one, other)
    return summed._replace(
        mean=one.mean + share * step, spread=summed.spread + one.rows * share * jnp.square(step).sum()
    )


def metrics_of(moments: SAEMoments) -> Metrics:
    """The metrics of `sae_metrics`, scalars [], from moments."""
    rows, density = moments.rows, moments.fired / moments.rows
    return {
        "l0": moments.fired.sum(dtype=moments.spread.dtype) / rows,
        "mse": moments.errors / rows,
        "explained_variance": 1 - moments.errors / moments.spread,
        "cosine_similarity": moments.cosines / rows,
        "l2_ratio": moments.lengths_hat / moments.lengths,
        "shrinkage": moments.energies / moments.products,
        "dead_fraction": jnp.mean(moments.fired == 0, dtype=moments.spread.dtype),
        "dense_fraction_1": jnp.mean(density > 0.01, dtype=moments.spread.dtype),
        "dense_fraction_10": jnp.mean(density > 0.1, dtype=moments.spread.dtype),
    }


def sae_metrics(x: ArrayLike, x_hat: ArrayLike, features: ArrayLike) -> Metrics:
    """How well features [B, F] and their reconstructions x_hat [B, D] stand for targets x [B, D].

    l0                  mean count(f > 0) per row
    mse                 E|x - x_hat|^2, summed over D
    explained_variance  1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2), a ratio of means, not a mean of ratios
    cosine_similarity   E[x . x_hat / (|x| |x_hat|)]
    l2_ratio            E|x_hat| / E|x|
    shrinkage           E|x_hat|^2 / E[x . x_hat], below 1 where x_hat is too short (arXiv:2404.16014, eq. 10)
    dead_fraction       of the features, those that fired in no row
    dense_fraction_1    those that fired in more than 1% of the rows; dense_fraction_10 in more than 10%

    NaN, or infinite, where the ratio has no value: targets that do not vary, reconstructions of nothing.
    Raises ValueError, showing the shapes, if they do not belong together or there is no row.
    """
    return metrics_of(sae_moments(x, x_hat, features))


def evaluate_sae(params: Params, batches: Any, config: SAEConfig) -> Metrics:
    """`sae_metrics` of all rows of batches x [N, B, D] together, a batch at a time in a scan.

    Batches are (x_in [N, B, D], x_out [N, B, D_out]) for a transcoder and [N, B, L, D] for a crosscoder.
    """

    def moments(batch: Any) -> SAEMoments:
        x_in, x_out = batch if config.d_out is not None else (batch, batch)
        f = sae_encode(params, x_in, config)
        x_hat = sae_decode(params, f, config)
        return sae_moments(jnp.asarray(x_out, x_hat.dtype), x_hat, f)

    first = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(moments, first))
    total, _ = jax.lax.scan(lambda total, batch: (add_moments(total, moments(batch)), None), zeros, batches)
    return metrics_of(total)
