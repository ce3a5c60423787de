"""Which weights do the work? A circuit found in a small network, and held against what is known of the task.

A network learns whether inputs 0 and 1 differ, among eight. Every edge is scored from one gradient (EAP) and from
several on the way between a clean and a corrupted input (EAP-IG), and cut by itself to see who is right. ACDC then
prunes all edges that can go. Run: python examples/circuits.py   (ten seconds)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import Network, gradient_algorithm, train
from jaxalign.interpretability.acdc import acdc
from jaxalign.interpretability.circuit_evaluation import circuit_faithfulness
from jaxalign.interpretability.circuit_graph import circuit_values, circuits_by_score, edge_names, kept_edges
from jaxalign.interpretability.edge_attribution import (
    edge_attribution_patching,
    exact_edge_patching,
    integrated_edge_attribution_patching,
)
from jaxalign.interpretability.mlp_graph import mlp_graph
from jaxalign.networks import MLP
from jaxalign.statistics import rank_correlation

INPUTS, WIDTHS, STEPS, EXAMPLES, SIZES = 8, (12, 12, 1), 2000, 64, (6, 12, 18, 24, 48)


def differ(x):
    return (x[..., 0] != x[..., 1]).astype(float)


def loss(params, x, key):
    wrong = optax.sigmoid_binary_cross_entropy(network.apply(params, x)[:, 0], differ(x)).mean()
    return wrong + 1e-3 * sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)), {}


@jax.jit
def trained(key):
    batches = jax.random.rademacher(key, (STEPS, 128, INPUTS), float)
    return train(gradient_algorithm(network, loss, optax.adam(5e-3)), key, batches)[0].params


def logit(output, sign):
    return output[:, 0] * sign


if __name__ == "__main__":
    network, graph = Network.from_linen(MLP(WIDTHS), jnp.zeros((1, INPUTS))), mlp_graph(INPUTS, WIDTHS)
    params = trained(jax.random.key(0))
    clean = jax.random.rademacher(jax.random.key(1), (EXAMPLES, INPUTS), float)
    corrupted = jax.random.rademacher(jax.random.key(2), (EXAMPLES, INPUTS), float)
    same = (differ(corrupted) == differ(clean))[:, None]
    corrupted = jnp.where(same & (jnp.arange(INPUTS) == 0)[None, :], -corrupted, corrupted)  # the other answer
    given = params, clean, corrupted, 2 * differ(clean) - 1

    edges = kept_edges(graph)
    exact = jax.jit(lambda *given: exact_edge_patching(graph, logit, *given, edges))(*given).mean(axis=0)
    for name, method in (("EAP", edge_attribution_patching), ("EAP-IG", integrated_edge_attribution_patching)):
        scores = jax.jit(lambda *given, method=method: method(graph, logit, *given))(*given).mean(axis=0)
        agreement = rank_correlation(exact, scores[edges[:, 0], edges[:, 1]])
        print(f"{name:6} against cutting all {len(edges)} edges one by one: rank correlation {float(agreement):.2f}")

    circuits = circuits_by_score(graph, scores, SIZES)
    ends = np.stack([graph.allowed, 0 * graph.allowed])
    values = jax.jit(lambda *given: circuit_values(graph, logit, *given, np.concatenate([circuits, ends])))(*given)
    found = circuit_faithfulness(jax.random.key(3), values[:, :-2], values[:, -2], values[:, -1])
    for size, value, low, high in zip(SIZES, *found, strict=True):
        print(f"the {size:2} strongest edges keep {value:.2f} [{low:.2f}, {high:.2f}] of what the network does")

    pruned = jax.jit(lambda *given: acdc(graph, logit, *given, threshold=0.05))(*given).keep
    print(f"ACDC leaves {int(pruned.sum())} edges; those from the inputs:")
    print("  " + ", ".join(name for name in edge_names(graph, kept_edges(graph, pruned)) if name.startswith("input")))
