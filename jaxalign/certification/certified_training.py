"""Training a classifier on bounds of its worst case over a ball, so that it can be certified: IBP, CROWN-IBP, SABR."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, TrainState
from jaxalign.certification.margins import margin_lower_bounds
from jaxalign.certification.sabr import small_boxes
from jaxalign.certification.schedules import between, ramp_fraction
from jaxalign.robustness.adversarial_training import accuracy, stateful_algorithm
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.labelled_batch import LabelledBatch
from jaxalign.robustness.pgd import pgd
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

METHODS = ("ibp", "crown-ibp", "sabr")

# Without the rewriting of convolutions as products of patches that attacks profit from: XLA recomputes the centres and
# radii of an interval for each of a window's patches.
_margins = inspect.unwrap(margin_lower_bounds)


def certified_training(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    method: str = "ibp",
    epsilon: ArrayLike,
    kappa: ArrayLike = 0.5,
    warm_up: ArrayLike = 2000,
    ramp: ArrayLike = 10_000,
    bounds: Any = (0.0, 1.0),
    share: ArrayLike = 0.4,
    attack_steps: int = 8,
    attack_step_size: ArrayLike = 0.5,
    **options: Any,
) -> Algorithm:
    """Train on an upper bound of the loss over the L-infinity ball of each input, so that balls can be certified.

    loss = kappa_t mean_i CE(apply(params, x_i), y_i) + (1 - kappa_t) mean_i worst_case_cross_entropy(margins_i)

    in nats, where margins_i [C-1] are lower bounds of z_y - z_j over the ball of radius epsilon_t. With
    r = clip((step - warm_up) / ramp, 0, 1), epsilon_t = r epsilon and kappa_t = 1 - r + r kappa: first the natural loss
    alone, then a slow turn, without which bounds are too loose to learn from (Gowal et al. 2018, arXiv:1810.12715,
    section 3). The methods differ in the bounds:

    "ibp": intervals through the network.
    "crown-ibp": beta_t CROWN-IBP + (1 - beta_t) intervals, with beta_t = 1 - r: tight while the ball grows, and then
        only intervals, at their price (Zhang et al. 2020, arXiv:1906.06316, section 3.2).
    "sabr": intervals through a box of radius `share epsilon_t` inside the ball, around a point that PGD finds: less
        than the worst case, and less regularisation (Mueller et al. 2023, arXiv:2210.04871, section 3).

    Args:
        network: `apply(params, x [B, ...]) -> logits [B, C]`, of operations that `interval_bounds` knows. On a CPU a
            ConvNet takes half the time with `convolution=jax.lax.conv_general_dilated` ("crown-ibp": twice the time).
        epsilon: final radius in the units of x. Train with somewhat more than will be certified (0.33 for 0.3).
        kappa: final weight of the natural loss, in [0, 1].
        warm_up, ramp: in steps.
        bounds: the box (lower, upper) that inputs are in, or None.
        share: SABR's lambda in [0, 1].
        attack_steps, attack_step_size: of SABR's PGD, the size as a multiple of epsilon_t.
        options: `augment`, `trainable` and `microbatches` of `adversarial_training`, whose batches these are.

    Numbers may be traced, `attack_steps` apart. Metrics: `loss`, `natural_loss`, `robust_loss`,
    `accuracy`, `certified_accuracy` (share of rows with all margins positive; of "sabr" `box_accuracy`, which certifies
    nothing), `epsilon`, `kappa`. Raises ValueError for an unknown method and for numbers out of range.
    """
    checked(method=method, epsilon=epsilon, kappa=kappa, warm_up=warm_up, ramp=ramp, share=share)

    def lower_bounds(params: Params, batch: LabelledBatch, key: Key, radius: Array, grown: Array) -> Array:
        """[B, C-1]"""
        within = functools.partial(_margins, functools.partial(network.apply, params), bounds=bounds)
        if method == "crown-ibp":
            return crown_ibp_margins(within, batch, radius, 1.0 - grown)
        if method == "sabr":
            attack = functools.partial(pgd, steps=attack_steps, step_size=attack_step_size * radius, bounds=bounds)
            batch = small_boxes(key, attack, network, params, batch, radius, share=share, bounds=bounds)
            radius = share * radius
        return within(batch.x, batch.y, radius)

    def objective(state: TrainState) -> Objective:
        def at(params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
            logits = network.apply(params, batch.x)
            grown = ramp_fraction(state.step, warm_up=warm_up, ramp=ramp)
            radius = between(0.0, epsilon, grown).astype(logits.dtype)
            natural_weight = between(1.0, kappa, grown).astype(logits.dtype)
            margins = lower_bounds(params, batch, key, radius, grown)
            natural_loss = cross_entropy(logits, batch.y).mean()
            robust_loss = worst_case_cross_entropy(margins).mean()
            certified = jnp.mean(jnp.all(margins > 0, axis=1), dtype=jnp.float32)
            return between(robust_loss, natural_loss, natural_weight), {
                "natural_loss": natural_loss,
                "robust_loss": robust_loss,
                "accuracy": accuracy(logits, batch.y),
                "box_accuracy" if method == "sabr" else "certified_accuracy": certified,
                "epsilon": radius,
                "kappa": natural_weight,
            }

        return at

    return stateful_algorithm(network, objective, optimizer, **options)


def worst_case_cross_entropy(margins: Array) -> Array:
    """`log(1 + sum_j exp(-margins[:, j]))`, an upper bound of the cross-entropy where margins are lower bounds.

    It is the cross-entropy at the logits 0 of the true class and -margins of the others: each wrong class as high over
    the true one as it could get (Wong & Kolter 2018, arXiv:1711.00851, theorem 2).

    Args:
        margins: lower bounds of z_y - z_j over the classes j != y, [B, C-1].

    Returns [B], in nats.
    """
    return jax.nn.logsumexp(jnp.concatenate([jnp.zeros_like(margins[:, :1]), -margins], axis=1), axis=1)


def crown_ibp_margins(within: Callable[..., Array], batch: LabelledBatch, radius: Array, beta: Array) -> Array:
    """`beta within(..., method="crown-interval") + (1 - beta) within(...)`, [B, C-1]; no CROWN where beta is 0."""
    interval = within(batch.x, batch.y, radius)

    def mixed(interval: Array) -> Array:
        crown = within(batch.x, batch.y, radius, method="crown-interval")
        return between(interval, crown, beta.astype(interval.dtype))

    return jax.lax.cond(beta > 0, mixed, lambda interval: interval, interval)


def checked(*, method: str, epsilon: Any, kappa: Any, warm_up: Any, ramp: Any, share: Any) -> None:
    """ValueError for a method that is not known and for numbers (no arrays [...]) out of range."""
    if method not in METHODS:
        raise ValueError(f"certified_training: method must be one of {', '.join(METHODS)}, got {method!r}")
    ranges = {"epsilon": (epsilon, jnp.inf), "warm_up": (warm_up, jnp.inf), "ramp": (ramp, jnp.inf)}
    for name, (value, most) in (ranges | {"kappa": (kappa, 1), "share": (share, 1)}).items():
        if isinstance(value, int | float) and not 0 <= value <= most:
            raise ValueError(f"certified_training: {name} must lie in [0, {most}], got {value}")
