"""Adversarial training at about the price of plain training: one gradient step, or one shared with the weights."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm, merge
from jaxalign.robustness.adversarial_training import (
    Augment,
    Epsilon,
    accuracy,
    adversarial_training,
    ascend,
    at_step,
)
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.labelled_batch import AnyBatch, as_labelled
from jaxalign.robustness.threat_model import clip_to_box, project_onto, random_in_ball, steepest_direction
from jaxalign.types import Array, ArrayLike, Key, Metrics


def fast_adversarial_training(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: Epsilon,
    step_size: ArrayLike | None = None,
    norm: str = "linf",
    bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
    clean_weight: ArrayLike = 0.0,
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """`adversarial_training` with one gradient step from a random start (Wong et al. 2020, arXiv:2001.03994).

    x_adv = project(x + delta + step_size steepest_direction(gradient at x + delta)), [B, ...], delta uniform in the
    ball. Trained for long at a large epsilon it may suddenly break ("catastrophic overfitting"): the accuracy on its
    own one-step attack rises while that under `pgd` falls to nothing, so watch the latter.

    Args:
        epsilon: radius in the units of x, may be traced, or an Optax schedule of the step.
        step_size: in the units of x; None is 1.25 epsilon.
        norm, bounds: of the ball and the box.
        clean_weight, augment, trainable, microbatches, and the metrics: as in `adversarial_training`.
    """

    def attack(key: Key, apply: Callable[[Any], Array], x: Any, y: Array, radius: ArrayLike) -> Any:
        return ascend(
            lambda x_adv: cross_entropy(apply(x_adv), y), x, random_in_ball(key, x, radius, norm), radius,
            norm=norm, steps=1, step_size=1.25 * radius if step_size is None else step_size, bounds=bounds,
        )  # fmt: skip

    return adversarial_training(
        network,
        optimizer,
        attack=attack,
        epsilon=epsilon,
        clean_weight=clean_weight,
        augment=augment,
        trainable=trainable,
        microbatches=microbatches,
    )


@flax.struct.dataclass
class FreeState(TrainState):
    """perturbation: leaves [B, ...] in the shape of the inputs, carried from one batch to the next."""

    perturbation: Any = None


def free_adversarial_training(
    network: Network,
    optimizer: optax.GradientTransformation,
    example: Any,
    *,
    epsilon: Epsilon,
    replays: int,
    step_size: ArrayLike | None = None,
    norm: str = "linf",
    bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
) -> Algorithm:
    """Train on each batch `replays` times; every backward pass moves the weights and the perturbation together.

    One step repeats, `replays` times: the gradients of mean CE(apply(params, x + delta), y) in params and in delta are
    taken at once; the optimiser moves params, and delta = project(delta + step_size steepest_direction(its gradient)).
    The next batch begins with this delta (Shafahi et al. 2019, arXiv:1904.12843, algorithm 1). An epoch costs `replays`
    plain epochs, so train for as many fewer.

    Args:
        example: inputs of the shape of a batch's x, leaves [B, ...]; all batches must have it.
        epsilon: radius in the units of x, may be traced, or an Optax schedule of the step.
        replays: the m of the paper, at least 1; the optimiser takes that many steps for each of this Algorithm's.
        step_size: in the units of x; None is epsilon, as in the paper.
        norm, bounds: of the ball and the box.
        augment, trainable: as in `adversarial_training`.

    Metrics, means over the replays: `loss`, `adversarial_accuracy`, `gradient_norm`; and `epsilon`.
    Raises ValueError if `replays` < 1, and if a batch has not the shape of `example`.
    """
    if replays < 1:
        raise ValueError(f"free_adversarial_training: replays must be at least 1, got {replays}")
    begin = gradient_algorithm(network, lambda *_: (jnp.zeros(()), {}), optimizer, trainable=trainable).init
    shapes = jax.tree.map(jnp.shape, example)

    def init(key: Key) -> FreeState:
        state = begin(key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.result_type(leaf)), example)
        return FreeState(**vars(state), perturbation=zeros)

    def step(state: FreeState, batch: AnyBatch) -> tuple[FreeState, Metrics]:
        x, y, *_ = as_labelled(batch)
        if jax.tree.map(jnp.shape, x) != shapes:
            raise ValueError(f"free_adversarial_training: x is {jax.tree.map(jnp.shape, x)}, the example is {shapes}")
        key, augment_key = jax.random.split(state.key)
        x = x if augment is None else augment(augment_key, x)
        radius = at_step(epsilon, state.step)
        size = jnp.asarray(radius if step_size is None else step_size)

        def loss(params: Any, delta: Any) -> tuple[Array, Metrics]:
            logits = network.apply(merge(params, state.frozen), clip_to_box(jax.tree.map(jnp.add, x, delta), bounds))
            value = cross_entropy(logits, y).mean()
            return value, {"loss": value, "adversarial_accuracy": accuracy(logits, y)}

        def replay(carry: Any, _: None) -> tuple[Any, Metrics]:
            params, opt_state, delta = carry
            (grads, slope), metrics = jax.grad(loss, (0, 1), has_aux=True)(params, delta)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            direction = steepest_direction(slope, norm)
            delta = jax.tree.map(lambda d, u: d + size.astype(d.dtype) * u, delta, direction)
            delta = project_onto(x, delta, radius, norm, bounds)
            return (optax.apply_updates(params, updates), opt_state, delta), {
                **metrics,
                "gradient_norm": optax.tree.norm(grads),
            }

        # The last batch's perturbation fits neither this one's box nor, on a schedule, its ball.
        delta = project_onto(x, state.perturbation, radius, norm, bounds)
        (params, opt_state, delta), metrics = jax.lax.scan(
            replay, (state.params, state.opt_state, delta), length=replays
        )
        metrics = {name: value.mean() for name, value in metrics.items()}
        metrics["epsilon"] = jnp.asarray(radius, metrics["loss"].dtype)
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, key=key, perturbation=delta
        ), metrics

    return Algorithm(jax.jit(init), step)
