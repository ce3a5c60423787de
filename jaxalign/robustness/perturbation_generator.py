"""A network that makes bounded perturbations: trained against a classifier, used as an attack, trained with it.

Once trained it attacks in one forward pass, without the classifier (Xiao et al. 2018, "Generating Adversarial Examples
with Adversarial Networks", arXiv:1801.02610).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState
from jaxalign.robustness.adversarial_training import accuracy
from jaxalign.robustness.attack_losses import cross_entropy, margins
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.gan import init_players, player_step
from jaxalign.robustness.gan_losses import NON_SATURATING, GanObjective
from jaxalign.robustness.labelled_batch import AnyBatch, LabelledBatch, as_labelled
from jaxalign.robustness.threat_model import clip_to_box, flatten_rows, project, unflatten_rows
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


def perturbed(
    generator: Network,
    params: Params,
    x: Any,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    bounds: Any = (0.0, 1.0),
) -> Any:
    """What the generator makes of x, inside ball and box by construction.

    linf: x_adv = middle + tanh(G(x)) half, of the interval that ball and box leave to each number: its ends are
    clip(x -+ epsilon, bounds). So no pixel is ever stuck outside the box, where it would get no gradient.
    l2, l1: x_adv = clip(x + epsilon project(G(x), 1, norm), bounds).

    Args:
        generator: `apply(params, x) -> leaves in the shapes of x`, any real numbers.
        x: leaves [B, ...], inside the box.
        epsilon: scalar or [B].

    Returns leaves [B, ...]. Raises ValueError if the generator's output has other shapes than x.
    """
    raw = generator.apply(params, x)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (raw, x)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"perturbed: the generator makes {shapes[0]}, x is {shapes[1]}")
    rows = flatten_rows(x)
    sizes = jnp.broadcast_to(jnp.asarray(epsilon, rows.dtype).reshape(-1, 1), rows.shape)
    radius = unflatten_rows(sizes, x)
    if norm != "linf":
        unit = project(raw, 1.0, norm)
        return clip_to_box(jax.tree.map(lambda a, r, u: a + r * u, x, radius, unit), bounds)
    lower = clip_to_box(jax.tree.map(jnp.subtract, x, radius), bounds)
    upper = clip_to_box(jax.tree.map(jnp.add, x, radius), bounds)
    inside = jax.tree.map(lambda a, b, r: (a + b) / 2 + (b - a) / 2 * jnp.tanh(r), lower, upper, raw)
    return clip_to_box(inside, bounds)  # rounding may step over the end


def perturbation_generator(
    generator: Network,
    apply: Callable[[Any], Array],
    optimizer: optax.GradientTransformation,
    *,
    epsilon: ArrayLike,
    norm: str = "linf",
    bounds: Any = (0.0, 1.0),
    confidence: ArrayLike = 0.0,
    discriminator: Network | None = None,
    discriminator_optimizer: optax.GradientTransformation | None = None,
    realism: ArrayLike = 1.0,
    objective: GanObjective = NON_SATURATING,
) -> Algorithm:
    """Train a generator of perturbations against a fixed classifier.

    loss = mean_i max(margins(apply(x_adv_i), y_i), -confidence) + realism mean_i objective.generator(D(x_adv_i))
    with x_adv = `perturbed(generator, params, x, epsilon)`, the second term only with a discriminator, which learns
    objective.discriminator(D(x_i), D(x_adv_i)) in the same step. (Xiao et al. 2018, arXiv:1801.02610, equations 1 to 4,
    untargeted and with the ball a constraint instead of equation 3's soft bound.)

    Args:
        generator: `apply(params, x [B, ...]) -> [B, ...]` in the shape of x.
        apply: the classifier attacked, x[B, ...] -> logits [B, C].
        epsilon, norm, bounds: the threat model; epsilon a scalar or [B].
        confidence: >= 0, how far below 0 a margin is still worth pushing, in the units of the logits.
        discriminator: `apply(params, x) -> logits [B]`; None: nothing asks that x_adv look like data.
        discriminator_optimizer: `optimizer` unless given.

    Batches are those of `as_labelled`, y [B] the true classes; `params` are {"generator": ...}, and "discriminator" if
    there is one. Metrics: `loss`, `success` (share misclassified), `generator_gradient_norm`, and with a discriminator
    `realism_loss`, `discriminator_loss`, `discriminator_gradient_norm`.
    """
    networks = {"generator": generator} | ({} if discriminator is None else {"discriminator": discriminator})
    optimizers = {"generator": optimizer, "discriminator": discriminator_optimizer or optimizer}

    def attack_loss(params: Params, others: Params, batch: LabelledBatch) -> tuple[Array, Metrics]:
        x_adv = perturbed(generator, params, batch.x, epsilon, norm=norm, bounds=bounds)
        margin = margins(apply(x_adv), batch.y)
        loss = jnp.maximum(margin, -confidence).mean()
        metrics = {"success": jnp.mean(margin < 0, dtype=jnp.float32)}
        if discriminator is not None:
            metrics["realism_loss"] = objective.generator(discriminator.apply(others["discriminator"], x_adv)).mean()
            loss += realism * metrics["realism_loss"]
        return loss, metrics

    def telling_apart(params: Params, x: Any, x_adv: Any) -> tuple[Array, Metrics]:
        real, fake = (discriminator.apply(params, inputs) for inputs in (x, x_adv))
        return objective.discriminator(real, fake).mean(), {}

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        batch = as_labelled(batch)
        params, opt_state, metrics = dict(state.params), dict(state.opt_state), {}
        if discriminator is not None:
            x_adv = perturbed(generator, params["generator"], batch.x, epsilon, norm=norm, bounds=bounds)
            new, metrics = player_step(
                "discriminator",
                optimizers,
                lambda p: telling_apart(p, batch.x, x_adv),
                params["discriminator"],
                opt_state["discriminator"],
            )
            params["discriminator"], opt_state["discriminator"] = new
        new, more = player_step(
            "generator",
            optimizers,
            lambda p: attack_loss(p, params, batch),
            params["generator"],
            opt_state["generator"],
        )
        params["generator"], opt_state["generator"] = new
        metrics = {**metrics, **more}
        metrics["loss"] = metrics.pop("generator_loss")
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(jax.jit(lambda key: init_players(networks, optimizers, key)), step)


def generated_attack(
    generator: Network,
    params: Params,
    *,
    epsilon: ArrayLike,
    norm: str = "linf",
    bounds: Any = (0.0, 1.0),
) -> Callable[..., AttackResult]:
    """A trained generator as an attack, `attack(key, apply, x, y, epsilon=epsilon) -> AttackResult`.

    It uses neither the key nor, to find x_adv, the classifier; `checked_result` judges what it makes, and an input
    misclassified as it is stays as it is. Fit for `adversarial_training(attack=...)` and robustness evaluations.

    Args:
        params: of the generator alone, `state.params["generator"]`.
    """
    radius = epsilon

    def attack(
        key: Key, apply: Callable[[Any], Array], x: Any, y: ArrayLike, epsilon: ArrayLike = radius
    ) -> AttackResult:
        x_adv = perturbed(generator, params, x, epsilon, norm=norm, bounds=bounds)
        wrong = margins(apply(x), y) < 0
        x_adv = jax.tree.map(lambda a, b: jnp.where(wrong.reshape((-1,) + (1,) * (a.ndim - 1)), a, b), x, x_adv)
        return checked_result(apply, x, x_adv, y, epsilon, norm=norm, bounds=bounds)

    return attack


def adversarial_generator_training(
    classifier: Network,
    generator: Network,
    classifier_optimizer: optax.GradientTransformation,
    generator_optimizer: optax.GradientTransformation | None = None,
    *,
    epsilon: ArrayLike,
    norm: str = "linf",
    bounds: Any = (0.0, 1.0),
    clean_weight: ArrayLike = 0.5,
    generator_steps: int = 1,
) -> Algorithm:
    """A classifier against a generator of perturbations: min over the classifier, max over the generator, of the loss

    classifier_loss = clean_weight mean_i CE(f(x_i), y_i) + (1 - clean_weight) mean_i CE(f(x_adv_i), y_i), nats,
    with x_adv = `perturbed(generator, ..., x, epsilon)`; the generator takes `generator_steps` steps up its second
    term, then the classifier one step down (Lee, Han & Lee 2017, "Generative Adversarial Trainer", arXiv:1705.03387;
    here the generator sees x, not the classifier's gradient).

    Args:
        classifier: `apply(params, x [B, ...]) -> logits [B, C]`.
        generator: `apply(params, x [B, ...]) -> [B, ...]` in the shape of x.
        generator_optimizer: `classifier_optimizer` unless given.
        epsilon, norm, bounds: the threat model; epsilon a scalar or [B].
        clean_weight: in [0, 1].

    Batches are those of `as_labelled`; `params` are {"classifier": ..., "generator": ...}. The classifier learns to
    resist the generator; attacks made against it, far less than after `adversarial_training`: measure with those.
    Metrics: `loss` (the classifier's), `accuracy`, `adversarial_accuracy` (at x_adv), `generator_loss` (minus its
    cross-entropy), `classifier_gradient_norm`, `generator_gradient_norm`.
    """
    optimizers = {"classifier": classifier_optimizer, "generator": generator_optimizer or classifier_optimizer}

    def attacked(params: Params, x: Any) -> Any:
        return perturbed(generator, params, x, epsilon, norm=norm, bounds=bounds)

    def step(state: TrainState, batch: AnyBatch) -> tuple[TrainState, Metrics]:
        batch = as_labelled(batch)
        fixed = state.params["classifier"]

        def harm(params: Params) -> tuple[Array, Metrics]:
            return -cross_entropy(classifier.apply(fixed, attacked(params, batch.x)), batch.y).mean(), {}

        def harder(player: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], Metrics]:
            return player_step("generator", optimizers, harm, *player)

        attacker = (state.params["generator"], state.opt_state["generator"])
        attacker, metrics = jax.lax.scan(harder, attacker, None, length=generator_steps)
        x_adv = attacked(attacker[0], batch.x)

        def defend(params: Params) -> tuple[Array, Metrics]:
            clean, adversarial = classifier.apply(params, batch.x), classifier.apply(params, x_adv)
            losses = cross_entropy(clean, batch.y), cross_entropy(adversarial, batch.y)
            loss = clean_weight * losses[0].mean() + (1.0 - clean_weight) * losses[1].mean()
            told = {"accuracy": accuracy(clean, batch.y), "adversarial_accuracy": accuracy(adversarial, batch.y)}
            return loss, told

        defender, more = player_step("classifier", optimizers, defend, fixed, state.opt_state["classifier"])
        metrics = jax.tree.map(lambda x: x[-1], metrics) | more
        metrics["loss"] = metrics.pop("classifier_loss")
        state = state.replace(
            step=state.step + 1,
            params={"classifier": defender[0], "generator": attacker[0]},
            opt_state={"classifier": defender[1], "generator": attacker[1]},
        )
        return state, metrics

    players = {"classifier": classifier, "generator": generator}
    return Algorithm(jax.jit(lambda key: init_players(players, optimizers, key)), step)
