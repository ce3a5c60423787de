"""Training a reward network on comparisons and rankings of answers or trajectories, as an Algorithm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm
from jaxalign.preferences.bradley_terry import (
    as_float,
    bradley_terry_loss,
    centering_penalty,
    davidson_loss,
    plackett_luce_loss,
)
from jaxalign.preferences.comparisons import (
    TIE,
    AnyBatch,
    Comparisons,
    Rankings,
    WeightedBatch,
    check_reward_batch,
    reward_batch,
    row_weights,
)
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


def network_rewards(network: Network, params: Params, inputs: Any, mask: Array) -> Array:
    """`network.apply(params, inputs, mask)` [B], in at least float32. Raises ValueError if it is of another shape."""
    rewards = network.apply(params, inputs, mask)
    if jnp.shape(rewards) != mask.shape[:1]:
        raise ValueError(
            f"a reward network must return [{mask.shape[0]}], one reward per row of mask {mask.shape}; "
            f"this one returned {jnp.shape(rewards)}"
        )
    return as_float(rewards)[0]


def pair_rewards(network: Network, params: Params, batch: AnyBatch) -> tuple[Array, Array]:
    """(chosen_rewards, rejected_rewards), [B] each, from one pass over [2B, T]."""
    batch = reward_batch(batch)
    if not isinstance(batch, Comparisons):
        raise ValueError("pair_rewards: needs Comparisons, got Rankings")
    inputs = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch.chosen, batch.rejected)
    mask = jnp.concatenate([batch.chosen_mask, batch.rejected_mask])
    chosen, rejected = jnp.split(network_rewards(network, params, inputs, mask), 2)
    return chosen, rejected


def comparison_loss(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    outcome: ArrayLike | None = None,
    margin: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    tie_strength: ArrayLike | None = None,
) -> Array:
    """Negative log-likelihood [B] of what was preferred, in nats.

    Without `tie_strength` it is `bradley_terry_loss` of the preferred side against the other, and a tie counts half for
    each (Christiano et al. 2017, arXiv:1706.03741, section 2.2.3); with it, it is `davidson_loss`. `margin` [B] is
    taken from the preferred side's reward, and `label_smoothing` is the probability that the two sides were exchanged.

    Args:
        chosen_rewards, rejected_rewards: [B].
        outcome: [B] int, 0 chosen, 1 rejected, 2 tie; None: all 0.
    """
    chosen, rejected = as_float(chosen_rewards, rejected_rewards)
    outcome = jnp.zeros(chosen.shape, jnp.int32) if outcome is None else jnp.asarray(outcome)
    tie = outcome == TIE
    # Seen from the preferred side; a tie may be seen from either, and has no margin.
    preferred = jnp.where(outcome == 1, rejected, chosen)
    other = jnp.where(outcome == 1, chosen, rejected)
    gap = jnp.where(tie, 0.0, 0.0 if margin is None else margin)
    if tie_strength is None:
        smoothing = jnp.where(tie, 0.5, label_smoothing)
        return bradley_terry_loss(preferred, other, margin=gap, label_smoothing=smoothing)
    right = davidson_loss(preferred - gap, other, jnp.where(tie, TIE, 0), tie_strength=tie_strength)
    wrong = davidson_loss(preferred - gap, other, jnp.where(tie, TIE, 1), tie_strength=tie_strength)
    return (1.0 - label_smoothing) * right + label_smoothing * wrong


def reward_model(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: ArrayLike = 0.0,
    centering: ArrayLike = 0.0,
    tie_strength: ArrayLike | None = None,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """Fit a reward network to comparisons or rankings by maximum likelihood.

    objective = mean_i [ comparison_loss(r(chosen_i), r(rejected_i)) + centering (r(chosen_i) + r(rejected_i))^2 ]
    over valid rows i; of rankings `plackett_luce_loss`, and centering (2 mean_k r(item_ik))^2, which with K = 2 is the
    same. (Ouyang et al. 2022, arXiv:2203.02155, equation 1.)

    Args:
        network: a reward network, `apply(params, inputs [B, T, ...], mask [B, T]) -> rewards [B]`; see
            `language_reward` and `trajectory_reward`.
        label_smoothing: the share of comparisons believed to be the wrong way round, in [0, 1); not for rankings.
        centering: weight of the penalty that keeps rewards around 0 (Eisenstein et al., arXiv:2312.09244: 0.01).
        tie_strength: > 0, Davidson's parameter for data with ties; None counts a tie half for each side.
        trainable, microbatches: as in `gradient_algorithm`; parts are weighted by their valid rows.

    Batches are Comparisons, Rankings, a PreferenceBatch, or a mapping with their fields' names. Metrics: TRL's names,
    means over valid rows: `rewards/chosen` and `rewards/rejected` are of the preferred and the other side (of a
    ranking, the best and the worst), `rewards/accuracies` counts ties and equal rewards half, and of a ranking is the
    share of its K (K - 1) / 2 pairs that are in order.
    Raises ValueError naming what is wrong: shapes when traced; outside jit also what `check_reward_batch` finds.
    """
    inner = weighted_reward_model(
        network,
        optimizer,
        label_smoothing=label_smoothing,
        centering=centering,
        tie_strength=tie_strength,
        trainable=trainable,
        microbatches=microbatches,
    )

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        batch = reward_batch(batch)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, batch))):
            check_reward_batch(batch, tie_strength=tie_strength)
        return inner.step(state, WeightedBatch(batch, row_weights(batch)))

    return Algorithm(inner.init, step)


def weighted_reward_model(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    label_smoothing: ArrayLike = 0.0,
    centering: ArrayLike = 0.0,
    tie_strength: ArrayLike | None = None,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """`reward_model` over WeightedBatch records: objective = sum_i weight[i] loss_i / (number of valid rows [B])."""
    if isinstance(tie_strength, int | float) and tie_strength <= 0:
        raise ValueError(f"reward_model: tie_strength must be positive, got {tie_strength}; None has no model of ties")

    def objective(params: Params, weighted: WeightedBatch, key: Key) -> tuple[Array, Metrics]:
        batch = weighted.batch
        if isinstance(batch, Rankings):
            if tie_strength is not None or (isinstance(label_smoothing, int | float) and label_smoothing):
                raise ValueError("reward_model: rankings take neither tie_strength nor label_smoothing")
            losses, penalties, metrics = _ranking_terms(network, params, batch)
        else:
            chosen, rejected = pair_rewards(network, params, batch)
            losses = comparison_loss(
                chosen,
                rejected,
                outcome=batch.outcome,
                margin=batch.margin,
                label_smoothing=label_smoothing,
                tie_strength=tie_strength,
            )
            penalties, metrics = centering_penalty(chosen, rejected), _pair_metrics(chosen, rejected, batch.outcome)
        valid = row_weights(batch)
        count = jnp.maximum(valid.sum(), 1.0)
        loss = jnp.sum(jnp.where(valid > 0, weighted.weight * (losses + centering * penalties), 0.0)) / count
        return loss, {name: jnp.sum(jnp.where(valid > 0, x, 0.0)) / count for name, x in metrics.items()}

    def rows(weighted: WeightedBatch) -> Array:
        # Not 0 where no row is valid, so that a batch of such parts alone has no 0 / 0; beside 1 it vanishes.
        return jnp.maximum(row_weights(weighted.batch).sum(), 1e-12)

    return gradient_algorithm(
        network, objective, optimizer, trainable=trainable, microbatches=microbatches, weight=rows
    )


def _pair_metrics(chosen: Array, rejected: Array, outcome: Array | None) -> Metrics:
    swapped = jnp.zeros(chosen.shape, bool) if outcome is None else jnp.asarray(outcome) == 1
    preferred, other = jnp.where(swapped, rejected, chosen), jnp.where(swapped, chosen, rejected)
    right = jnp.heaviside(preferred - other, 0.5)
    if outcome is not None:
        right = jnp.where(jnp.asarray(outcome) == TIE, 0.5, right)
    return {
        "rewards/chosen": preferred,
        "rewards/rejected": other,
        "rewards/accuracies": right,
        "rewards/margins": preferred - other,
    }


def _ranking_terms(network: Network, params: Params, batch: Rankings) -> tuple[Array, Array, Metrics]:
    """(losses [B], centering penalties [B], metrics of [B])."""
    rows, items = batch.ranking.shape
    flat = jax.tree.map(lambda x: x.reshape(rows * items, *x.shape[2:]), (batch.items, batch.mask))
    rewards = network_rewards(network, params, *flat).reshape(rows, items)
    ordered = jnp.take_along_axis(rewards, jnp.asarray(batch.ranking), axis=1)
    above = jnp.heaviside(ordered[:, :, None] - ordered[:, None, :], 0.5)
    pairs = jnp.triu(jnp.ones((items, items), ordered.dtype), k=1)[None]
    metrics = {
        "rewards/chosen": ordered[:, 0],
        "rewards/rejected": ordered[:, -1],
        "rewards/accuracies": jnp.sum(above * pairs, axis=(1, 2)) / max(1, items * (items - 1) // 2),
        "rewards/margins": ordered[:, 0] - ordered[:, -1],
    }
    return plackett_luce_loss(rewards, batch.ranking), jnp.square(2 * rewards.mean(axis=1)), metrics
