"""How far an input lies from the training distribution: scores that are higher the further out it is."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike

# Accelerators round the factors of a float32 product to fewer bits unless told not to, and distances cancel.
EXACT = jax.lax.Precision.HIGHEST


def max_softmax_score(logits: ArrayLike) -> Array:
    """`1 - max_c softmax(z)[c]`, the probability that the classifier gives to all classes but its first.

    (Hendrycks & Gimpel 2017, arXiv:1610.02136.) Summed from the other classes, so that it keeps its order
    where the largest probability rounds to 1.

    Args:
        logits: z [..., C].

    Returns [...] in [0, 1 - 1/C].
    """
    logits = _floating(logits)
    excess = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    first = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    others = jnp.sum(excess, axis=-1, where=~first)
    return others / (1 + others)


def max_logit_score(logits: ArrayLike) -> Array:
    """`-max_c z[c]` (Hendrycks et al. 2022, arXiv:1911.11132). Args: logits z [..., C]. Returns [...]."""
    return -_floating(logits).max(axis=-1)


def energy_score(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """The free energy `-temperature * logsumexp(z / temperature)` (Liu et al. 2020, arXiv:2010.03759, equation 4).

    Args:
        logits: z [..., C].
        temperature: positive scalar; towards 0 this is `max_logit_score`.

    Returns [...] in the units of the logits.
    """
    return -temperature * jax.nn.logsumexp(_floating(logits) / temperature, axis=-1)


class MahalanobisModel(NamedTuple):
    """Gaussians fitted to features: one per class with a covariance in common, and one for all classes together.

    centre: [D], the mean of all features, m
    whitening: [D, D], W with W W^T = inverse(covariance within classes)
    class_means: [C, D], the class means less m, times W
    background_whitening: [D, D], W_0 with W_0 W_0^T = inverse(covariance of all features)
    """

    centre: Array
    whitening: Array
    class_means: Array
    background_whitening: Array


def fit_mahalanobis(
    features: ArrayLike, labels: ArrayLike, *, num_classes: int, shrinkage: float = 1e-3
) -> MahalanobisModel:
    """Class means and their common covariance, `S = sum_i (f_i - mean[y_i]) (f_i - mean[y_i])^T / N`.

    Either covariance is shrunk to `(1 - shrinkage) S + shrinkage * trace(S) / D * I`, without which a feature that is
    always 0 (a dead unit) would have no inverse. On the host, in NumPy float64, outside jit: the inverse of a nearly
    singular matrix would lose all of float32's digits. (Lee et al. 2018, arXiv:1807.03888, equation 1.)

    Args:
        features: f [N, D], of one layer.
        labels: y [N] int in [0, num_classes), each class at least once.
        shrinkage: in [0, 1].

    Raises ValueError naming a class without features, features that are not finite, or a covariance with no inverse.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(f"fit_mahalanobis: needs features [N, D], labels [N]; got {features.shape}, {labels.shape}")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"fit_mahalanobis: shrinkage must lie in [0, 1], got {shrinkage}")
    if not np.isfinite(features).all():
        raise ValueError("fit_mahalanobis: features hold values that are not finite")
    counts = np.array([np.sum(labels == c) for c in range(num_classes)])
    if counts.sum() != len(labels) or not counts.all():
        raise ValueError(f"fit_mahalanobis: each label 0..{num_classes - 1} and no other must occur; found {counts}")
    means = np.stack([features[labels == c].mean(axis=0) for c in range(num_classes)])
    centre = features.mean(axis=0)
    whitening = _whitening(features - means[labels], shrinkage)
    model = (centre, whitening, (means - centre) @ whitening, _whitening(features - centre, shrinkage))
    return MahalanobisModel(*(jnp.asarray(x, jnp.result_type(float)) for x in model))


def mahalanobis_score(model: MahalanobisModel, features: ArrayLike) -> Array:
    """Squared distance to the nearest class, `min_c (f - mean_c)^T inverse(covariance) (f - mean_c)`.

    (Lee et al. 2018, arXiv:1807.03888, equation 2, with the sign turned round.)

    Args:
        model: from `fit_mahalanobis`.
        features: f [B, D].

    Returns [B]; on the distribution its mean is at most about D.
    """
    features = _centred(model, features)
    white = jnp.matmul(features, model.whitening, precision=EXACT)

    def nearer(best: Array, mean: Array) -> tuple[Array, None]:
        return jnp.minimum(best, jnp.square(white - mean[None, :]).sum(axis=1)), None

    # One class at a time: the differences [B, C, D] are never held together.
    return jax.lax.scan(nearer, jnp.full(white.shape[:1], jnp.inf, white.dtype), model.class_means)[0]


def relative_mahalanobis_score(model: MahalanobisModel, features: ArrayLike) -> Array:
    """`mahalanobis_score` less the squared distance to the Gaussian of all classes together.

    Directions in which the classes do not differ cancel, which matters where out of distribution is near
    (Ren et al. 2021, arXiv:2106.09022).

    Args:
        model: from `fit_mahalanobis`.
        features: f [B, D].

    Returns [B].
    """
    white = jnp.matmul(_centred(model, features), model.background_whitening, precision=EXACT)
    return mahalanobis_score(model, features) - jnp.square(white).sum(axis=1)


def knn_score(
    train_features: ArrayLike, features: ArrayLike, *, k: int, normalize: bool = True, chunk: int = 4096
) -> Array:
    """Euclidean distance from each feature vector to its k-th nearest among the training features.

    (Sun et al. 2022, arXiv:2204.06507, where the features are divided by their norm first.)

    Args:
        train_features: [N, D].
        features: [B, D].
        k: the rank of the neighbour, 1 the nearest. A feature that is itself among the training features counts.
        normalize: divide every vector by its L2 norm, so that distances lie in [0, 2].
        chunk: training features compared at a time; [B, k + chunk] distances are alive.

    Returns [B]. Raises ValueError if k is outside 1..N or the widths D differ.
    """
    train, features = _floating(train_features), _floating(features)
    chex.assert_rank([train, features], 2)
    if train.shape[1] != features.shape[1] or not 1 <= k <= train.shape[0]:
        raise ValueError(f"knn_score: needs [N, D], [B, D] and 1 <= k <= N; got {train.shape}, {features.shape}, k={k}")
    if normalize:
        train, features = _unit(train), _unit(features)
    # The centre cancels in every distance, and squares of what remains lose fewer digits.
    centre = train.mean(axis=0, keepdims=True)
    nearest = _nearest(train - centre, features - centre, k, min(chunk, train.shape[0]))
    # Again from the difference: |a|^2 + |b|^2 - 2 a b has no digit left where two vectors are close.
    return jnp.linalg.norm(features - train[nearest], axis=1)


def _nearest(train: Array, features: Array, k: int, chunk: int) -> Array:
    """Which row of `train` [N, D] is the k-th nearest to each of `features` [B, D]: [B] int."""
    rows, batch = train.shape[0], features.shape[0]
    index = jnp.arange(-(-rows // chunk) * chunk, dtype=jnp.int32).reshape(-1, chunk)

    def merge_in(best: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        block = train[jnp.minimum(index, rows - 1)]
        products = jnp.matmul(features, block.T, precision=EXACT)
        # |features|^2 is the same for all of a row, and changes no order.
        closeness = 2 * products - jnp.square(block).sum(axis=1)[None, :]
        closeness = jnp.where(index[None, :] < rows, closeness, -jnp.inf)
        closeness = jnp.concatenate([best[0], closeness], axis=1)
        index = jnp.concatenate([best[1], jnp.broadcast_to(index, (batch, chunk))], axis=1)
        kept, places = jax.lax.top_k(closeness, k)
        return (kept, jnp.take_along_axis(index, places, axis=1)), None

    none = (jnp.full((batch, k), -jnp.inf, features.dtype), jnp.zeros((batch, k), jnp.int32))
    return jax.lax.scan(merge_in, none, index)[0][1][:, -1]


def _unit(vectors: Array) -> Array:
    norm = jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / jnp.where(norm > 0, norm, 1.0)


def _whitening(residuals: np.ndarray, shrinkage: float) -> np.ndarray:
    """W [D, D] with W W^T = inverse(covariance) of residuals [N, D] that have mean 0."""
    covariance = residuals.T @ residuals / len(residuals)
    width = len(covariance)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    values, vectors = np.linalg.eigh(covariance)
    if values[0] <= np.finfo(np.float64).eps * width * values[-1]:
        raise ValueError("fit_mahalanobis: the covariance of the features has no inverse; raise `shrinkage`")
    return vectors / np.sqrt(values)


def _centred(model: MahalanobisModel, features: ArrayLike) -> Array:
    features = _floating(features)
    chex.assert_shape(features, (None, model.centre.shape[0]))
    return features - model.centre[None, :]


def _floating(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
