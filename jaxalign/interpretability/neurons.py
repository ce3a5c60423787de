"""Neurons inside a network: which ones matter, what each listens to, and what it writes.

A neuron is a place on the last axis of a site whose values are [B, ..., N]: a unit of an MLP's "post_0", a channel of a
convolution's "conv_post_0" (all its places), a unit of a transformer's "mlp_post[3]" (all positions; name one layer).
`fn` maps x [B, ...] to [B], the output to explain; `apply` maps x to all outputs [B, O].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.interpretability.activations import capture_function, patch_function, site_gradients
from jaxalign.interpretability.attribution import (
    Explained,
    baseline_like,
    checked_output,
    integrated_gradients,
    unit_quadrature,
    weighted_sum,
)
from jaxalign.types import Array, ArrayLike

Apply = Callable[[Any], Array]  # x [B, ...] -> outputs [B, O]


class NeuronRanking(NamedTuple):
    """The N neurons of a site, the most important first.

    order: [N] int32
    score: [N] mean over examples of |attribution|, in units of fn, in the neurons' own order
    effect: [N] mean over examples of the attribution with its sign
    """

    order: Array
    score: Array
    effect: Array


class Connections(NamedTuple):
    """What drives one neuron and what it drives, for each of B examples.

    activation: [B] summed over the neuron's places
    inputs: like x; each input's share of activation - activation at the baseline
    upstream: by site [B, M], each earlier neuron's share of the same
    outputs: [B, O] activation times the slope of each output with respect to it
    """

    activation: Array
    inputs: Any
    upstream: dict[str, Array]
    outputs: Array


class NeuronProfile(NamedTuple):
    """What one neuron responds to and what it writes, over B examples.

    activation: [B] its largest over places
    top_examples: [K] int32, the examples that activate it most, and their top_activations [K]
    firing_rate: scalar, the share of examples with activation > 0
    class_means: [C] mean activation by class, NaN for a class without examples
    selectivity: scalar (best - rest) / (|best| + |rest|): the largest class mean against the mean of the other class
        means, 1 where it fires for one class alone (Morcos et al. 2018, arXiv:1803.06959, equation 1); NaN if no mean
        differs from 0
    outputs: [O] mean over the examples where it fires of its contribution to each output, less its mean over outputs;
        NaN if it fires for none
    """

    activation: Array
    top_examples: Array
    top_activations: Array
    firing_rate: Array
    class_means: Array
    selectivity: Array
    outputs: Array


def mean_ablation_attributions(fn: Explained, x: Any, sites: Sequence[str]) -> dict[str, Array]:
    """`(a - mean a) * d fn / d a` of every neuron [B, N] by site, summed over its places, the mean over all of x.

    To first order what fn(x) loses when the neuron is set to its mean (attribution patching, Nanda 2023).
    """
    activations, gradients = _activations_and_gradients(fn, x, sites)

    def attribution(site: str) -> Array:
        value = activations[site]
        off_mean = value - jnp.mean(value, axis=tuple(range(value.ndim - 1)), keepdims=True)
        return _over_places(off_mean * gradients[site], x, site)

    return {site: attribution(site) for site in sites}


def gradient_times_activation(fn: Explained, x: Any, sites: Sequence[str]) -> dict[str, Array]:
    """`a * d fn / d a` of every neuron [B, N] by site, over its places: what it adds to fn(x), to first order."""
    activations, gradients = _activations_and_gradients(fn, x, sites)
    return {site: _over_places(activations[site] * gradients[site], x, site) for site in sites}


def neuron_conductance(
    fn: Explained, x: Any, baseline: Any, sites: Sequence[str], *, steps: int = 16, chunk: int = 4
) -> dict[str, Array]:
    """Conductance [B, N] of every neuron by site, summed over its places (Dhamdhere et al. 2018, arXiv:1805.12233).

    `integral over a in [0, 1] of d fn / d y * d y / d a`, y the neuron's activation at baseline + a (x - baseline), by
    Gauss-Legendre: the part of fn(x) - fn(baseline) that flows through it. Where all of fn passes through one site, its
    conductances sum to fn(x) - fn(baseline).

    Args:
        x, baseline, steps, chunk: as in `integrated_gradients`, for a batch.
    """
    baseline = baseline_like(baseline, x)
    gradients = site_gradients(lambda x: jnp.sum(checked_output(fn(x), x)), sites)
    read = capture_function(fn, sites)

    def term(a: Array) -> dict[str, Array]:
        def along(a: Array) -> Any:
            return jax.tree.map(lambda b, x: b + a.astype(b.dtype) * (x - b), baseline, x)

        _, change = jax.jvp(lambda a: read(along(a))[1], (a,), (jnp.ones_like(a),))
        _, _, slope = gradients(along(a))
        return {site: _over_places(slope[site] * change[site], x, site) for site in sites}

    points, weights = unit_quadrature(steps)
    return weighted_sum(term, weights, points, chunk=chunk)


def important_neurons(
    fn: Explained, x: Any, sites: Sequence[str], *, baseline: Any = None, steps: int = 16
) -> dict[str, NeuronRanking]:
    """The neurons of each site ranked by mean |attribution| over the examples of x [B, ...].

    With a baseline (as in `integrated_gradients`) the attribution is `neuron_conductance`, without one
    `mean_ablation_attributions`. `neuron_ablation` checks it.
    """
    if baseline is None:
        attributions = mean_ablation_attributions(fn, x, sites)
    else:
        attributions = neuron_conductance(fn, x, baseline, sites, steps=steps)

    def ranking(values: Array) -> NeuronRanking:
        score = jnp.mean(jnp.abs(values), axis=0)
        return NeuronRanking(jnp.argsort(-score).astype(jnp.int32), score, jnp.mean(values, axis=0))

    return {site: ranking(values) for site, values in attributions.items()}


def trace_connections(
    apply: Apply,
    x: Any,
    site: str,
    neuron: ArrayLike,
    *,
    baseline: Any = 0.0,
    upstream: Sequence[str] = (),
    steps: int = 16,
) -> Connections:
    """What one neuron gets from each input and each neuron of earlier sites, and what it gives each output.

    Inputs by integrated gradients of the neuron's activation, earlier neurons by conductance, both from `baseline`;
    outputs by `a * d output / d a` (weight times activation where the neuron feeds the outputs alone).

    Args:
        x: [B, ...]; neuron: its place in 0..N-1, may be traced.
        baseline, steps: as in `integrated_gradients`.
    """

    def activation(x: Any) -> Array:
        value = capture_function(apply, [site])(x)[1][site]
        return _over_places(value, x, site)[:, neuron]

    inputs = integrated_gradients(activation, x, baseline, steps=steps)
    earlier = neuron_conductance(activation, x, baseline, upstream, steps=steps) if upstream else {}
    return Connections(activation(x), inputs, earlier, _output_contributions(apply, x, site, neuron))


def describe_neuron(
    apply: Apply, x: Any, labels: Array, site: str, neuron: ArrayLike, *, num_classes: int, top: int = 8
) -> NeuronProfile:
    """What one neuron responds to among the examples x [B, ...] with labels [B], and what it writes to the outputs.

    Args:
        neuron: its place in 0..N-1, may be traced, so that `vmap` profiles many.
        num_classes: C. top: K.
    """
    value = capture_function(apply, [site])(x)[1][site]
    _over_places(value, x, site)
    activation = jnp.max(value.reshape(value.shape[0], -1, value.shape[-1]), axis=1)[:, neuron]
    members = jax.nn.one_hot(labels, num_classes, dtype=activation.dtype)
    class_means = members.T @ activation / jnp.sum(members, axis=0)
    best = jnp.nanmax(class_means)
    rest = (jnp.nansum(class_means) - best) / (jnp.sum(~jnp.isnan(class_means)) - 1)
    top_activations, top_examples = jax.lax.top_k(activation, top)
    fires = (activation > 0).astype(activation.dtype)
    outputs = fires @ _output_contributions(apply, x, site, neuron) / jnp.sum(fires)
    return NeuronProfile(
        activation, top_examples, top_activations, jnp.mean(fires), class_means,
        (best - rest) / (jnp.abs(best) + jnp.abs(rest)), outputs - jnp.mean(outputs),
    )  # fmt: skip


def neuron_sentence(profile: NeuronProfile, *, name: str = "the neuron", classes: Sequence[str] = ()) -> str:
    """A profile of one neuron in words; `classes` [C] name the classes and the outputs, else "class 0", ... do."""
    means, outputs = profile.class_means, profile.outputs

    def called(place: int) -> str:
        return classes[place] if classes else f"class {place}"

    if profile.firing_rate == 0:
        return f"{name} fires for none of {len(profile.activation)} examples."
    best = int(jnp.nanargmax(means))
    raised, lowered = int(jnp.argmax(outputs)), int(jnp.argmin(outputs))
    return (
        f"{name} fires for {float(profile.firing_rate):.0%} of examples, most for {called(best)} "
        f"(mean {float(means[best]):.3g}, selectivity {float(profile.selectivity):.2f}); "
        f"it speaks for {called(raised)} ({float(outputs[raised]):+.3g}) "
        f"and against {called(lowered)} ({float(outputs[lowered]):+.3g})."
    )


def _activations_and_gradients(fn: Explained, x: Any, sites: Sequence[str]) -> tuple[Any, Any]:
    return site_gradients(lambda x: jnp.sum(checked_output(fn(x), x)), sites)(x)[1:]


def _output_contributions(apply: Apply, x: Any, site: str, neuron: ArrayLike) -> Array:
    """[B, O]: by how much each output changes per relative change of the neuron, in one forward-mode pass."""

    def scaled(change: Array) -> Array:
        def edit(value: Array) -> Array:
            scale = 1 + change * (jnp.arange(value.shape[-1]) == neuron)
            return value * jnp.broadcast_to(scale.astype(value.dtype), value.shape)

        return patch_function(apply, {site: edit})(x)

    return jax.jvp(scaled, (jnp.zeros(()),), (jnp.ones(()),))[1]


def _over_places(value: Array, x: Any, site: str) -> Array:
    """[B, ..., N] -> [B, N], summed; raises ValueError if the site has another leading axis than x."""
    batch = jax.tree.leaves(x)[0].shape[0]
    if value.ndim < 2 or value.shape[0] != batch:
        raise ValueError(f"{site} is {value.shape}; needs [{batch}, ..., N]: of scanned layers name one, {site}[0]")
    return jnp.sum(value.reshape(batch, -1, value.shape[-1]), axis=1)
