"""Distributionally robust training: the loss under the worst reweighting of the rows, or of known groups of them.

Each risk is max over p in a set around the uniform weights 1 / B of sum_i p_i losses_i. Its gradient in the losses is
the worst p, so a network trained on it sees the rows weighted by p.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, TrainState
from jaxalign.mdp.worst_case import check_number, worst_case_cvar, worst_case_kl
from jaxalign.robustness.adversarial_training import Augment, Epsilon, at_step, attacked, stateful_algorithm
from jaxalign.robustness.attack_losses import cross_entropy, margins
from jaxalign.robustness.attack_program import tracing
from jaxalign.robustness.labelled_batch import AnyBatch, LabelledBatch, as_labelled
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


def conditional_value_at_risk(losses: ArrayLike, *, alpha: ArrayLike) -> Array:
    """The mean of the worst (highest) alpha of the losses, [B] -> scalar: p_i <= 1 / (alpha B).

    Exact where alpha B is no whole number: the row at the edge counts in part. alpha 1 is the mean, 0 (a limit) the
    largest loss. The same as -rl.cvar(-losses, alpha), which takes returns.

    alpha: in [0, 1], may be traced. Raises ValueError on another shape or, outside jit, another alpha.
    Rockafellar & Uryasev (2002), "Conditional value-at-risk for general loss distributions".
    """
    losses = _losses("conditional_value_at_risk", losses)
    return -worst_case_cvar(-losses, _uniform(losses), alpha)


def kl_risk(losses: ArrayLike, *, radius: ArrayLike) -> Array:
    """The worst mean of the losses under any p with KL(p || uniform) <= radius, [B] -> scalar.

    min over t > 0 of t log mean(exp(losses / t)) + t radius. radius 0 is the mean, from log B on the largest loss.
    It is differentiable in the losses and in the radius.

    radius: not negative, nats, may be traced. Raises ValueError on another shape or, outside jit, a negative radius.
    Hu & Hong (2013), "Kullback-Leibler divergence constrained distributionally robust optimization".
    """
    losses = _losses("kl_risk", losses)
    return -worst_case_kl(-losses, _uniform(losses), radius)


def chi_square_risk(losses: ArrayLike, *, radius: ArrayLike) -> Array:
    """The worst mean of the losses under any p with mean_i (B p_i - 1)^2 <= radius, [B] -> scalar.

    min over eta of eta + sqrt(1 + radius) sqrt(mean(max(losses - eta, 0)^2)); the worst p is proportional to
    max(losses - eta, 0), its eta found by bisection. While all p_i are positive the risk is
    mean(losses) + sqrt(radius var(losses)). radius 0 is the mean, from B - 1 on the largest loss. The gradient in the
    losses is the worst p; there is none to the radius.

    radius: not negative, may be traced. Raises ValueError on another shape or, outside jit, a negative radius.
    Duchi & Namkoong (2021), arXiv:1810.08750, with k = 2, whose divergence is half of this one.
    """
    losses = _losses("chi_square_risk", losses)
    check_number("chi_square_risk: radius", radius, np.inf)
    fixed = jax.lax.stop_gradient(losses)
    gap = jnp.max(fixed) - fixed
    finfo = jnp.finfo(losses.dtype)
    radius = jnp.maximum(jnp.asarray(radius, losses.dtype), jnp.sqrt(finfo.tiny))

    def worst(width: Array) -> Array:
        """p for eta = max(losses) - width: from uniform at an infinite width to the largest losses alone at 0."""
        weight = jnp.maximum(width - gap, 0.0) / width
        return weight / jnp.sum(weight)

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        narrow, wide = bracket
        middle = 0.5 * (narrow + wide)
        inside = jnp.mean((losses.size * worst(middle) - 1.0) ** 2) <= radius
        return jnp.where(inside, narrow, middle), jnp.where(inside, middle, wide)

    # Were p allowed to be negative, this width would be the solution; with it cut at 0 the ball is reached later.
    widest = jnp.mean(gap) + jnp.std(fixed) / jnp.sqrt(radius) + finfo.tiny
    _, width = jax.lax.fori_loop(0, finfo.nmant + 4, halve, (jnp.zeros_like(widest), widest))
    return worst(width) @ losses


def cvar_training(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    alpha: ArrayLike,
    attack: Callable[..., Any] | None = None,
    epsilon: Epsilon | None = None,
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Algorithm:
    """Train on the worst alpha of each batch: conditional_value_at_risk(CE(apply(params, x_i), y_i), alpha=alpha).

    The losses are those of x [B, ...], or with an `attack` of x_adv. The tail is a batch's own, which on average lies
    below that of all the data: take alpha B well above 1 (Levy et al. 2020, arXiv:2010.05893).

    Args:
        alpha: in (0, 1], may be traced.
        attack, epsilon, augment, trainable: as in `adversarial_training`.

    Metrics: `loss`, `mean_loss`, and `accuracy`, or with an attack `adversarial_accuracy`.
    """

    def objective(state: TrainState) -> Objective:
        def at(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            losses, right = _classified(network, params, batch, key, attack, epsilon, state.step)
            loss = conditional_value_at_risk(losses, alpha=alpha)
            return loss, {"mean_loss": losses.mean(), _name_of_accuracy(attack): right.mean()}

        return at

    return stateful_algorithm(network, objective, optimizer, augment=augment, trainable=trainable)


@flax.struct.dataclass
class GroupState(TrainState):
    """log_group_weights: [G], the logarithms of weights that sum to 1."""

    log_group_weights: Array | None = None


def group_dro(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    num_groups: int,
    step_size: ArrayLike,
    attack: Callable[..., Any] | None = None,
    epsilon: Epsilon | None = None,
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Algorithm:
    """Train on min_params max_g (mean loss of group g), the maximum by exponentiated gradient on group weights q.

    q_g <- q_g exp(step_size loss_g) / sum, loss_g the mean of CE over the rows of g in this batch, then one optimiser
    step on sum_g q_g loss_g (Sagawa et al. 2020, arXiv:1911.08731, algorithm 1, with all groups of a batch at a time).
    A group without a row in the batch counts as loss 0 in both. The weights are kept as logarithms, lest
    one underflow to 0, from which no factor brings it back.

    Args:
        num_groups: G; batches are LabelledBatch records with `group` [B] in 0..G-1.
        step_size: of the group weights (0.01 in the paper), per nat, may be traced; 0 weighs the groups alike for good.
        attack, epsilon, augment, trainable: as in `adversarial_training`.

    Metrics: `loss`, `group_weights` [G], `worst_group_loss` and `worst_group_accuracy` among the groups in the batch,
    and `accuracy` or, with an attack, `adversarial_accuracy`. `group_means` gives each group's, on data of your choice.
    Raises ValueError if a batch has no `group` or, outside jit, one outside 0..G-1.
    """

    def objective(state: GroupState) -> Objective:
        def at(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            losses, right = _classified(network, params, batch, key, attack, epsilon, state.step)
            group_losses, counts = group_means(losses, batch.group, num_groups=num_groups)
            group_right, _ = group_means(right, batch.group, num_groups=num_groups)
            seen = jnp.where(counts > 0, group_losses, 0.0)
            growth = (step_size * jax.lax.stop_gradient(seen)).astype(state.log_group_weights.dtype)
            weights = jax.nn.log_softmax(state.log_group_weights + growth)
            return jnp.exp(weights) @ seen, {
                "group_weights": weights,
                "worst_group_loss": jnp.max(jnp.where(counts > 0, group_losses, -jnp.inf)),
                "worst_group_accuracy": jnp.min(jnp.where(counts > 0, group_right, jnp.inf)),
                _name_of_accuracy(attack): right.mean(),
            }

        return at

    inner = stateful_algorithm(network, objective, optimizer, augment=augment, trainable=trainable)

    def init(key: Key) -> GroupState:
        even = jnp.full((num_groups,), -jnp.log(num_groups), jnp.float32)
        return GroupState(**vars(inner.init(key)), log_group_weights=even)

    def step(state: GroupState, batch: AnyBatch) -> tuple[GroupState, Metrics]:
        batch = as_labelled(batch)
        if batch.group is None:
            raise ValueError("group_dro: the batch has no `group` [B]")
        if not tracing(batch.group) and not np.all((np.asarray(batch.group) // num_groups) == 0):
            raise ValueError(f"group_dro: groups must lie in 0..{num_groups - 1}, got {np.unique(batch.group)}")
        state, metrics = inner.step(state, batch)
        weights = metrics["group_weights"]
        return state.replace(log_group_weights=weights), {**metrics, "group_weights": jnp.exp(weights)}

    return Algorithm(init, step)


def group_means(values: ArrayLike, group: ArrayLike, *, num_groups: int) -> tuple[Array, Array]:
    """The mean of values [B] over the rows of each group [B] int, and how many there are: ([G], [G]); NaN of none."""
    values, group = jnp.asarray(values), jnp.asarray(group)
    counts = jax.ops.segment_sum(jnp.ones_like(values), group, num_segments=num_groups)
    sums = jax.ops.segment_sum(values, group, num_segments=num_groups)
    # The inner where keeps the gradient of 0 / 0 out of the rows of other groups.
    return jnp.where(counts > 0, sums / jnp.where(counts > 0, counts, 1.0), jnp.nan), counts


def _classified(
    network: Network,
    params: Params,
    batch: LabelledBatch,
    key: Key,
    attack: Callable[..., Any] | None,
    epsilon: Epsilon | None,
    step: Array,
) -> tuple[Array, Array]:
    """(cross-entropy [B] in nats, 1.0 where right [B]), at x or at what the attack makes of it."""
    radius = None if epsilon is None else at_step(epsilon, step)
    x = batch.x if attack is None else attacked(attack, network, params, batch, key, radius)
    logits = network.apply(params, x)
    return cross_entropy(logits, batch.y), (margins(logits, batch.y) > 0).astype(logits.dtype)


def _name_of_accuracy(attack: Callable[..., Any] | None) -> str:
    return "accuracy" if attack is None else "adversarial_accuracy"


def _uniform(losses: Array) -> Array:
    return jnp.full(losses.shape, 1.0 / losses.size, losses.dtype)


def _losses(name: str, losses: ArrayLike) -> Array:
    losses = jnp.asarray(losses)
    if losses.ndim != 1 or losses.size == 0:
        raise ValueError(f"{name}: needs losses [B] with B >= 1, got shape {losses.shape}")
    return losses.astype(jnp.result_type(losses, 0.0))
