"""Training sparse autoencoders, transcoders and crosscoders as an Algorithm."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm, path_name
from jaxalign.interpretability.sae_config import TRACKING, SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.sae_loss import batch_loss, sae_loss, unit_rows
from jaxalign.interpretability.sae_parameters import sae_init
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

__all__ = [
    "SAEConfig",
    "SAEState",
    "sae_decode",
    "sae_encode",
    "sae_init",
    "sae_loss",
    "sparse_autoencoder",
]

AXIS = "features"
THRESHOLD_DECAY = 0.99
COUNTER_LIMIT = 1 << 30


@flax.struct.dataclass
class SAEState(TrainState):
    """A TrainState whose `params` are ready for `sae_encode`.

    since_fired: [F] int32, tokens since each feature was last above zero, at most 2^30
    """

    since_fired: Array | None = None


def sparse_autoencoder(
    config: SAEConfig,
    optimizer: optax.GradientTransformation,
    *,
    b_dec: ArrayLike | None = None,
    mesh: Mesh | None = None,
) -> Algorithm:
    """Train a sparse autoencoder on `sae_loss`.

    Args:
        config: a traced k or sparsity makes one program of a sweep: build the config, and this, inside the run.
        optimizer: any Optax transformation; clip gradients in it.
        b_dec: where b_dec starts, as in `sae_init`.
        mesh: divide the F features over its `features` axis: each device encodes and decodes its own, reconstructions
            are summed, and the largest of all are found from each device's largest.

    A batch is x [B, D], (x_in, x_out) for a transcoder, x [B, L, D] for a crosscoder. The state is an `SAEState`.
    After the update a "unit" decoder is scaled back to norm 1, a jumprelu threshold is cut off at 0, and the threshold
    of "batchtopk" and "matryoshka" becomes d threshold + (1 - d) (the least positive feature of the batch) with
    d = min(0.99, 1 - 1 / step): the mean of the first 100 batches, a moving average from then on.

    Metrics: those of `sae_loss`, "loss", "gradient_norm". A NaN in the batch makes the loss NaN, which `runtime.fit`
    reports. Raises ValueError if the mesh has no `features` axis that divides F, and when traced if the batch's shapes
    are not the config's.
    """

    if mesh is not None and config.d_sae % dict(mesh.shape).get(AXIS, config.d_sae + 1):
        raise ValueError(f"sparse_autoencoder: mesh {dict(mesh.shape)} needs an axis {AXIS!r} dividing {config.d_sae}")
    evaluate = _whole(config) if mesh is None else _divided(config, mesh)

    def objective(params: Params, batch: Any, key: Key) -> tuple[Array, Metrics]:
        return evaluate(params, *batch)

    network = Network(lambda key: sae_init(key, config, b_dec=b_dec), lambda params, x: sae_encode(params, x, config))
    inner = gradient_algorithm(network, objective, optimizer)

    def init(key: Key) -> SAEState:
        state = inner.init(key)
        since_fired = jnp.zeros(config.d_sae, jnp.int32)
        state = SAEState(state.step, state.params, state.opt_state, state.key, since_fired=since_fired)
        return state if mesh is None else _placed(state, mesh)

    def step(state: SAEState, batch: Any) -> tuple[SAEState, Metrics]:
        before = state.params
        state, metrics = inner.step(state, (batch, state.since_fired, state.step))
        fired, smallest = metrics.pop("fired"), metrics.pop("smallest")
        rows = jax.tree.leaves(batch)[0].shape[0]
        since_fired = jnp.where(fired, 0, jnp.minimum(state.since_fired + rows, COUNTER_LIMIT))
        params = _settle(before, state.params, smallest, state.step, config)
        return state.replace(params=params, since_fired=since_fired), metrics

    return Algorithm(init, step)


def _whole(config: SAEConfig, axis: str | None = None) -> Callable[..., tuple[Array, Metrics]]:
    def evaluate(params: Params, x: Any, since_fired: Array, step: Array) -> tuple[Array, Metrics]:
        loss, metrics, out = batch_loss(params, x, since_fired, step, config, axis=axis)
        return loss, {**metrics, "fired": out.fired, "smallest": out.smallest}

    return evaluate


def _divided(config: SAEConfig, mesh: Mesh) -> Callable[..., tuple[Array, Metrics]]:
    """`_whole` with the features divided over the mesh."""
    inner = _whole(config, AXIS)

    def evaluate(params: Params, x: Any, since_fired: Array, step: Array) -> tuple[Array, Metrics]:
        shapes = jax.eval_shape(_whole(config), params, x, since_fired, step)
        outputs = jax.tree.map_with_path(lambda path, leaf: _spec(path, leaf.ndim), shapes)
        specs = jax.tree.map_with_path(lambda path, leaf: _spec(path, leaf.ndim), params)
        inputs = (specs, PartitionSpec(), PartitionSpec(AXIS), PartitionSpec())
        return jax.shard_map(inner, mesh=mesh, in_specs=inputs, out_specs=outputs)(params, x, since_fired, step)

    return evaluate


def _spec(path: tuple[Any, ...], rank: int) -> PartitionSpec:
    """Where a leaf by this name has its feature axis: W_enc last, other leaves over [F, ...] first."""
    name = path_name(path[-1:])
    if name == "W_enc":
        return PartitionSpec(*[None] * (rank - 1), AXIS)
    divided = name in ("W_dec", "b_enc", "b_gate", "b_mag", "r_mag", "since_fired", "fired")
    return PartitionSpec(AXIS) if divided or (name == "threshold" and rank) else PartitionSpec()


def _placed(state: SAEState, mesh: Mesh) -> SAEState:
    def place(path: tuple[Any, ...], leaf: Array) -> Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, _spec(path, leaf.ndim)))

    return jax.tree.map_with_path(place, state)


def _settle(before: Params, params: Params, smallest: Array, step: Array, config: SAEConfig) -> Params:
    """What the optimiser does not decide: norms, and thresholds."""
    params = unit_rows(params) if config.decoder_norm == "unit" else dict(params)
    if config.activation == "jumprelu":
        params["threshold"] = jnp.maximum(params["threshold"], 0.0)
    if config.activation in TRACKING:
        old = before["threshold"]
        decay = jnp.minimum(THRESHOLD_DECAY, 1 - 1 / step)  # an average from 0 would be low for hundreds of steps
        tracked = decay * old + (1 - decay) * smallest
        params["threshold"] = jnp.where(jnp.isfinite(smallest), tracked, old)
    return params
