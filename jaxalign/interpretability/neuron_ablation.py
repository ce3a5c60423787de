"""Does a classifier need the neurons that a ranking puts first? The top n ablated, against n random ones."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.interpretability.activations import capture_function, patch_function
from jaxalign.interpretability.neurons import Apply
from jaxalign.statistics import paired_difference_interval
from jaxalign.types import Array, ArrayLike, Key


class AblationEffect(NamedTuple):
    """How much worse a classifier is without its top n neurons, and without n random ones, for each of K counts n.

    counts: [K]
    accuracy: [K] without the top n; random_accuracy: [K] without n random ones
    log_prob: [K] mean log probability of the label, nats, without the top n; random_log_prob: [K]
    accuracy_excess, log_prob_excess: [K, 3] how much more is lost with the top n than with random ones, mean over
        examples and its interval's low and high end
    p_value: [K] of the ranking being no better than chance: (1 + how many of D random sets lose at least as much log
        probability as the top n) / (1 + D), a permutation test over sets where the intervals are over examples
    """

    counts: Array
    accuracy: Array
    random_accuracy: Array
    log_prob: Array
    random_log_prob: Array
    accuracy_excess: Array
    log_prob_excess: Array
    p_value: Array


def ablate_neurons(apply: Apply, site: str, ablated: Array, replacement: ArrayLike = 0.0) -> Apply:
    """`apply` with the neurons where `ablated` [N] is true set to `replacement` (a number or [N]) at every place."""
    return patch_function(apply, {site: lambda value: _replaced(value, ablated, replacement)})


def ablation_effect(
    key: Key,
    apply: Apply,
    x: Any,
    labels: Array,
    site: str,
    order: Array,
    counts: Sequence[int],
    *,
    replacement: ArrayLike | None = None,
    draws: int = 32,
    confidence: ArrayLike = 0.95,
) -> AblationEffect:
    """Are the neurons that a ranking puts first the ones a classifier needs? Its top n against n random ones.

    Args:
        x: [B, ...], labels: [B], apply: x -> logits [B, C].
        order: [N] neurons, the most important first (`NeuronRanking.order`).
        counts: the n to try, each in 1..N.
        replacement: what ablated neurons are set to: a number or [N]; None is each neuron's mean over x.
        draws: D, random sets for each n.
        confidence: of the bootstrap intervals over examples, paired: the same examples without the top n neurons and,
            averaged over the sets, without random ones.

    Raises ValueError on a count outside 1..N.
    """
    neurons = order.shape[0]
    if not all(1 <= n <= neurons for n in counts):
        raise ValueError(f"ablation_effect: counts must be in 1..{neurons}, the neurons of {site}, got {list(counts)}")
    if replacement is None:
        value = capture_function(apply, [site])(x)[1][site]
        replacement = jnp.mean(value, axis=tuple(range(value.ndim - 1)))
    rank = jnp.argsort(order)

    def scores(ablated: Array) -> Array:
        """[2, B]: right or not, and the label's log probability."""
        logits = ablate_neurons(apply, site, ablated, replacement)(x)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
        return jnp.stack([(jnp.argmax(logits, axis=1) == labels).astype(log_probs.dtype), log_probs])

    draw_key, *interval_keys = jax.random.split(key, 3)
    random_ranks = jax.vmap(lambda k: jax.random.permutation(k, neurons))(jax.random.split(draw_key, draws))
    sizes = jnp.asarray(counts, rank.dtype)
    top = jax.lax.map(lambda n: scores(rank < n), sizes)

    def by_chance(n: Array) -> tuple[Array, Array]:
        """[2, B] the mean over random sets, and [draws] each set's mean log probability."""
        each = jax.lax.map(lambda random_rank: scores(random_rank < n), random_ranks)
        return jnp.mean(each, axis=0), jnp.mean(each[:, 1], axis=1)

    random, of_sets = jax.lax.map(by_chance, sizes)

    def excess(key: Key, measure: int) -> Array:
        lost, lost_by_chance = -top[:, measure].T, -random[:, measure].T
        ends = paired_difference_interval(key, lost, lost_by_chance, confidence=confidence)
        return jnp.stack([jnp.mean(lost - lost_by_chance, axis=0), *ends], axis=1)

    (accuracy, log_prob), (random_accuracy, random_log_prob) = (jnp.mean(s, axis=2).T for s in (top, random))
    excesses = [excess(k, measure) for measure, k in enumerate(interval_keys)]
    as_bad = of_sets <= log_prob[:, None] + 1e-5  # nats: the same set must not differ by rounding
    p_value = (1 + jnp.sum(as_bad, axis=1)) / (1 + draws)
    return AblationEffect(sizes, accuracy, random_accuracy, log_prob, random_log_prob, *excesses, p_value)


def _replaced(value: Array, ablated: Array, replacement: ArrayLike) -> Array:
    if ablated.shape != value.shape[-1:]:
        raise ValueError(f"ablated is {ablated.shape}; the site's value is {value.shape}, its last axis the neurons")
    ablated, replacement = (jnp.broadcast_to(jnp.asarray(a), value.shape) for a in (ablated, replacement))
    return jnp.where(ablated, replacement, value)
