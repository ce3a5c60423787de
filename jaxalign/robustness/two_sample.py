"""Tests of whether two samples come from one distribution: kernel, classifier, and one dimension at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Network, gradient_algorithm, train
from jaxalign.networks.mlp import MLP
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

ROUNDING = 1e-6  # two sums of the same kernel values in another order differ by less than this
PERMUTATIONS_AT_ONCE = 100


class TwoSampleTest(NamedTuple):
    """statistic: scalar, larger the more the samples differ; p_value: scalar in [0, 1], small if they differ.

    Both are NaN where the rows hold a NaN.
    """

    statistic: Array
    p_value: Array


def median_bandwidth(x: ArrayLike, y: ArrayLike) -> Array:
    """The median distance between two different rows of x and y pooled (Gretton et al. 2012, section 8).

    Args: x [N, ...], y [M, ...]. Returns a scalar in the units of x; 1 where the median is 0.
    """
    return _median_bandwidth(_squared_distances(_pooled(x, y)))


def mmd_squared(x: ArrayLike, y: ArrayLike, *, bandwidth: ArrayLike | None = None) -> Array:
    """Unbiased estimate of the squared maximum mean discrepancy under k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)).

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    (Gretton et al. 2012, "A Kernel Two-Sample Test", equation 3). Its mean is 0 if the distributions are the same, so
    it may be negative. Memory [N + M, N + M].

    Args:
        x: [N, ...], N >= 2; trailing axes are flattened.
        y: [M, ...], M >= 2.
        bandwidth: positive scalar in the units of x; None: `median_bandwidth(x, y)`.

    Returns a scalar. Raises ValueError on other shapes.
    """
    pooled = _pooled(x, y)
    return _unbiased(_centred_gram(pooled, bandwidth), _first_sample(x, pooled))


def biased_mmd_squared(x: ArrayLike, y: ArrayLike, *, bandwidth: ArrayLike | None = None) -> Array:
    """`mmd_squared` with the pairs i = j: the squared distance of two mean embeddings, never negative.

    (Gretton et al. 2012, equation 5.) Arguments as there, x [N, D] and y [M, D].
    """
    pooled = _pooled(x, y)
    first = _first_sample(x, pooled)
    weights = first / first.sum() - (1 - first) / (1 - first).sum()
    return jnp.maximum(weights @ _product(_gram(pooled, bandwidth), weights), 0.0)


def mmd_test(
    key: Key, x: ArrayLike, y: ArrayLike, *, permutations: int = 500, bandwidth: ArrayLike | None = None
) -> TwoSampleTest:
    """Permutation test on `mmd_squared`, valid at any sample size.

    p_value = (1 + #{permutations of the pooled rows with a statistic >= the observed}) / (1 + permutations)
    The kernel matrix is computed once; a permutation costs its product with a vector of zeros and ones.

    Args:
        x: [N, ...], N >= 2.
        y: [M, ...], M >= 2.
        permutations: static; the least p-value is 1 / (1 + permutations).
        bandwidth: as in `mmd_squared`; the median over the pooled rows is the same for every permutation.

    Returns TwoSampleTest(mmd_squared(x, y), p_value).
    """
    pooled = _pooled(x, y)
    gram, first = _centred_gram(pooled, bandwidth), _first_sample(x, pooled)
    observed = _unbiased(gram, first)
    return TwoSampleTest(
        observed, _permutation_p_value(key, lambda rows: _unbiased(gram, rows), first, observed, permutations)
    )


def classifier_two_sample_test(
    key: Key,
    x: ArrayLike,
    y: ArrayLike,
    *,
    network: Network | None = None,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 200,
    permutations: int = 500,
) -> TwoSampleTest:
    """Train a classifier to tell half of x from half of y, and test its accuracy on the other halves.

    statistic = (share of held-out x taken for x + share of held-out y taken for y) / 2, which is 1/2 by chance
    whatever N and M. The p-value is that of permuting the held-out labels, valid for any network however poorly
    trained; as the accuracy takes few values it errs to the large side. (Lopez-Paz & Oquab 2017, arXiv:1610.06545.)

    Args:
        x: [N, ...], N >= 2.
        y: [M, ...], M >= 2.
        network: `apply(params, rows [B, ...]) -> logits [B, 2]`, the rows standardised by the training half; None: an
            MLP with one hidden layer of 32 on flattened rows.
        optimizer: None: Adam at 0.01.
        steps: static, optimiser steps on the whole training half.
        permutations: static, as in `mmd_test`.
    """
    pooled = _pooled(x, y)
    split_x, split_y, train_key, permute_key = jax.random.split(key, 4)
    if network is None:
        network = Network.from_linen(MLP((32, 2)), pooled[:1])
    else:
        pooled = pooled.reshape(-1, *jnp.shape(x)[1:])
    fitted_x, held_x = _halves(split_x, pooled[: len(x)])
    fitted_y, held_y = _halves(split_y, pooled[len(x) :])
    fitted = jnp.concatenate([fitted_x, fitted_y])
    mean, deviation = fitted.mean(axis=0, keepdims=True), fitted.std(axis=0, keepdims=True)
    deviation = jnp.where(deviation > 0, deviation, 1.0)

    def loss(params: Params, batch: None, key: Key) -> tuple[Array, Metrics]:
        log_p = jax.nn.log_softmax(network.apply(params, (fitted - mean) / deviation))
        return -(log_p[: len(fitted_x), 0].mean() + log_p[len(fitted_x) :, 1].mean()) / 2, {}

    algorithm = gradient_algorithm(network, loss, optax.adam(1e-2) if optimizer is None else optimizer)
    params = train(algorithm, train_key, None, length=steps)[0].params
    logits = network.apply(params, (jnp.concatenate([held_x, held_y]) - mean) / deviation)
    # NaN where a logit is, as comparisons alone would call it y.
    taken_for_x = jnp.heaviside(logits[:, 0] - logits[:, 1], 1.0)

    def accuracy(first: Array) -> Array:
        return (first @ taken_for_x / first.sum() + (1 - first) @ (1 - taken_for_x) / (1 - first).sum()) / 2

    first = _first_sample(held_x, logits)
    observed = accuracy(first)
    return TwoSampleTest(observed, _permutation_p_value(permute_key, accuracy, first, observed, permutations))


def kolmogorov_smirnov_test(x: ArrayLike, y: ArrayLike) -> TwoSampleTest:
    """The largest gap between the two empirical distribution functions over all dimensions.

    gap_d = max_t |mean(x[:, d] <= t) - mean(y[:, d] <= t)|;  statistic = max_d gap_d
    p_value = min(1, D min_d Q(sqrt(N M / (N + M)) gap_d)), Bonferroni over the D dimensions as in Rabanser et al. 2019
    (arXiv:1810.11953, section 3.2), with Kolmogorov's limit Q of the null, which errs to the large side.

    Args: x [N, ...], y [M, ...] with N, M >= 2; trailing axes are flattened to D.
    """
    pooled = _pooled(x, y)
    n, m = len(x), len(y)

    def gap(column: Array) -> Array:
        below_x = jnp.searchsorted(jnp.sort(column[:n]), column, side="right") / n
        below_y = jnp.searchsorted(jnp.sort(column[n:]), column, side="right") / m
        return jnp.max(jnp.abs(below_x - below_y))

    gaps = jax.vmap(gap, in_axes=1)(pooled)
    gaps = jnp.where(jnp.isnan(pooled).any(), jnp.nan, gaps)
    p_values = _kolmogorov_tail(jnp.sqrt(n * m / (n + m)) * gaps)
    return TwoSampleTest(gaps.max(), jnp.minimum(1.0, gaps.size * p_values.min()))


def _kolmogorov_tail(z: Array) -> Array:
    """Q(z) = 2 sum_k (-1)^(k - 1) exp(-2 k^2 z^2), or its theta transform where that converges slowly."""
    k, z = jnp.arange(1, 6, dtype=z.dtype)[None, :], z[:, None]
    large = 2 * jnp.sum((-1.0) ** (k - 1) * jnp.exp(-2 * jnp.square(k * z)), axis=1)
    z = jnp.maximum(z, 1e-2)  # where the transform is 0 to all digits
    small = jnp.sqrt(2 * jnp.pi) * jnp.sum(jnp.exp(-jnp.square((2 * k - 1) * jnp.pi / z) / 8) / z, axis=1)
    return jnp.where(z[:, 0] > 1, large, 1 - small)


def _pooled(x: ArrayLike, y: ArrayLike) -> Array:
    """Both samples as rows [N + M, D]."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim < 1 or x.shape[1:] != y.shape[1:] or min(x.shape[0], y.shape[0]) < 2:
        raise ValueError(f"a two-sample test needs x [N, ...], y [M, ...] with N, M >= 2; got {x.shape}, {y.shape}")
    pooled = jnp.concatenate([x, y])
    pooled = pooled.astype(jnp.promote_types(pooled.dtype, jnp.float32))
    return pooled.reshape(pooled.shape[0], -1)


def _first_sample(x: ArrayLike, pooled: Array) -> Array:
    """1 for the pooled rows that are x's, 0 for the others."""
    return (jnp.arange(pooled.shape[0]) < len(x)).astype(pooled.dtype)


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _squared_distances(rows: Array) -> Array:
    # Distances do not depend on the mean, and the squares of what remains lose fewer digits.
    rows = rows - rows.mean(axis=0, keepdims=True)
    squares = jnp.square(rows).sum(axis=1)
    squared = squares[:, None] + squares[None, :] - 2 * _product(rows, rows.T)
    return jnp.where(jnp.eye(len(rows), dtype=bool), 0.0, jnp.maximum(squared, 0.0))


def _median_bandwidth(squared: Array) -> Array:
    ordered = jnp.sort(squared[jnp.triu_indices(len(squared), k=1)])
    median = (jnp.sqrt(ordered[(ordered.size - 1) // 2]) + jnp.sqrt(ordered[ordered.size // 2])) / 2
    return jnp.where(median > 0, median, 1.0)


def _gram(pooled: Array, bandwidth: ArrayLike | None) -> Array:
    squared = _squared_distances(pooled)
    bandwidth = _median_bandwidth(squared) if bandwidth is None else bandwidth
    return jnp.exp(-squared / (2 * bandwidth**2))


def _centred_gram(pooled: Array, bandwidth: ArrayLike | None) -> Array:
    """The kernel matrix with a zero diagonal, less the mean of the rest: that cancels, and sums then round less."""
    gram, diagonal = _gram(pooled, bandwidth), jnp.eye(len(pooled), dtype=bool)
    mean = jnp.mean(gram, where=~diagonal)
    return jnp.where(diagonal, 0.0, gram - mean)


def _unbiased(gram: Array, first: Array) -> Array:
    """The U-statistic of a kernel matrix [T, T] with zero diagonal, for the rows `first` [T] against the others."""
    second = 1 - first
    n, m = first.sum(), second.sum()
    to_first, to_second = _product(gram, first), _product(gram, second)
    within = first @ to_first / (n * (n - 1)) + second @ to_second / (m * (m - 1))
    return within - 2 * (second @ to_first) / (n * m)


def _permutation_p_value(
    key: Key, statistic: Callable[[Array], Array], first: Array, observed: Array, permutations: int
) -> Array:
    if permutations < 1:
        raise ValueError(f"a permutation test needs at least one permutation, got {permutations}")
    keys = jax.random.split(key, permutations)
    together = min(permutations, PERMUTATIONS_AT_ONCE)
    null = jax.lax.map(lambda each: statistic(jax.random.permutation(each, first)), keys, batch_size=together)
    reached = jnp.sum(null >= observed - ROUNDING)
    return jnp.where(jnp.isnan(observed), jnp.nan, (1 + reached) / (1 + permutations))


def _halves(key: Key, rows: Array) -> tuple[Array, Array]:
    rows = jax.random.permutation(key, rows)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]
