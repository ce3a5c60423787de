"""Tasks one after another: training through them, and how much of the old ones is forgotten."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.algorithm import Algorithm
from jaxalign.types import Array, ArrayLike, Key, Metrics


class ContinualMetrics(NamedTuple):
    """Four scalars, shares of 1, as `continual_learning_metrics` defines them; NaN is "not measured"."""

    average_accuracy: Array
    forgetting: Array
    backward_transfer: Array
    forward_transfer: Array


def continual_learning_metrics(accuracies: ArrayLike, initial: ArrayLike | None = None) -> ContinualMetrics:
    """What is left of T tasks learned in order, from R[i, j] = accuracy on task j after learning task i.

    average_accuracy = mean_j R[T-1, j]
    forgetting = mean_{j < T-1} (max_{i < T-1} R[i, j] - R[T-1, j])
    backward_transfer = mean_{j < T-1} (R[T-1, j] - R[j, j]), negative where a task is forgotten
    forward_transfer = mean_{j > 0} (R[j-1, j] - initial[j])

    (Lopez-Paz & Ranzato 2017, arXiv:1706.08840, equations 2 to 4; forgetting: Chaudhry et al. 2018, arXiv:1801.10112.)

    Args:
        accuracies: R [T, T].
        initial: [T], accuracies before any training; None leaves forward_transfer NaN.

    With T = 1 only the average is measured. Raises ValueError if R is not square.
    """
    accuracies = jnp.asarray(accuracies)
    accuracies = accuracies.astype(jnp.promote_types(accuracies.dtype, jnp.float32))
    if accuracies.ndim != 2 or accuracies.shape[0] != accuracies.shape[1] or not accuracies.size:
        raise ValueError(f"continual_learning_metrics: accuracies must be [T, T], got {accuracies.shape}")
    last = accuracies[-1]
    unknown = jnp.full((), jnp.nan, last.dtype)
    if last.size == 1:
        return ContinualMetrics(last.mean(), unknown, unknown, unknown)
    forward = unknown
    if initial is not None:
        initial = jnp.asarray(initial)
        chex.assert_equal_shape([last, initial])
        forward = jnp.mean(jnp.diagonal(accuracies, offset=1) - initial[1:])
    return ContinualMetrics(
        average_accuracy=last.mean(),
        forgetting=jnp.mean(accuracies[:-1, :-1].max(axis=0) - last[:-1]),
        backward_transfer=jnp.mean(last[:-1] - jnp.diagonal(accuracies)[:-1]),
        forward_transfer=forward,
    )


class ContinualRun(NamedTuple):
    """state: after the last task; initial [T]: scores before any training; scores [T, T]: row i after task i, column j
    on task j; metrics: the algorithm's, leaves [T, steps]."""

    state: Any
    initial: Array
    scores: Array
    metrics: Metrics


def sequential_training(
    algorithm: Algorithm,
    key: Key,
    tasks: Any,
    tests: Any,
    *,
    score: Callable[[Any, Any], Array],
    between: Callable[[Any, Any], Any] | None = None,
) -> ContinualRun:
    """Train on T tasks in order and score every task after each: two nested scans, so one program for all tasks.

    Args:
        tasks: the batches, a pytree with leaves [T, steps, ...].
        tests: what each task is scored on, a pytree with leaves [T, ...].
        score: `(state, test) -> scalar`, say the accuracy on one task's test set.
        between: `(state, batches of the task that ends [steps, ...]) -> state`, after each task: where
            `elastic_weight_consolidation` consolidates. None does nothing.

    Not jitted: jit or sweep the outermost composition.
    Raises ValueError if `tasks` and `tests` differ in T.
    """
    counts = sorted({leaf.shape[0] for leaf in jax.tree.leaves((tasks, tests))})
    if len(counts) != 1:
        raise ValueError(f"sequential_training: tasks and tests need one leading axis T in common, got {counts}")

    def scores(state: Any) -> Array:
        return jax.lax.map(lambda test: score(state, test), tests)

    def learn(state: Any, batches: Any) -> tuple[Any, tuple[Array, Metrics]]:
        state, metrics = jax.lax.scan(algorithm.step, state, batches)
        if between is not None:
            state = between(state, batches)
        return state, (scores(state), metrics)

    start = algorithm.init(key)
    state, (after, metrics) = jax.lax.scan(learn, start, tasks)
    return ContinualRun(state, scores(start), after, metrics)
