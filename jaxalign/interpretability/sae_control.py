"""What steers a sparse autoencoder from outside its loss: dead features begun anew, L0 led to a target."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, path_name
from jaxalign.interpretability.sae_config import SELECTING, SAEConfig
from jaxalign.interpretability.sae_features import flat_decoder, sae_decode, sae_encode
from jaxalign.interpretability.sae_loss import sides
from jaxalign.interpretability.sae_parameters import decoder_norms
from jaxalign.interpretability.sparse_autoencoder import SAEState, sparse_autoencoder
from jaxalign.types import Array, ArrayLike, Key, Metrics


def resample_dead(key: Key, state: SAEState, x: Any, config: SAEConfig, *, scale: ArrayLike = 0.2) -> SAEState:
    """Begin every dead feature anew on an input that is badly reconstructed (Bricken et al. 2023).

    A dead feature, one with `since_fired` > `dead_after`, takes a row b of the batch with probability in proportion to
    |x_hat_b - x_b|^4. Its decoder row becomes the direction of the target less b_dec with the mean norm of the living,
    its encoder column the direction of the encoder's input with `scale` times their mean norm; its biases 0, its
    threshold `initial_threshold`, its optimiser moments 0, and its count begins again.

    Args:
        x: a batch as the algorithm takes it: [B, D], a pair of these, or [B, L, D].

    Every shape is static, so this can be jitted, and called in a `cond` every so many steps. With no dead feature the
    state is returned as it was. Where no feature lives, norms are taken as 1.
    """
    inputs, targets = sides(x, config)
    params = state.params
    dead = state.since_fired > config.dead_after
    x_in = x[0] if config.d_out is not None else x
    x_hat = sae_decode(params, sae_encode(params, x_in, config), config).reshape(targets.shape)
    errors = jnp.square(x_hat - targets).sum(axis=1)
    rows = jax.random.categorical(key, 2 * jnp.log(jnp.maximum(errors, 1e-30)), shape=(config.d_sae,))
    b_dec = params["b_dec"].reshape(1, -1)
    seen = inputs - b_dec if config.apply_b_dec_to_input else inputs

    def living_mean(norms: Array) -> Array:
        count = (~dead).sum()
        return jnp.where(count > 0, jnp.where(dead, 0.0, norms).sum() / jnp.maximum(count, 1), 1.0)

    def direction(rows: Array) -> Array:
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    w_enc = params["W_enc"].reshape(-1, config.d_sae)
    encoder = direction(seen[rows]).T * scale * living_mean(jnp.linalg.norm(w_enc, axis=0))
    decoder = direction((targets - b_dec)[rows]) * living_mean(jnp.linalg.norm(flat_decoder(params), axis=1))
    fresh = {
        "W_enc": encoder.reshape(params["W_enc"].shape),
        "W_dec": decoder.reshape(params["W_dec"].shape),
        "threshold": jnp.full(config.d_sae, config.initial_threshold),
    }
    if config.decoder_norm == "unit":
        fresh["W_dec"] = fresh["W_dec"] / living_mean(decoder_norms(params))

    def anew(path: tuple[Any, ...], leaf: Array, values: dict[str, Array]) -> Array:
        name = path_name(path[-1:])
        if name not in params or name == "b_dec" or leaf.ndim == 0:
            return leaf
        mask = dead.reshape(
            [-1 if axis == (leaf.ndim - 1 if name == "W_enc" else 0) else 1 for axis in range(leaf.ndim)]
        )
        return jnp.where(mask, values.get(name, jnp.zeros_like(leaf)).astype(leaf.dtype), leaf)

    return state.replace(
        params=jax.tree.map_with_path(lambda path, leaf: anew(path, leaf, fresh), params),
        opt_state=jax.tree.map_with_path(lambda path, leaf: anew(path, leaf, {}), state.opt_state),
        since_fired=jnp.where(dead, 0, state.since_fired),
    )


@flax.struct.dataclass
class TargetL0State(SAEState):
    """An SAEState with a controller.

    log_control: [], log of what is adjusted
    log_l0: [], an average of log l0 over past steps
    """

    log_control: Array | None = None
    log_l0: Array | None = None


def target_l0(
    config: SAEConfig,
    optimizer: optax.GradientTransformation,
    target: ArrayLike,
    *,
    rate: ArrayLike = 0.01,
    damping: ArrayLike = 10.0,
    decay: ArrayLike = 0.9,
    max_log_change: ArrayLike = 8.0,
    **options: Any,
) -> Algorithm:
    """`sparse_autoencoder` of "relu", "gated" or "jumprelu", steered until `target` features fire per row on average.

    y' = decay y + (1 - decay) log l0;  u' = u + rate (y' - log target + damping (y' - y)) each step, and "relu" and
    "gated" have lambda = exp(u), which so grows while too many features fire, and less while they are becoming fewer.
    A jumprelu threshold that has risen does not come down when lambda does, so "jumprelu" keeps lambda, takes the
    quadratic penalty, and has exp(-u / 5) for the L0 that it is around. What selects has its L0 in k.

    Args:
        config: its `sparsity` is where lambda starts, or stays.
        target: scalar [], mean features per row; may be traced, so a sweep of targets is one program.
        rate, damping, decay: of the controller above, per step.
        max_log_change: how far u may go from its start.
        **options: those of `sparse_autoencoder`.

    Metrics gain "control", the lambda or inner L0 of the step. Raises ValueError for an activation that selects, and,
    outside jit, for a target outside (0, d_sae).
    """
    if config.activation in SELECTING:
        raise ValueError(f"target_l0: {config.activation!r} has its L0 in k; it has no sparsity term to adjust")
    if isinstance(target, int | float) and not 0 < target < config.d_sae:
        raise ValueError(f"target_l0: target must lie in (0, d_sae = {config.d_sae}), got {target}")
    goal = jnp.log(jnp.asarray(target, jnp.float32))
    jump = config.activation == "jumprelu"
    # The quadratic penalty steers by itself, and thresholds are slow: the controller only trims what it leaves.
    gain = -0.2 if jump else 1.0
    start = goal if jump else jnp.log(jnp.asarray(config.sparsity, jnp.float32))

    def steered(control: Array) -> Algorithm:
        moved = {"l0_penalty": "quadratic", "target_l0": control} if jump else {"sparsity": control}
        return sparse_autoencoder(dataclasses.replace(config, **moved), optimizer, **options)

    def init(key: Key) -> TargetL0State:
        state = steered(jnp.exp(start)).init(key)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return TargetL0State(**fields, log_control=start, log_l0=goal)

    def step(state: TargetL0State, batch: Any) -> tuple[TargetL0State, Metrics]:
        control = jnp.exp(state.log_control)
        state, metrics = steered(control).step(state, batch)
        now = jnp.log(jnp.maximum(metrics["l0"], 1e-3))
        log_l0 = decay * state.log_l0 + (1 - decay) * now
        change = gain * rate * (log_l0 - goal + damping * (log_l0 - state.log_l0))
        change = jnp.where(jnp.abs(log_l0 - goal) < 0.3, change, 0.0) if jump else change
        reach = max_log_change * (0.2 if jump else 1.0)
        moved = jnp.clip(state.log_control + change, start - reach, start + reach)
        return state.replace(log_control=moved, log_l0=log_l0), {**metrics, "control": control}

    return Algorithm(init, step)
