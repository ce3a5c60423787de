"""How well an SAE found features that are known: matching of directions, and latents as detectors of features.

The measures of Chanin & Garriga-Alonso 2026 (arXiv:2602.14687, section 4).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxalign.interpretability.synthetic_features import SyntheticFeatures, sample_features
from jaxalign.types import Array, ArrayLike, Key


class Detections(NamedTuple):
    """How often latent i and its feature fired together or apart, [F] each; records of several batches add up."""

    both: Array
    latent_only: Array
    feature_only: Array
    neither: Array


class FeatureRecovery(NamedTuple):
    """What `feature_recovery` finds. [F] arrays are per latent, the scalars beside them their means over all F.

    mcc: mean |cosine| of decoder rows and true directions under the best one-to-one matching
    uniqueness: the share of latents left when those with the same closest feature count once
    precision, recall, f1: mean over latents of the detection of each one's closest feature; 0 for a latent never firing
    explained_variance: 1 - E||x - x_hat||^2 / E||x - E x||^2
    l0, true_l0: latents, features firing per sample
    dead_fraction: the share of latents that fired on no sample
    closest: [F] int32, the feature of the largest |cosine|
    latent_f1: [F]
    """

    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    explained_variance: float
    l0: float
    true_l0: float
    dead_fraction: float
    closest: np.ndarray
    latent_f1: np.ndarray


def absolute_cosines(decoder: ArrayLike, dictionary: ArrayLike) -> Array:
    """|cos| [F, N] of decoder rows [F, D] and feature directions [N, D]; a row of zeros has cosine 0 with all."""
    chex.assert_rank([decoder, dictionary], 2)

    def unit(v: ArrayLike) -> Array:
        length = jnp.linalg.norm(v, axis=1, keepdims=True)
        return v / jnp.where(length > 0, length, 1.0)

    return jnp.abs(unit(decoder) @ unit(dictionary).T)


def hungarian_matching(similarity: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(latents, features), int [min(F, N)] each: the one-to-one pairs of largest total similarity [F, N]. On the host.

    Raises ValueError on a similarity that is not finite.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:  # JAX itself needs SciPy today
        raise ImportError("hungarian_matching needs SciPy: pip install scipy") from error
    similarity = np.asarray(similarity, np.float64)
    if not np.isfinite(similarity).all():
        raise ValueError("hungarian_matching: similarity has entries that are not finite")
    return linear_sum_assignment(similarity, maximize=True)


def mean_correlation_coefficient(decoder: ArrayLike, dictionary: ArrayLike) -> float:
    """MCC: the mean of |cos| over the min(F, N) pairs of the best one-to-one matching (arXiv:2505.20254). On the host.

    Args:
        decoder: [F, D] learned directions.
        dictionary: [N, D] true ones, or those of another SAE.
    """
    similarity = np.asarray(absolute_cosines(decoder, dictionary))
    return float(similarity[hungarian_matching(similarity)].mean())


def count_detections(latents: ArrayLike, features: ArrayLike, closest: ArrayLike) -> Detections:
    """Counts, over samples, of latent i firing (!= 0) against its feature `closest[i]` firing (> 0).

    Args:
        latents: [B, F].
        features: [B, N].
        closest: [F] int.
    """
    chex.assert_rank([latents, features, closest], [2, 2, 1])
    chex.assert_equal_shape_prefix([latents, features], 1)
    fires, true = jnp.asarray(latents) != 0, jnp.asarray(features)[:, closest] > 0
    pairs = (fires & true, fires & ~true, ~fires & true, ~fires & ~true)
    return Detections(*(jnp.sum(pair, axis=0, dtype=jnp.int32) for pair in pairs))


def detection_scores(counts: Detections) -> tuple[Array, Array, Array]:
    """(precision, recall, f1), [F] each; 0 where undefined.

    precision = both / (both + latent_only), recall = both / (both + feature_only),
    f1 = 2 both / (2 both + latent_only + feature_only).
    """

    def share(part: Array, rest: Array) -> Array:
        return part / jnp.maximum(part + rest, 1)

    both, latent_only, feature_only, _ = counts
    return share(both, latent_only), share(both, feature_only), share(2 * both, latent_only + feature_only)


@functools.partial(jax.jit, static_argnums=5)
def _measured(
    encode: Partial, decode: Partial, data: SyntheticFeatures, closest: Array, draws: Array, batch: int
) -> tuple[Detections, tuple[Array, ...]]:
    """Of every draw the detections, and the means of |error|^2, |x|^2, x and how many features fire."""

    def measure(draw: Key) -> tuple[Detections, tuple[Array, ...]]:
        x, features = sample_features(data, draw, batch)
        latents = encode(x)
        # Around the bias, so that the variance is not lost in the digits of a large mean.
        centred, error = x - data.bias[None], x - decode(latents)
        means = (jnp.sum(error**2), jnp.sum(centred**2), centred.sum(axis=0), jnp.sum(features > 0))
        return count_detections(latents, features, closest), jax.tree.map(lambda total: total / batch, means)

    return jax.lax.map(measure, draws)


def feature_recovery(
    key: Key,
    encode: Callable[[Array], Array],
    decode: Callable[[Array], Array],
    decoder: ArrayLike,
    data: SyntheticFeatures,
    *,
    samples: int = 65536,
    batch: int = 2048,
) -> FeatureRecovery:
    """Measure an SAE on fresh samples of a world whose features are known. The matching runs on the host.

    Args:
        encode, decode: x [B, D] -> latents [B, F] and back. As `jax.tree_util.Partial(function, params)` they compile
            once for all params, as plain functions for each.
        decoder: [F, D], `params["W_dec"]`.
        samples, batch: how many are drawn, and at a time; a multiple.

    Raises ValueError if `samples` is not a multiple of `batch`, or the decoder's D is not the data's.
    """
    decoder = jnp.asarray(decoder)
    if samples < 1 or samples % batch:
        raise ValueError(f"feature_recovery: samples must be a multiple of batch, got {samples} and {batch}")
    if decoder.ndim != 2 or decoder.shape[1] != data.dictionary.shape[1]:
        raise ValueError(f"feature_recovery: decoder is {decoder.shape}, the data's D is {data.dictionary.shape[1]}")
    similarity = absolute_cosines(decoder, data.dictionary)
    closest = jnp.argmax(similarity, axis=1).astype(jnp.int32)

    functions = (f if isinstance(f, Partial) else Partial(f) for f in (encode, decode))
    each = _measured(*functions, data, closest, jax.random.split(key, samples // batch), batch)
    counts = jax.tree.map(lambda leaf: leaf.sum(axis=0), each[0])
    error, square, mean, true_l0 = jax.tree.map(lambda leaf: leaf.mean(axis=0), each[1])
    fired = counts.both + counts.latent_only
    precision, recall, f1 = detection_scores(counts)
    return FeatureRecovery(
        mcc=float(np.asarray(similarity)[hungarian_matching(similarity)].mean()),
        uniqueness=len(np.unique(closest)) / len(closest),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        explained_variance=float(1 - error / (square - jnp.sum(mean**2))),
        l0=float(jnp.sum(fired / samples)),
        true_l0=float(true_l0),
        dead_fraction=float(jnp.mean(fired == 0)),
        closest=np.asarray(closest),
        latent_f1=np.asarray(f1),
    )
