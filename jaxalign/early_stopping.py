"""Stopping when a validation loss no longer falls, with the best parameters kept: in arrays, so lane by lane."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.algorithm import Algorithm, TrainState, merge
from jaxalign.types import Array, Key, Metrics, Params

SHARED = tuple(field.name for field in dataclasses.fields(TrainState))


@flax.struct.dataclass
class EarlyStoppingState(TrainState):
    """The inner algorithm's TrainState, and what has been seen of its validation loss; scalars [] unless said.

    inner: what the inner state holds beside the fields of a TrainState
    best_params: `params` as they were at the lowest validation loss
    best_loss, last_loss: the lowest validation loss, and that of the last check
    best_step, taken: int32, steps taken when it was lowest, and until now
    bad_checks: int32, checks since then
    stopped: bool, whether steps have ceased to change anything
    """

    inner: Any = None
    best_params: Params = None
    best_loss: Array | None = None
    last_loss: Array | None = None
    best_step: Array | None = None
    taken: Array | None = None
    bad_checks: Array | None = None
    stopped: Array | None = None

    @property
    def best_all_params(self) -> Params:
        """`best_params` with the frozen leaves put back: what `network.apply` takes."""
        return merge(self.best_params, self.frozen)


def with_early_stopping(
    algorithm: Algorithm, validate: Callable[[Any], Array], *, every: int, patience: int
) -> Algorithm:
    """The same Algorithm, which stops after `patience` checks in a row without a lower validation loss.

    Args:
        algorithm: its state is a TrainState or a subclass.
        validate: inner state -> scalar loss []; checked at `init` (the untrained parameters may be the best), and then
            after every `every` steps. A NaN is never an improvement.
        every: steps between checks, static.
        patience: checks without improvement before it stops, static.

    After it has stopped a step returns the state it was given, and the metrics that the step would have had, so each
    lane of a sweep stops by itself; `stop_when_all_stopped` (of `runtime`) ends a `fit` once all have. Between checks
    `validate` costs nothing, save where lanes run side by side (vmap): there it runs at every step.

    Metrics: the inner ones, "validation/loss" (of the last check), "validation/best" and "validation/stopped" (0 or 1).
    Raises ValueError if `every` or `patience` < 1, if the inner state is no TrainState, or (traced) if `validate`
    returns anything but a scalar.
    """
    for name, value in (("every", every), ("patience", patience)):
        if value < 1:
            raise ValueError(f"with_early_stopping: {name} must be at least 1, got {value}")

    def loss_of(inner: Any) -> Array:
        loss = jnp.asarray(validate(inner))
        if loss.shape:
            raise ValueError(f"with_early_stopping: `validate` must return a scalar, got {loss.shape}")
        return loss.astype(jnp.promote_types(loss.dtype, jnp.float32))

    def init(key: Key) -> EarlyStoppingState:
        inner = algorithm.init(key)
        if not isinstance(inner, TrainState):
            raise ValueError(f"with_early_stopping: the state must be a TrainState, got {type(inner).__name__}")
        loss, zero = loss_of(inner), jnp.zeros((), jnp.int32)
        return EarlyStoppingState(
            **{name: getattr(inner, name) for name in SHARED},
            inner=inner.replace(**dict.fromkeys(SHARED)),
            best_params=jax.tree.map(jnp.copy, inner.params),
            best_loss=loss,
            last_loss=jnp.copy(loss),
            best_step=zero,
            taken=jnp.copy(zero),
            bad_checks=jnp.copy(zero),
            stopped=jnp.zeros((), bool),
        )

    def step(state: EarlyStoppingState, batch: Any) -> tuple[EarlyStoppingState, Metrics]:
        inner = state.inner.replace(**{name: getattr(state, name) for name in SHARED})
        inner, metrics = algorithm.step(inner, batch)
        taken = state.taken + 1
        due = taken % every == 0
        loss = jax.lax.cond(due, loss_of, lambda _: state.last_loss, inner)
        better = due & (loss < state.best_loss)
        bad_checks = jnp.where(better, 0, state.bad_checks + due)
        new = EarlyStoppingState(
            **{name: getattr(inner, name) for name in SHARED},
            inner=inner.replace(**dict.fromkeys(SHARED)),
            best_params=jax.tree.map(lambda x, y: jnp.where(better, x, y), inner.params, state.best_params),
            best_loss=jnp.where(better, loss, state.best_loss),
            last_loss=loss,
            best_step=jnp.where(better, taken, state.best_step),
            taken=taken,
            bad_checks=bad_checks,
            stopped=state.stopped | (bad_checks >= patience),
        )
        # Frozen leaves are the same in both, and far too large to copy.
        kept = jax.tree.map(
            lambda x, y: jnp.where(state.stopped, x, y), state.replace(frozen=None), new.replace(frozen=None)
        )
        new = kept.replace(frozen=state.frozen)
        shown = {
            "validation/loss": new.last_loss,
            "validation/best": new.best_loss,
            "validation/stopped": new.stopped.astype(jnp.float32),
        }
        return new, {**metrics, **shown}

    return Algorithm(init, step)
