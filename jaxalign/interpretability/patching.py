"""Activation, attribution and path patching: what one run's activations do in another run.

Both directions are one function. *Denoising* runs on corrupted inputs and puts clean activations in: what restores the
behaviour is sufficient for it. *Noising* runs on clean inputs and puts corrupted activations in: what breaks the
behaviour is necessary. A metric is `metric(output, target) -> [B]`, larger being better.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import LanguageModel, Network
from jaxalign.interpretability.activations import capture, patch, per_layer, site_gradients
from jaxalign.interpretability.circuit_graph import CircuitGraph, Metric, check_examples
from jaxalign.types import Array, Params


def activation_patching(
    network: Network,
    metric: Metric,
    params: Params,
    inputs: Any,
    source: Any,
    target: Any,
    site: str,
    *,
    axes: tuple[int, ...] = (1,),
    batch_size: int | None = None,
) -> Array:
    """How much each piece of a site's activation changes the metric, if it comes from another run.

    `effect[b, i] = metric(run on inputs, piece i from the run on source)_b - metric(run on inputs)_b`, one run for each
    piece, in one program. Noising: `inputs` clean, `source` corrupted. Denoising: the other way round.
    Vig et al. 2020 (arXiv 2004.12265); Meng et al. 2022 (arXiv 2202.05262), section 2.1.

    Args:
        inputs, source, target: of B examples; inputs and source of one shape.
        site: as `patch` takes it; a site of scanned layers is patched one layer at a time.
        axes: of one layer's activation [B, ...], which are taken apart: (1,) positions of "resid_post" [B, T, D] or
            neurons of an MLP's "post_0" [B, F]; (2,) heads of "attention_z" [B, T, H, E]; (1, 2) both; () nothing,
            so that whole layers are patched.
        batch_size: pieces computed side by side; None is one after another.

    Returns [B, L, ...axes], or [B, ...axes] for a site without layers. Raises ValueError for an unknown site, or
    if axes name the batch or are not there.
    """
    check_examples("activation_patching", inputs, source)
    there = capture(network, [site]).apply(params, source)[1][site]
    split = _split_axes("activation_patching", network, params, inputs, site, there, axes)
    shape = [there.shape[i] for i in split]

    def patched(index: Array) -> Array:
        mask = jnp.ones((1,) * there.ndim, bool)
        for axis, place in zip(split, jnp.unravel_index(index, shape), strict=True):
            size = there.shape[axis]
            mask = mask & (jnp.arange(size) == place).reshape([size if i == axis else 1 for i in range(there.ndim)])

        def put(x: Array, values: tuple[Array, Array]) -> Array:
            return jnp.where(*values, x)

        layered = 0 in split
        edit = per_layer(put, (mask, there)) if layered else lambda x: put(x, (mask, there))
        return metric(patch(network, {site: edit}).apply(params, inputs), target)

    values = jax.lax.map(patched, jnp.arange(math.prod(shape)), batch_size=batch_size)
    return (values - metric(network.apply(params, inputs), target)[None]).T.reshape(-1, *shape)


def attribution_patching(
    network: Network,
    metric: Metric,
    params: Params,
    inputs: Any,
    source: Any,
    target: Any,
    site: str,
    *,
    axes: tuple[int, ...] = (1,),
) -> Array:
    """The first-order estimate of `activation_patching`, from one backward pass for all pieces.

    `effect[b, i] = sum over piece i of (source activation - activation) * d metric_b / d activation`: exact where the
    metric is linear in the site. Nanda 2023, "Attribution Patching"; Syed, Rager and Conmy 2023 (arXiv 2310.10348).
    Arguments and result as there.
    """
    check_examples("attribution_patching", inputs, source)
    there = capture(network, [site]).apply(params, source)[1][site]
    split = _split_axes("attribution_patching", network, params, inputs, site, there, axes)
    gradients = site_gradients(lambda params, inputs: metric(network.apply(params, inputs), target).sum(), [site])
    _, here, slope = gradients(params, inputs)
    batch = 1 if 0 in split else 0
    terms = jnp.moveaxis((there - here[site]) * slope[site], batch, 0)
    kept = [0, *(axis if axis > batch else axis + 1 for axis in split)]
    return terms.sum(axis=[i for i in range(terms.ndim) if i not in kept])


def path_patching(
    graph: CircuitGraph,
    metric: Metric,
    params: Params,
    inputs: Any,
    source: Any,
    target: Any,
    readers: list[str],
    *,
    batch_size: int | None = None,
) -> Array:
    """The effect [B, U] of every source on the metric by its direct paths into chosen readers alone.

    `effect[b, u] = metric(readers see source u as it is in the run on source) - metric(run on inputs)`; what those
    readers feed is computed anew, everything else sees the source as it was. ["logits"] gives each node's direct
    effect on the output. Goldowsky-Dill et al. 2023 (arXiv 2304.05969); Wang et al. 2022 (arXiv 2211.00593), section 3.

    Args:
        readers: names of `graph.readers`.
        batch_size: sources computed side by side; None is one after another.

    Returns [B, U], 0 for sources that write after all of the readers. Raises ValueError naming an unknown reader.
    """
    check_examples("path_patching", inputs, source)
    if unknown := set(readers) - set(graph.readers):
        raise ValueError(f"path_patching: no reader {sorted(unknown)[0]!r}; they are like {graph.readers[-3:]}")
    cut = graph.allowed & np.isin(graph.readers, readers)[None, :]
    other = graph.messages(params, source)

    def value(row: Array) -> Array:
        return metric(graph.run(params, inputs, 1.0 - row, other), target)

    def patched(u: Array) -> Array:
        return value(jnp.zeros(cut.shape).at[u].set(jnp.asarray(cut, float)[u]))

    values = jax.lax.map(patched, jnp.arange(len(graph.sources)), batch_size=batch_size)
    return (values - value(jnp.zeros(cut.shape))[None]).T


def _split_axes(
    caller: str, network: Network, params: Params, inputs: Any, site: str, activation: Array, axes: tuple[int, ...]
) -> list[int]:
    """The axes of a captured activation that are taken apart: of its layers, if it has some, and `axes` of each."""
    ranks = []

    def look(x: Array) -> Array:
        ranks.append(x.ndim)
        return x

    jax.eval_shape(patch(network, {site: look}).apply, params, inputs)
    rank = ranks[0]
    if not all(0 < axis < rank for axis in axes) or len(set(axes)) < len(axes):
        raise ValueError(
            f"{caller}: axes {axes} of {site!r}: its {rank} axes begin with the batch, 0; name others once"
        )
    layered = activation.ndim - rank
    return [0] * layered + [layered + axis for axis in sorted(axes)]


def last_position(model: LanguageModel) -> Network:
    """A Network from tokens[B, T] to the logits [B, V] of the last position, the others not computed."""

    def apply(params: Params, tokens: Array) -> Array:
        hidden = model.hidden(params, tokens)[:, -1]
        return hidden @ model.unembedding(params).astype(hidden.dtype).T

    return Network(model.init, apply)
