"""TRADES: clean accuracy traded against how far a bounded perturbation can move the predicted probabilities."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, TrainState
from jaxalign.robustness.adversarial_training import (
    Augment,
    Epsilon,
    accuracy,
    ascend,
    at_step,
    fixed_classifier,
    gaussian,
    stateful_algorithm,
)
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.labelled_batch import LabelledBatch
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

START = 1e-3  # the deviation of the Gaussian start, in the units of x: at x itself the KL divergence has no slope


def prediction_divergence(logits: ArrayLike, other_logits: ArrayLike) -> Array:
    """KL(softmax(logits) || softmax(other_logits)) in nats, [B, C], [B, C] -> [B]."""
    logits, other_logits = jnp.asarray(logits), jnp.asarray(other_logits)
    chex.assert_rank([logits, other_logits], 2)
    chex.assert_equal_shape([logits, other_logits])
    log_p, log_q = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(other_logits, axis=1)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


def trades_loss(clean_logits: ArrayLike, adversarial_logits: ArrayLike, labels: ArrayLike, *, beta: ArrayLike) -> Array:
    """CE(clean_logits, labels) + beta KL(softmax(clean_logits) || softmax(adversarial_logits)) in nats, [B].

    Gradients flow into both logits (Zhang et al. 2019, arXiv:1901.08573; beta is its 1 / lambda, and the KL divergence
    is from the clean prediction, as in the authors' code).

    Args:
        clean_logits, adversarial_logits: [B, C].
        labels: [B] int.
        beta: not negative, may be traced. Raises ValueError, outside jit, where it is negative.
    """
    if isinstance(beta, int | float) and not beta >= 0:
        raise ValueError(f"trades_loss: beta must not be negative, got {beta}")
    return cross_entropy(clean_logits, labels) + beta * prediction_divergence(clean_logits, adversarial_logits)


def trades(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    epsilon: Epsilon,
    beta: ArrayLike = 6.0,
    steps: int = 10,
    step_size: ArrayLike | None = None,
    norm: str = "linf",
    bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """Train on mean_i trades_loss(apply(x_i), apply(x_adv_i), y_i), x_adv a point of the ball whose prediction differs.

    x_adv climbs KL(softmax(apply(x)) || softmax(apply(x_adv))) for `steps` steps from x plus a Gaussian of deviation
    0.001, so it needs no labels (Zhang et al. 2019, arXiv:1901.08573, algorithm 1).

    Args:
        network: `apply(params, x [B, ...]) -> logits [B, C]`.
        epsilon: radius in the units of x, may be traced, or an Optax schedule of the step.
        beta: the weight of the divergence (6 in the paper's experiments on images), may be traced.
        steps: of the climb; step_size: in the units of x, None is 2.5 epsilon / steps.
        norm, bounds: of the ball and the box.
        augment, trainable, microbatches: as in `adversarial_training`.

    Metrics: `loss`, `divergence` (mean KL, nats), `accuracy`, `adversarial_accuracy` at x_adv, and `epsilon`.
    """

    def objective(state: TrainState) -> Objective:
        radius = at_step(epsilon, state.step)
        size = 2.5 * jnp.asarray(radius) / max(1, steps) if step_size is None else step_size

        def at(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            fixed = fixed_classifier(network, params, batch.x)
            target = fixed(batch.x)
            x_adv = ascend(
                lambda x: prediction_divergence(target, fixed(x)), batch.x, gaussian(key, batch.x, START), radius,
                norm=norm, steps=steps, step_size=size, bounds=bounds,
            )  # fmt: skip
            clean, adversarial = network.apply(params, batch.x), network.apply(params, x_adv)
            loss = trades_loss(clean, adversarial, batch.y, beta=beta).mean()
            return loss, {
                "divergence": prediction_divergence(clean, adversarial).mean(),
                "accuracy": accuracy(clean, batch.y),
                "adversarial_accuracy": accuracy(adversarial, batch.y),
                "epsilon": jnp.asarray(radius, loss.dtype),
            }

        return at

    return stateful_algorithm(
        network, objective, optimizer, augment=augment, trainable=trainable, microbatches=microbatches
    )
