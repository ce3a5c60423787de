"""Generative adversarial networks: a generator and a discriminator trained against each other, as one Algorithm."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, split_batch
from jaxalign.robustness.gan_losses import NON_SATURATING, GanObjective, gradient_penalty, r1_penalty
from jaxalign.robustness.labelled_batch import as_labelled
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


@flax.struct.dataclass
class GanState(TrainState):
    """`params` and `opt_state` are {"generator": ..., "discriminator": ...}.

    generator_average: the generator's parameters, averaged over steps with exponential weights: what to sample from
    """

    generator_average: Params = None


def gan(
    generator: Network,
    discriminator: Network,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation | None = None,
    *,
    latent_size: int,
    objective: GanObjective = NON_SATURATING,
    discriminator_steps: int = 1,
    gradient_penalty: ArrayLike | None = None,
    r1: ArrayLike | None = None,
    average_decay: ArrayLike = 0.999,
) -> Algorithm:
    """Train a generator whose samples a discriminator cannot tell from data.

    With z ~ N(0, I) and D the discriminator's logits, each step takes `discriminator_steps` S parts of the batch in
    turn, one update of the discriminator on each, then makes one update of the generator:
        discriminator: mean_i objective.discriminator(D(x_i), D(G(z_i)))
                       + gradient_penalty mean_i (|slope of D between x_i and G(z_i)| - 1)^2 + r1 / 2 mean_i |D'(x_i)|^2
        generator:     mean_i objective.generator(D(G(z_i)))
    (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1.) WGAN-GP is `objective=WASSERSTEIN, gradient_penalty=10.0,
    discriminator_steps=5` with Adam at b1 = 0 (arXiv:1704.00028); SN-GAN is `objective=HINGE` with
    `networks.spectral_normalized(discriminator)` (arXiv:1802.05957).

    Args:
        generator: `apply(params, latents [B, latent_size]) -> fakes [B, ...]`, and with labels
            `apply(params, latents, labels [B])`.
        discriminator: `apply(params, x [B, ...]) -> logits [B]`, and with labels `apply(params, x, labels)`; each
            logit of its own row only if there is a penalty.
        generator_optimizer, discriminator_optimizer: any Optax transformations; the second is the first unless given.
        objective: NON_SATURATING, WASSERSTEIN, HINGE, or a pair of losses of your own.
        discriminator_steps: S; B must be a multiple of it, and every update sees B / S examples.
        gradient_penalty, r1: weights; None: that penalty is not computed.
        average_decay: in [0, 1), of `state.generator_average`; (1 + t) / (10 + t) at step t while that is smaller.

    A batch is the data x [B, ...], real numbers, or anything `as_labelled` takes: then both networks are given the
    labels y. Metrics: `generator_loss`, `discriminator_loss` and `penalty` (its mean over S updates, `penalty` being
    the part of the penalties), `loss` (the two players' sum: a GAN does not make it small), `real_score` and
    `fake_score` (mean logits), `generator_gradient_norm`, `discriminator_gradient_norm`.
    Raises ValueError where the generator's output has another shape than x, or the logits are not [B].
    """
    optimizers = {
        "generator": generator_optimizer,
        "discriminator": generator_optimizer if discriminator_optimizer is None else discriminator_optimizer,
    }
    make = functools.partial(_fakes, generator, latent_size)
    score = functools.partial(_scores, discriminator)
    tell = functools.partial(_discriminator_objective, score, objective, gradient_penalty, r1)

    def init(key: Key) -> GanState:
        state = init_players({"generator": generator, "discriminator": discriminator}, optimizers, key)
        return GanState(**vars(state), generator_average=state.params["generator"])

    def step(state: GanState, batch: Any) -> tuple[GanState, Metrics]:
        parts = split_batch(_data(batch), discriminator_steps)
        key, generator_key, discriminator_key = jax.random.split(state.key, 3)
        discriminating, metrics = _discriminator_updates(make, tell, optimizers, state, parts, discriminator_key)
        last = jax.tree.map(lambda x: x[-1], parts)

        def fool(params: Params) -> tuple[Array, Metrics]:
            fake = make(params, generator_key, last)
            return objective.generator(score(discriminating[0], fake, last[1])).mean(), {}

        old = state.params["generator"], state.opt_state["generator"]
        generating, more = player_step("generator", optimizers, fool, *old)
        metrics |= more | {"loss": more["generator_loss"] + metrics["discriminator_loss"]}
        state = state.replace(
            step=state.step + 1,
            params={"generator": generating[0], "discriminator": discriminating[0]},
            opt_state={"generator": generating[1], "discriminator": discriminating[1]},
            key=key,
            generator_average=_averaged(state.generator_average, generating[0], state.step, average_decay),
        )
        return state, metrics

    return Algorithm(jax.jit(init), step)


def sample_generator(
    key: Key, generator: Network, params: Params, count: int, *, latent_size: int, labels: Array | None = None
) -> Array:
    """`count` samples [count, ...], of labels [count] if any; `params` are the `state.generator_average` of `gan`."""
    latents = jax.random.normal(key, (count, latent_size))
    return generator.apply(params, latents, *(() if labels is None else (labels,)))


def init_players(
    networks: dict[str, Network], optimizers: dict[str, optax.GradientTransformation], key: Key
) -> TrainState:
    """A TrainState with one entry per player in `params` (leaves [...]) and `opt_state`, each from a key of its own."""
    run_key, *keys = jax.random.split(key, 1 + len(networks))
    params = {name: network.init(k) for (name, network), k in zip(networks.items(), keys, strict=True)}
    opt_state = {name: optimizers[name].init(params[name]) for name in networks}
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, run_key)


def player_step(
    name: str,
    optimizers: dict[str, optax.GradientTransformation],
    objective: Callable[[Params], tuple[Array, Metrics]],
    params: Params,
    opt_state: Any,
) -> tuple[tuple[Params, Any], Metrics]:
    """One player's update, leaves [...], while the others stand still: ((params, opt_state), metrics).

    `objective(params) -> (scalar, metrics)` is made smaller; to its metrics are added `<name>_loss` and
    `<name>_gradient_norm`.
    """
    (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
    updates, opt_state = optimizers[name].update(grads, opt_state, params)
    metrics = {**metrics, f"{name}_loss": loss, f"{name}_gradient_norm": optax.tree.norm(grads)}
    return (optax.apply_updates(params, updates), opt_state), metrics


def _fakes(generator: Network, latent_size: int, params: Params, key: Key, part: Any) -> Array:
    """As many fakes as the part (x [B, ...], labels) has examples, of the same labels."""
    real, labels = part
    made = generator.apply(params, jax.random.normal(key, (real.shape[0], latent_size), real.dtype), *labels)
    if made.shape != real.shape:
        raise ValueError(f"gan: the generator makes {made.shape}, the data are {real.shape}")
    return made


def _scores(discriminator: Network, params: Params, x: Array, labels: tuple[Array, ...]) -> Array:
    logits = discriminator.apply(params, x, *labels)
    if logits.shape != x.shape[:1]:
        raise ValueError(f"gan: the discriminator must return one logit per row of {x.shape}, got {logits.shape}")
    return logits


def _discriminator_objective(
    score: Callable[..., Array],
    objective: GanObjective,
    two_sided: ArrayLike | None,
    r1: ArrayLike | None,
    params: Params,
    part: Any,
    fake: Array,
    key: Key,
) -> tuple[Array, Metrics]:
    real, labels = part
    real_logits, fake_logits = score(params, real, labels), score(params, fake, labels)
    penalty = jnp.zeros((), real_logits.dtype)
    critic = lambda x: score(params, x, labels)  # noqa: E731
    if two_sided is not None:
        penalty += two_sided * gradient_penalty(key, critic, real, fake).mean()
    if r1 is not None:
        penalty += r1 / 2 * r1_penalty(critic, real).mean()
    loss = objective.discriminator(real_logits, fake_logits).mean() + penalty
    return loss, {"penalty": penalty, "real_score": real_logits.mean(), "fake_score": fake_logits.mean()}


def _discriminator_updates(
    make: Callable[..., Array],
    tell: Callable[..., tuple[Array, Metrics]],
    optimizers: dict[str, optax.GradientTransformation],
    state: GanState,
    parts: Any,
    key: Key,
) -> tuple[tuple[Params, Any], Metrics]:
    """One update on each of the parts [S, B / S, ...]: the new (params, opt_state) and the means of the metrics."""

    def update(player: tuple[Params, Any], part_and_key: Any) -> tuple[tuple[Params, Any], Metrics]:
        part, part_key = part_and_key
        latent_key, penalty_key = jax.random.split(part_key)
        fake = make(state.params["generator"], latent_key, part)
        return player_step("discriminator", optimizers, lambda params: tell(params, part, fake, penalty_key), *player)

    player = state.params["discriminator"], state.opt_state["discriminator"]
    keys = jax.random.split(key, parts[0].shape[0])
    player, metrics = jax.lax.scan(update, player, (parts, keys))
    return player, jax.tree.map(lambda x: x.mean(axis=0), metrics)


def _data(batch: Any) -> tuple[Array, tuple[Array, ...]]:
    """(x [B, ...], (labels [B],)), or (x, ()) of a batch without labels."""
    labels: tuple[Array, ...] = ()
    if not hasattr(batch, "dtype"):
        labelled = as_labelled(batch)
        batch, labels = labelled.x, (labelled.y,)
    if not jnp.issubdtype(batch.dtype, jnp.floating):
        raise ValueError(f"gan: the data must be real numbers, got {batch.dtype} {batch.shape}")
    return batch, labels


def _averaged(average: Params, new: Params, step: Array, decay: ArrayLike) -> Params:
    # Young averages forget faster, or the first weights would be in all the early ones.
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, n: (decay * a + (1.0 - decay) * n).astype(a.dtype), average, new)
