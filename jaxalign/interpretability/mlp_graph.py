"""A multilayer perceptron as a circuit graph: inputs and neurons as nodes, its weights as edges."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interpretability.circuit_graph import CircuitGraph
from jaxalign.types import Array, Params


def mlp_graph(
    inputs: int, layer_sizes: Sequence[int], *, activation: Callable[[Array], Array] = jax.nn.relu
) -> CircuitGraph:
    """The graph of `MLP(layer_sizes, activation)` on x[B, inputs], run with its parameters.

    A source is an input or a hidden neuron and writes its activation a_u; a reader is a hidden neuron or an output and
    reads `bias_v + sum over u of W_uv * (keep[u, v] * own a_u + (1 - keep[u, v]) * other a_u)`. Biases are part of
    the reader. Names: "input 2", "neuron 0.5" (layer 0), "output 1"; messages are [B, U], the output [B, O].

    Raises ValueError, at the run, if parameters or inputs have other sizes.
    """
    sizes = (inputs, *layer_sizes)
    if min(sizes) < 1 or len(sizes) < 2:
        raise ValueError(f"mlp_graph: needs inputs and layer sizes of at least 1, got {sizes}")
    hidden = tuple(f"neuron {i}.{j}" for i, size in enumerate(layer_sizes[:-1]) for j in range(size))
    sources = tuple(f"input {i}" for i in range(inputs)) + hidden
    readers = hidden + tuple(f"output {i}" for i in range(layer_sizes[-1]))
    writes = np.cumsum((0, *sizes))  # layer i's sources are writes[i] .. writes[i+1], its readers the same less inputs
    allowed = np.zeros((len(sources), len(readers)), bool)
    blocks = []
    for i in range(len(layer_sizes)):
        rows, columns = slice(writes[i], writes[i + 1]), slice(writes[i + 1] - inputs, writes[i + 2] - inputs)
        allowed[rows, columns] = True
        blocks.append((rows, columns))
    feeds = np.eye(len(readers), len(sources), k=inputs, dtype=bool)

    def forward(params: Params, x: Array, keep: Array | None, other: Array | None) -> tuple[Array, Array]:
        if x.shape[-1:] != (inputs,) or x.ndim != 2:
            raise ValueError(f"mlp_graph: needs inputs [B, {inputs}], got {x.shape}")
        written = []
        for i, (rows, columns) in enumerate(blocks):
            layer = params[f"Dense_{i}"]
            if layer["kernel"].shape != sizes[i : i + 2] or "lora_a" in layer:
                raise ValueError(f"mlp_graph: Dense_{i}/kernel must be {sizes[i : i + 2]} and have no adapters")
            kernel, bias = layer["kernel"].astype(x.dtype), layer["bias"].astype(x.dtype)[None, :]
            written.append(x)
            if other is None or keep is None:
                x = x @ kernel + bias
            else:
                changed = other[:, rows].astype(x.dtype)
                x = (x - changed) @ (kernel * keep[rows, columns].astype(x.dtype)) + changed @ kernel + bias
            x = activation(x) if i + 1 < len(blocks) else x
        return jnp.concatenate(written, axis=1), x

    return CircuitGraph(
        sources, readers, allowed, feeds,
        embed=lambda params, x: x,
        messages=lambda params, x: forward(params, x, None, None)[0],
        run=lambda params, x, keep, other: forward(params, x, keep, other)[1],
    )  # fmt: skip
