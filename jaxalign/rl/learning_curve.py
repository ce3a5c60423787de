"""Learning measured as it goes: an Algorithm that stops now and then to evaluate itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Algorithm
from jaxalign.types import EPISODE, Array, Key, Metrics


def with_evaluation(algorithm: Algorithm, evaluation: Callable[[Any, Key], Metrics], *, every: int) -> Algorithm:
    """An Algorithm whose step is `every` steps of the inner one on the same batch, and then an evaluation.

    Args:
        algorithm: its state has a `key`, as a TrainState has.
        evaluation: (state, key) -> metrics of scalars []; the key is used nowhere else, and training goes on with
            another.
        every: steps between evaluations, static.

    Metrics: the inner steps' means, and the evaluation's. Of "episode/..." the mean is over the steps that have one
    (NaN if none has); any other NaN shows.
    Raises ValueError at trace time if both give a metric of the same name.
    """

    def step(state: Any, batch: Any) -> tuple[Any, Metrics]:
        state, history = jax.lax.scan(lambda s, _: algorithm.step(s, batch), state, None, length=every)
        key, evaluation_key = jax.random.split(state.key)
        state = state.replace(key=key)
        found = evaluation(state, evaluation_key)
        metrics = {name: _mean_of_measured(x) if name.startswith(EPISODE) else x.mean() for name, x in history.items()}
        if twice := metrics.keys() & found.keys():
            raise ValueError(f"with_evaluation: both training and evaluation give the metric {sorted(twice)[0]!r}")
        return state, {**metrics, **found}

    return Algorithm(algorithm.init, step)


def _mean_of_measured(values: Array) -> Array:
    """Mean of the values [T] that are not NaN."""
    measured = ~jnp.isnan(values)
    count = jnp.sum(measured, dtype=values.dtype)
    return jnp.where(count > 0, jnp.sum(jnp.where(measured, values, 0.0)) / jnp.maximum(count, 1.0), jnp.nan)
