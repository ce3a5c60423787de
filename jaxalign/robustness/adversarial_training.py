"""Training a classifier on attacks made against it as it is (PGD training), alone or mixed with clean inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, TrainState, gradient_algorithm
from jaxalign.robustness.attack_losses import cross_entropy, margins
from jaxalign.robustness.attack_program import as_function
from jaxalign.robustness.labelled_batch import AnyBatch, LabelledBatch, as_labelled
from jaxalign.robustness.threat_model import (
    clip_to_box,
    flatten_rows,
    project_onto,
    steepest_direction,
    unflatten_rows,
)
from jaxalign.robustness.traced_classifier import traced_classifier
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

Augment = Callable[[Key, Any], Any]
Epsilon = ArrayLike | optax.Schedule


def accuracy(logits: Array, labels: Array) -> Array:
    """The share of rows whose label has the largest of logits [B, C], a tie counting as wrong: mean(margins > 0)."""
    return jnp.mean(margins(logits, labels) > 0, dtype=jnp.float32)


def at_step(epsilon: Epsilon, step: Array) -> ArrayLike:
    """`epsilon`, scalar or [B], or a schedule's value at `step`. Raises ValueError if it is a negative number."""
    if isinstance(epsilon, int | float) and not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative or NaN, got {epsilon}")
    return epsilon(step) if callable(epsilon) else epsilon


def stateful_algorithm(
    network: Network,
    objective: Callable[[Any], Objective],
    optimizer: optax.GradientTransformation,
    *,
    augment: Augment | None = None,
    **options: Any,
) -> Algorithm:
    """`gradient_algorithm` over labelled batches, of an objective that may use the state (its step, above all).

    Args:
        objective: `TrainState -> (params, LabelledBatch, key) -> (scalar, metrics)`.
        augment: `(key, x) -> x` on leaves [B, ...], applied to each batch first.
        **options: `trainable` and `microbatches` of `gradient_algorithm`.
    """

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        def augmented(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            if augment is not None:
                augment_key, key = jax.random.split(key)
                batch = batch._replace(x=augment(augment_key, batch.x))
            return objective(state)(params, batch, key)

        return gradient_algorithm(network, augmented, optimizer, **options).step(state, as_labelled(batch))

    # The objective has no part in `init`, which jit draws at once instead of layer by layer.
    init = gradient_algorithm(network, lambda *_: (jnp.zeros(()), {}), optimizer, **options).init
    return Algorithm(jax.jit(init), step)


def fixed_classifier(network: Network, params: Params, x: Any) -> Callable[[Any], Array]:
    """`network.apply` at `params` for inputs of the shape of x [B, ...]: fit for loops, no gradient to `params`."""
    fixed = jax.lax.stop_gradient(params)
    program = traced_classifier(lambda inputs: network.apply(fixed, inputs), x)
    return as_function(program, program.consts)


def ascend(
    objective: Callable[[Any], Array],
    x: Any,
    start: Any,
    epsilon: ArrayLike,
    *,
    norm: str,
    steps: int,
    step_size: ArrayLike,
    bounds: Any,
) -> Any:
    """Projected gradient ascent on `objective(x_adv) -> [B]` in the ball around x; the last point, no gradient to it.

    delta = project_onto(x, delta + step_size steepest_direction(gradient of objective(x + delta)), epsilon, ...)
    This is the loop of those trainers that climb something other than the loss of the labels, or need the last point;
    `pgd` is the attack.

    Args:
        x, start: leaves [B, ...]; the climb begins at x + project_onto(x, start).
        epsilon, step_size: scalars in the units of x.
    """

    def nearest(delta: Any) -> Any:
        return project_onto(x, delta, epsilon, norm, bounds)

    def step(_: Array, delta: Any) -> Any:
        gradient = jax.grad(lambda d: jnp.sum(objective(jax.tree.map(jnp.add, x, d))))(delta)
        direction = steepest_direction(gradient, norm)
        size = jnp.asarray(step_size)
        return nearest(jax.tree.map(lambda d, u: d + size.astype(d.dtype) * u, delta, direction))

    delta = jax.lax.fori_loop(0, steps, step, nearest(start))
    return jax.lax.stop_gradient(clip_to_box(jax.tree.map(jnp.add, x, delta), bounds))


def gaussian(key: Key, like: Any, deviation: ArrayLike) -> Any:
    """Independent normal numbers of mean 0 in the shapes of leaves [B, ...]."""
    rows = flatten_rows(like)
    noise = jnp.asarray(deviation, rows.dtype) * jax.random.normal(key, rows.shape, rows.dtype)
    return unflatten_rows(noise, like)


def attacked(
    attack: Callable[..., Any],
    network: Network,
    params: Params,
    batch: LabelledBatch,
    key: Key,
    epsilon: ArrayLike | None = None,
) -> Any:
    """x_adv, leaves [B, ...]: what `attack` makes of `batch.x` against `params`, with no gradient through any of it."""
    fixed = jax.lax.stop_gradient(params)
    arguments = () if epsilon is None else (epsilon,)
    result = attack(key, lambda x: network.apply(fixed, x), batch.x, batch.y, *arguments)
    return jax.lax.stop_gradient(getattr(result, "x_adv", result))


def adversarial_training(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    attack: Callable[..., Any],
    epsilon: Epsilon | None = None,
    clean_weight: ArrayLike = 0.0,
    augment: Augment | None = None,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """Train on attacked inputs: the outer minimisation of min_params mean max_{x_adv near x} CE(apply(x_adv), y).

    loss = (1 - clean_weight) mean_i CE(apply(params, x_adv_i), y_i) + clean_weight mean_i CE(apply(params, x_i), y_i)
    in nats. The attack meets the current parameters, and its own steps get no gradient (Madry et al. 2018,
    arXiv:1706.06083, equation 2.1; the mixture is Goodfellow et al. 2015, arXiv:1412.6572, section 6).

    Args:
        network: `apply(params, x [B, ...]) -> logits [B, C]`.
        attack: `(key, apply, x, y) -> x_adv` or an AttackResult; with an `epsilon`, `(key, apply, x, y, epsilon)`,
            which is how `pgd` and the others are called: `attack=pgd, epsilon=0.3`, or
            `attack=functools.partial(pgd, steps=10), epsilon=0.3`.
        epsilon: the attack's radius, which may be traced, or an Optax schedule of the step. Small nets need one at
            large radii: with 0.3 from the start on MNIST they may settle on a constant output, and
            `optax.linear_schedule(0.0, 0.3, 2000)` lets them through.
        clean_weight: in [0, 1], may be traced; the clean inputs are evaluated unless it is the number 0.
        augment: `(key, x) -> x`, what is done to each batch before anything else.
        trainable, microbatches: as in `gradient_algorithm`.

    Batches are LabelledBatch, (x, y), or a mapping with those names. Metrics: `loss`, `adversarial_accuracy` at x_adv,
    `accuracy` where the clean inputs are evaluated, and `epsilon` where it is given.
    Raises ValueError on a clean_weight outside [0, 1] and, in a step, on a negative epsilon or a batch of other shapes.
    """
    if isinstance(clean_weight, int | float) and not 0 <= clean_weight <= 1:
        raise ValueError(f"adversarial_training: clean_weight must lie in [0, 1], got {clean_weight}")
    mixed = not isinstance(clean_weight, int | float) or clean_weight != 0

    def objective(state: TrainState) -> Objective:
        radius = None if epsilon is None else at_step(epsilon, state.step)

        def at(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            x_adv = attacked(attack, network, params, batch, key, radius)
            logits = network.apply(params, x_adv)
            loss = cross_entropy(logits, batch.y).mean()
            metrics = {"adversarial_accuracy": accuracy(logits, batch.y)}
            if mixed:
                clean = network.apply(params, batch.x)
                loss = (1.0 - clean_weight) * loss + clean_weight * cross_entropy(clean, batch.y).mean()
                metrics["accuracy"] = accuracy(clean, batch.y)
            if radius is not None:
                metrics["epsilon"] = jnp.asarray(radius, loss.dtype)
            return loss, metrics

        return at

    return stateful_algorithm(
        network, objective, optimizer, augment=augment, trainable=trainable, microbatches=microbatches
    )
