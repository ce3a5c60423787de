"""k-sparse probing: how well a concept can be read from the k latents that differ most with it."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.interpretability.probing import fit_linear_probe, held_out_rows
from jaxalign.statistics import wilson_interval
from jaxalign.types import Array, ArrayLike, Key


class SparseProbe(NamedTuple):
    """A probe on k latents. Accuracies are on the held-out part.

    latents: [k] int32, the largest difference first
    weights: [k], bias: scalar; the log odds are latents @ weights + bias
    accuracy, low, high: scalars, the accuracy and Wilson's interval
    majority: accuracy of always guessing the commoner label of the training part
    control: accuracy of the same procedure on labels that were shuffled; near `majority` unless something leaks
    """

    latents: Array
    weights: Array
    bias: Array
    accuracy: Array
    low: Array
    high: Array
    majority: Array
    control: Array


def mean_differences(latents: ArrayLike, labels: ArrayLike) -> Array:
    """[F], mean of each latent where the label is true minus its mean where it is false; 0 where a class is empty.

    Args:
        latents: [B, F].
        labels: [B] bool.
    """
    chex.assert_rank([latents, labels], [2, 1])
    chex.assert_equal_shape_prefix([latents, labels], 1)
    latents = jnp.asarray(latents)
    true = jnp.asarray(labels).astype(latents.dtype)
    counts = true.sum(), (1 - true).sum()
    means = [side @ latents / jnp.maximum(count, 1) for side, count in zip((true, 1 - true), counts, strict=True)]
    return jnp.where((counts[0] > 0) & (counts[1] > 0), means[0] - means[1], 0.0)


def sparse_probing(
    key: Key,
    latents: ArrayLike,
    labels: ArrayLike,
    *,
    k: int,
    held_out: float = 0.3,
    l2: ArrayLike = 1e-3,
    steps: int = 50,
    confidence: ArrayLike = 0.95,
) -> SparseProbe:
    """Choose k latents by |`mean_differences`| on a training part, fit `fit_linear_probe` on them, test on the rest.

    Gurnee et al. 2023 (arXiv:2305.01610); for latents of SAEs, Karvonen et al. 2025 (arXiv:2503.09532). The control
    repeats choice and fit with the labels shuffled over all rows. `vmap` over labels probes many concepts at once.

    Args:
        latents: [B, F].
        labels: [B] bool, the concept.
        k: how many latents; static.
        held_out: the share of rows to test on, drawn with `key`.
        l2, steps: see `fit_linear_probe`.
        confidence: of the interval (low, high).

    Raises ValueError if k is not in 1..F or a part would be empty.
    """
    chex.assert_rank([latents, labels], [2, 1])
    chex.assert_equal_shape_prefix([latents, labels], 1)
    latents, labels = jnp.asarray(latents), jnp.asarray(labels).astype(bool)
    latents = latents.astype(jnp.promote_types(latents.dtype, jnp.float32))
    rows, width = latents.shape
    if not 1 <= k <= width:
        raise ValueError(f"sparse_probing: k must lie in 1..{width}, got {k}")
    split_key, control_key = jax.random.split(key)
    train, test = held_out_rows(split_key, rows, held_out, caller="sparse_probing")

    def probe(labels: Array) -> tuple[Array, Array, Array, Array]:
        x, learned = latents[train], labels[train]
        _, chosen = jax.lax.top_k(jnp.abs(mean_differences(x, learned)), k)
        weights, bias = fit_linear_probe(x[:, chosen], learned.astype(jnp.int32), num_classes=2, l2=l2, steps=steps)
        weights, bias = weights[:, 1] - weights[:, 0], bias[1] - bias[0]
        right = (latents[test][:, chosen] @ weights + bias > 0) == labels[test]
        return chosen, weights, bias, right.sum()

    # Both at once, so that the fit is compiled once.
    both = jax.vmap(probe)(jnp.stack([labels, jax.random.permutation(control_key, labels)]))
    (chosen, weights, bias, right), control = (leaf[0] for leaf in both), both[3][1]
    low, high = wilson_interval(right, len(test), confidence=confidence)
    guess = labels[train].mean() > 0.5
    majority = jnp.mean(labels[test] == guess)
    return SparseProbe(chosen, weights, bias, right / len(test), low, high, majority, control / len(test))
