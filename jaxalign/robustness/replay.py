"""Learning a new task beside rows kept from the old ones: a reservoir, and training with replay from it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm
from jaxalign.robustness.attack_losses import cross_entropy, margins
from jaxalign.robustness.labelled_batch import AnyBatch, as_labelled
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class Reservoir(NamedTuple):
    """A uniform sample of all rows seen so far, of a fixed capacity.

    rows: pytree with leaves [capacity, ...]; the first min(seen, capacity) are filled
    seen: int32 scalar, rows offered so far
    """

    rows: Any
    seen: Array


def empty_reservoir(example: Any, *, capacity: int) -> Reservoir:
    """A reservoir for rows like those of the batch `example`, leaves [B, ...], of which only shape and dtype matter."""
    if capacity < 1:
        raise ValueError(f"a reservoir needs a capacity of at least 1, got {capacity}")
    example = jax.tree.map(jnp.asarray, example)
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), example)
    return Reservoir(rows, jnp.zeros((), jnp.int32))


def add_to_reservoir(key: Key, reservoir: Reservoir, batch: Any) -> Reservoir:
    """Offer each row of a batch, leaves [B, ...], to the reservoir, in order.

    The i-th row ever seen takes slot i while there is room; later it takes slot u ~ Uniform{0..i} if u < capacity and
    is dropped otherwise. After n rows each is in the reservoir with probability min(1, capacity / n).
    (Vitter 1985, "Random Sampling with a Reservoir", algorithm R.)
    """
    batch = jax.tree.map(jnp.asarray, batch)
    capacity = jax.tree.leaves(reservoir.rows)[0].shape[0]
    row = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)
    count = reservoir.seen + row
    slot = jnp.where(count < capacity, count, jax.random.randint(key, row.shape, 0, count + 1, jnp.int32))
    # Where two rows of the batch drew one slot the later stays, as if they had come one after another.
    taker = jnp.full(capacity, -1, jnp.int32).at[slot].max(row, mode="drop")

    def put(kept: Array, new: Array) -> Array:
        taken = (taker >= 0).reshape(-1, *[1] * (kept.ndim - 1))
        return jnp.where(taken, new[taker].astype(kept.dtype), kept)

    return Reservoir(jax.tree.map(put, reservoir.rows, batch), reservoir.seen + row.size)


def draw_from_reservoir(key: Key, reservoir: Reservoir, *, count: int) -> tuple[Any, Array]:
    """`count` rows drawn with replacement, leaves [count, ...], and valid [count], false while there is none."""
    capacity = jax.tree.leaves(reservoir.rows)[0].shape[0]
    filled = jnp.minimum(reservoir.seen, capacity)
    place = jax.random.randint(key, (count,), 0, jnp.maximum(filled, 1))
    return jax.tree.map(lambda leaf: leaf[place], reservoir.rows), jnp.broadcast_to(filled > 0, (count,))


@flax.struct.dataclass
class ReplayState(TrainState):
    """A TrainState with the rows it keeps, `reservoir`, of (x, y)."""

    reservoir: Reservoir | None = None


class WeightedRows(NamedTuple):
    """x, leaves [B, ...]; y [B] int; weight [B], how much each row counts."""

    x: Any
    y: Array
    weight: Array


def replay(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    example: AnyBatch,
    capacity: int,
    replayed: int,
    replay_weight: ArrayLike = 1.0,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    trainable: Callable[[str], bool] | None = None,
) -> Algorithm:
    """Train a classifier on each batch together with rows kept from all that came before.

    objective = (sum_{i in batch} loss_i + replay_weight sum_{j in drawn} loss_j) / (B + replay_weight * replayed)
    The rows are drawn before the batch is offered to the reservoir; the first step has none, and is the mean over the
    batch. (Experience replay with a reservoir: Chaudhry et al. 2019, arXiv:1902.10486.)

    Args:
        network: `apply(params, x [B, ...]) -> logits [B, C]`.
        example: a batch, of which only shapes and dtypes matter.
        capacity: static, rows kept.
        replayed: static, rows drawn at each step.
        replay_weight: how much one of them counts beside a row of the batch; may be traced.
        loss: `(logits, y) -> [B]`.
        trainable: as in `gradient_algorithm`.

    Batches are LabelledBatch, (x, y), or a mapping with those names; the state is a ReplayState. Metrics: `loss`,
    and `accuracy` on the batch alone.
    """
    kept = _inputs(example)

    def objective(params: Params, rows: WeightedRows, key: Key) -> tuple[Array, Metrics]:
        logits = network.apply(params, rows.x)
        right = margins(logits, rows.y) > 0
        current = jnp.arange(right.size) < right.size - replayed
        total = jnp.sum(rows.weight * loss(logits, rows.y)) / rows.weight.sum()
        return total, {"accuracy": jnp.mean(right, where=current, dtype=jnp.float32)}

    inner = gradient_algorithm(network, objective, optimizer, trainable=trainable)

    def init(key: Key) -> ReplayState:
        state = inner.init(key)
        reservoir = empty_reservoir(kept, capacity=capacity)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return ReplayState(**fields, reservoir=reservoir)

    def step(state: ReplayState, batch: AnyBatch) -> tuple[ReplayState, Metrics]:
        batch = _inputs(batch)
        key, draw_key, add_key = jax.random.split(state.key, 3)
        (old_x, old_y), valid = draw_from_reservoir(draw_key, state.reservoir, count=replayed)
        weight = jnp.concatenate([jnp.ones(len(batch[1])), replay_weight * valid])
        x = jax.tree.map(lambda new, old: jnp.concatenate([new, old]), batch[0], old_x)
        rows = WeightedRows(x, jnp.concatenate([batch[1], old_y]), weight)
        state, metrics = inner.step(state.replace(key=key), rows)
        return state.replace(reservoir=add_to_reservoir(add_key, state.reservoir, batch)), metrics

    return Algorithm(jax.jit(init), step)


def _inputs(batch: AnyBatch) -> tuple[Any, Array]:
    labelled = as_labelled(batch)
    return jax.tree.map(jnp.asarray, (labelled.x, labelled.y))
