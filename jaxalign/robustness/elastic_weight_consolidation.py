"""Learning a new task without moving what the old ones rest on: elastic weight consolidation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, TrainState, gradient_algorithm, merge, split_batch
from jaxalign.robustness.adversarial_training import accuracy
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.labelled_batch import AnyBatch, as_labelled
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


@flax.struct.dataclass
class ConsolidatedState(TrainState):
    """A TrainState that remembers where the parameters stood after the last task, and which of them mattered.

    anchor: the trained parameters at the last `consolidate`, like `params`
    fisher: how much each mattered, like `params`; zero before the first `consolidate`
    """

    anchor: Params = None
    fisher: Params = None


def diagonal_fisher(
    apply: Callable[[Params, Any], Array], params: Params, x: Any, *, microbatches: int = 1
) -> Params:
    """Diagonal of the Fisher information of a classifier, exact over its own predictions.

    F[i] = mean_x sum_c p(c | x) (d log p(c | x) / d params[i])^2

    with p = softmax(apply(params, x)) (Kirkpatrick et al. 2017, arXiv:1612.00796). The labels of the data do not enter:
    with them it would be no Fisher information (Kunstner et al. 2019, arXiv:1905.12558). It costs C backward passes
    per row.

    Args:
        apply: `(params, x [B, ...]) -> logits [B, C]`.
        x: inputs, leaves [N, ...].
        microbatches: M > 1 takes N / M rows at a time; the gradients of N / M rows and C classes are alive together.

    Returns a pytree like `params`, not negative. Raises ValueError if N is not a multiple of M.
    """
    rows = jax.tree.leaves(x)[0].shape[0]

    def information(row: Any) -> Params:
        def log_probs(params: Params) -> Array:
            return jax.nn.log_softmax(apply(params, jax.tree.map(lambda leaf: leaf[None], row))[0])

        log_p, pull_back = jax.vjp(log_probs, params)
        (gradients,) = jax.vmap(pull_back)(jnp.eye(log_p.size, dtype=log_p.dtype))
        return jax.tree.map(lambda g: jnp.tensordot(jnp.exp(log_p).astype(g.dtype), jnp.square(g), 1), gradients)

    def add(total: Params, part: Any) -> tuple[Params, None]:
        return jax.tree.map(lambda t, f: t + f.sum(axis=0) / rows, total, jax.vmap(information)(part)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), split_batch(x, microbatches))[0]


def elastic_weight_consolidation(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    strength: ArrayLike,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
) -> Algorithm:
    """Train a classifier on one task, held by a spring to the parameters that earlier tasks rest on.

    objective = mean_i loss(apply(params, x_i), y_i) + strength / 2 sum_j fisher[j] (params[j] - anchor[j])^2
    (Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3.) Between tasks call `consolidate`; before the first the
    penalty is zero, so with `strength` 0 this is plain fine-tuning.

    Args:
        network: `apply(params, x [B, ...]) -> logits [B, C]`.
        strength: lambda >= 0, may be traced. Both terms are per row, so N_old / N_new would be Laplace's approximation
            of the posterior after N_old rows; in practice it takes much more.
        loss: `(logits, y) -> [B]`.
        trainable, microbatches: as in `gradient_algorithm`.

    Batches are LabelledBatch, (x, y), or a mapping with those names; the state is a ConsolidatedState. Metrics:
    `loss`, `accuracy` on the batch, and `penalty`, the second term.
    """

    def objective(anchor: Params, fisher: Params) -> Objective:
        def at(params: Params, batch: Any, key: Key) -> tuple[Array, Metrics]:
            logits = network.apply(params, batch.x)
            trained = jax.tree.map(lambda a, p: None if a is None else p, anchor, params, is_leaf=lambda a: a is None)
            pulls = jax.tree.map(lambda p, a, f: jnp.sum(f * jnp.square(p - a)), trained, anchor, fisher)
            penalty = strength / 2 * jax.tree.reduce(jnp.add, pulls)
            metrics = {"accuracy": accuracy(logits, batch.y), "penalty": penalty}
            return loss(logits, batch.y).mean() + penalty, metrics

        return at

    def at(anchor: Params, fisher: Params) -> Algorithm:
        # Built where the step is traced, so that the objective sees this step's anchor whatever the microbatches.
        return gradient_algorithm(
            network, objective(anchor, fisher), optimizer, trainable=trainable, microbatches=microbatches
        )

    def init(key: Key) -> ConsolidatedState:
        state = at(None, None).init(key)
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        return ConsolidatedState(**fields, anchor=state.params, fisher=jax.tree.map(jnp.zeros_like, state.params))

    def step(state: ConsolidatedState, batch: AnyBatch) -> tuple[ConsolidatedState, Metrics]:
        return at(state.anchor, state.fisher).step(state, as_labelled(batch))

    return Algorithm(jax.jit(init), step)


def consolidate(
    network: Network, state: ConsolidatedState, x: Any, *, decay: ArrayLike = 1.0, microbatches: int = 1
) -> ConsolidatedState:
    """Take a task as learned: anchor = params, fisher = decay * fisher + diagonal_fisher(params, x).

    One anchor for all tasks, with the Fisher informations of all of them (online EWC: Schwarz et al. 2018,
    arXiv:1805.06370, section 4); `decay` below 1 lets the oldest tasks fade.

    Args:
        x: inputs of the task that ends, leaves [N, ...].
        decay: gamma in [0, 1], may be traced.
        microbatches: as in `diagonal_fisher`.
    """

    def apply(params: Params, x: Any) -> Array:
        return network.apply(merge(params, state.frozen), x)

    new = diagonal_fisher(apply, state.params, x, microbatches=microbatches)
    fisher = jax.tree.map(lambda old, f: (decay * old + f).astype(old.dtype), state.fisher, new)
    return state.replace(anchor=state.params, fisher=fisher)
