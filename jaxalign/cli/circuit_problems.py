"""The tasks that `jaxalign circuits` knows: logic, learned by an MLP, and the indirect object, by a transformer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxalign import Network, gradient_algorithm, train
from jaxalign.cli.circuits import Circuits
from jaxalign.interpretability.circuit_graph import CircuitGraph, Metric
from jaxalign.interpretability.indirect_object import indirect_object_prompts, logit_difference
from jaxalign.interpretability.mlp_graph import mlp_graph
from jaxalign.interpretability.patching import last_position
from jaxalign.interpretability.transformer_graph import transformer_graph
from jaxalign.networks.mlp import MLP
from jaxalign.types import Array, Key, Metrics, Params

INPUTS, WIDTHS, STEPS, BATCH = 8, (16, 16, 2), 3000, 128
SPARSITY = 1e-3  # of the weights' absolute values: unused inputs lose their weights


class Problem(NamedTuple):
    """A network and N examples of a task.

    network: apply(params, clean) is what graph.run gives with all edges
    clean, corrupted, target: leaves [N, ...]
    slots: what stands at each position, of a language model; () otherwise
    truth: names of the inputs that the task depends on, where that is known
    about: sentences for the report
    """

    graph: CircuitGraph
    metric: Metric
    network: Network
    params: Params
    clean: Array
    corrupted: Array
    target: Any
    slots: tuple[str, ...]
    truth: tuple[str, ...]
    about: tuple[str, ...]

    def rows(self, index: np.ndarray) -> tuple[Any, Any, Any]:
        """(clean, corrupted, target) of some examples."""
        return jax.tree.map(lambda x: x[index], (self.clean, self.corrupted, self.target))


def problem_of(options: Circuits, console: Console) -> Problem:
    """The network, loaded or trained, and its examples. Raises ValueError where model and task do not fit."""
    mlp = options.model == "mlp"
    if options.task is not None and (options.task == "boolean") != mlp:
        raise ValueError(f"--task {options.task} does not fit --model {options.model}: mlp does boolean, others ioi")
    return boolean_problem(options.seed, options.prompts, console) if mlp else indirect_object_problem(options, console)


def indirect_object_problem(options: Circuits, console: Console) -> Problem:
    """A language model and prompts that name who receives."""
    from jaxalign.interop import load_pretrained

    with console.status(f"Loading {options.model}"):
        model = load_pretrained(options.model)
    if model.tokenizer is None:
        raise ValueError(f"--model {options.model} has no tokenizer")
    prompts = indirect_object_prompts(
        jax.random.key(options.seed), options.prompts, model.tokenizer.encode, template=options.template
    )
    about = (
        f'{options.model} on {options.prompts} prompts such as "{prompts.texts[0]} ...". The metric is the logit '
        "difference, in nats: how much likelier the one who receives is than the one who gives. In a corrupted prompt "
        "three other names stand at the same places.",
    )
    return Problem(
        transformer_graph(model.config, position=-1), logit_difference, last_position(model.network), model.params,
        prompts.clean, prompts.corrupted, prompts.target, prompts.slots, (), about,
    )  # fmt: skip


def boolean_problem(seed: int, count: int, console: Console) -> Problem:
    """An MLP trained on two outputs, of which the first is asked about: x0 xor x1, beside x2 and x3."""
    init_key, key = jax.random.split(jax.random.key(seed))
    network = Network.from_linen(MLP(WIDTHS), jnp.zeros((1, INPUTS)))
    with console.status("Training a small network"):
        params, accuracy = _trained(network, init_key)
    clean, corrupted, answer = _pairs(key, count)
    about = (
        f"A network with {INPUTS} inputs of -1 or 1 and hidden layers of {WIDTHS[0]} and {WIDTHS[1]} neurons, trained "
        f"for {STEPS:,} steps: its first output says whether inputs 0 and 1 differ, the second whether 2 and 3 are "
        f"both 1 (right for {float(accuracy):.1%} of all inputs). The metric is the first output's logit, turned so "
        "that larger is better. A corrupted input is another one with the opposite answer.",
    )
    return Problem(
        mlp_graph(INPUTS, WIDTHS), signed_logit, network, params, clean, corrupted, 2 * answer - 1, (),
        ("input 0", "input 1"), about,
    )  # fmt: skip


def signed_logit(output: Array, target: Array) -> Array:
    """The first output, signed so that above 0 is right."""
    return output[:, 0] * target


def _answers(x: Array) -> Array:
    """[..., 2] of 0 or 1: x0 xor x1, x2 and x3."""
    return jnp.stack([x[..., 0] != x[..., 1], (x[..., 2] > 0) & (x[..., 3] > 0)], axis=-1).astype(float)


@functools.partial(jax.jit, static_argnums=0)
def _trained(network: Network, key: Key) -> tuple[Params, Array]:
    def objective(params: Params, x: Array, key: Key) -> tuple[Array, Metrics]:
        loss = optax.sigmoid_binary_cross_entropy(network.apply(params, x), _answers(x)).mean()
        return loss + SPARSITY * sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)), {}

    run_key, data_key = jax.random.split(key)
    batches = jax.random.rademacher(data_key, (STEPS, BATCH, INPUTS), float)
    state, _ = train(gradient_algorithm(network, objective, optax.adam(5e-3)), run_key, batches)
    every = 2.0 * ((jnp.arange(2**INPUTS)[:, None] >> jnp.arange(INPUTS)[None, :]) & 1) - 1
    right = (network.apply(state.params, every) > 0) == (_answers(every) > 0)
    return state.params, right.all(axis=1).mean()


def _pairs(key: Key, count: int) -> tuple[Array, Array, Array]:
    """(clean, corrupted) [N, I] with opposite first answers, and that of the clean ones [N]."""
    clean_key, other_key, side_key = jax.random.split(key, 3)
    clean = jax.random.rademacher(clean_key, (count, INPUTS), float)
    other = jax.random.rademacher(other_key, (count, INPUTS), float)
    answer = _answers(clean)[:, 0]
    flip = jnp.where(jax.random.bernoulli(side_key, 0.5, (count, 1)), jnp.array([[-1.0, 1]]), jnp.array([[1.0, -1]]))
    flip = jnp.where((_answers(other)[:, 0] == answer)[:, None], flip, 1.0)
    return clean, other.at[:, :2].multiply(flip), answer
