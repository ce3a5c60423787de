"""Training for randomised smoothing: on Gaussian noise, and on attacks against the smoothed classifier (SmoothAdv)."""

from collections.abc import Callable
from typing import Any

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


def smooth_adversarial_training(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    sigma: ArrayLike,
    epsilon: Epsilon,
    steps: int,
    samples: int,
    step_size: ArrayLike | None = None,
    norm: str = "l2",
    bounds: tuple[ArrayLike, ArrayLike] | None = (0.0, 1.0),
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """Train on noisy copies of inputs that were moved against the smoothed classifier (SmoothAdv-PGD).

    With noise_m ~ N(0, sigma^2 I), m < samples, drawn once a step for each row, x_adv climbs
    -log mean_m softmax(apply(x_adv + noise_m))[y], the loss of the soft smoothed classifier, and the same noise is then
    trained on: loss = mean_{i, m} CE(apply(params, x_adv_i + noise_im), y_i), in nats (Salman et al. 2019,
    arXiv:1906.04584, sections 2.2 and 2.3). Noisy inputs are not clipped to the box: no certificate is.

    Args:
        network: `apply(params, x [B, ...]) -> logits [B, C]`; it is given samples * B rows at a time.
        sigma: deviation of the noise in the units of x, may be traced.
        epsilon: radius in the units of x, may be traced, or an Optax schedule of the step (the authors warm up).
        steps: of the climb, from x itself; step_size: in the units of x, None is 2 epsilon / steps.
        samples: how many noisy copies, the paper's m_train.
        norm, bounds: of the ball and the box of x_adv.
        augment, trainable, microbatches: as in `adversarial_training`.

    Metrics: `loss`, `adversarial_accuracy` (of the noisy copies of x_adv), `epsilon`.
    Raises ValueError if `samples` < 1.
    """
    if samples < 1:
        raise ValueError(f"smooth_adversarial_training: samples must be at least 1, got {samples}")

    def objective(state: TrainState) -> Objective:
        radius = at_step(epsilon, state.step)
        size = 2.0 * jnp.asarray(radius) / max(1, steps) if step_size is None else step_size

        def at(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            noise = gaussian(key, copies(batch.x, samples), sigma)
            x_adv = batch.x
            if steps:
                fixed = fixed_classifier(network, params, noise)

                def smoothed_loss(x: Any) -> Array:
                    logits = fixed(jax.tree.map(jnp.add, copies(x, samples), noise))
                    log_p = jax.nn.log_softmax(logits.reshape(samples, -1, logits.shape[1]), axis=2)
                    own = jnp.take_along_axis(log_p, batch.y[None, :, None], axis=2)[..., 0]
                    return jnp.log(samples) - jax.nn.logsumexp(own, axis=0)

                x_adv = ascend(
                    smoothed_loss, batch.x, jax.tree.map(jnp.zeros_like, batch.x), radius,
                    norm=norm, steps=steps, step_size=size, bounds=bounds,
                )  # fmt: skip
            logits = network.apply(params, jax.tree.map(jnp.add, copies(x_adv, samples), noise))
            labels = copies(batch.y, samples)
            loss = cross_entropy(logits, labels).mean()
            metrics = {"adversarial_accuracy": accuracy(logits, labels)}
            return loss, {**metrics, "epsilon": jnp.asarray(radius, loss.dtype)}

        return at

    return stateful_algorithm(
        network, objective, optimizer, augment=augment, trainable=trainable, microbatches=microbatches
    )


def gaussian_augmentation(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    sigma: ArrayLike,
    samples: int = 1,
    **options: Any,
) -> Algorithm:
    """Train on noisy copies of each input: mean_{i, m} CE(apply(params, x_i + noise_im), y_i), noise ~ N(0, sigma^2 I).

    What a classifier needs to be smoothed (Cohen et al. 2019, arXiv:1902.02918, section 3.3). It is
    `smooth_adversarial_training` at epsilon 0: x [B, ...] goes through the network as [samples B, ...].

    options: its `augment`, `trainable` and `microbatches`.
    """
    return smooth_adversarial_training(
        network, optimizer, sigma=sigma, epsilon=0.0, steps=0, samples=samples, **options
    )


def copies(tree: Any, samples: int) -> Any:
    """Leaves [B, ...] as [samples B, ...], the whole batch `samples` times over."""
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (samples,) + (1,) * (leaf.ndim - 1)), tree)
