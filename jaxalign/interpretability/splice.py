"""A sparse autoencoder or transcoder put into the model it reads, and what that costs the model."""

import dataclasses
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel, Network
from jaxalign.interpretability.activations import capture_function, patch, patch_function
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.networks.sites import site as named
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array, ArrayLike, Key, Params

FEATURES = "sae_features"


def _features(x: Array, params: Params, config: SAEConfig) -> Array:
    """Features [..., F] of x[...] whose last axes hold d_in numbers."""
    for start in range(x.ndim, 0, -1):
        if math.prod(x.shape[start - 1 :]) == config.d_in:
            return sae_encode(params, x.reshape(*x.shape[: start - 1], config.d_in), config)
    raise ValueError(f"splice_sae: the site's value {x.shape} does not end in axes of d_in = {config.d_in} numbers")


def _decoded(f: Array, like: Array, params: Params, config: SAEConfig) -> Array:
    return sae_decode(params, f, config).reshape(like.shape).astype(like.dtype)


def splice_sae(
    network: Network,
    site: str,
    params: Params,
    config: SAEConfig,
    *,
    keep_first: int = 0,
    error_term: bool = False,
) -> Network:
    """The network with x at a site replaced by sae_decode(sae_encode(x)).

    Its features are a site of their own, `sae_features` [B, T, F]: capture them, patch them (switch a feature off), or
    take gradients with respect to them.

    Args:
        network: any network with the site.
        site: one occurrence, such as "resid_post[15]"; its last axes together hold d_in numbers ([B, T, H, E] will do).
        params, config: a trained autoencoder's.
        keep_first: leave the first positions t < keep_first of x[B, T, ...] as they are. The first position of a text
            has a norm hundreds of times the others' in many models, and autoencoders are trained without it.
        error_term: add stop_gradient(x - x_hat), x_hat of the features before any patch of theirs: the output is the
            network's own, gradients pass through the features and not through the error, and a patched feature has
            its own effect alone (Marks et al. 2024, arXiv 2403.19647, section 2).
    """

    def replaced(x: Array) -> Array:
        f = _features(x, params, config)
        x_hat = _decoded(named(f, FEATURES), x, params, config)
        if error_term:
            x_hat = x_hat + jax.lax.stop_gradient(x - _decoded(f, x, params, config))
        return _keep_first(x, x_hat, keep_first)

    return patch(network, {site: replaced})


def _keep_first(x: Array, x_hat: Array, count: int) -> Array:
    return jnp.concatenate([x[:, :count], x_hat[:, count:]], axis=1) if count else x_hat


def splice_transcoder(
    network: Network, source: str, target: str, params: Params, config: SAEConfig, *, keep_first: int = 0
) -> Network:
    """The network with the value at `target` replaced by the transcoder's reading of the value at `source`.

    A transcoder of an MLP has source "mlp_input[15]" and target "mlp_out[15]". The features are the site
    `sae_features`. `source` must not depend on `target`. Arguments as in `splice_sae`; the network is run twice up to
    the source. Dunefsky et al. 2024, arXiv 2406.11944.
    """

    def spliced(fn: Any) -> Any:
        def apply(*args: Any) -> Any:
            x = capture_function(fn, (source,), keep_names=False)(*args)[1][source]

            def replaced(y: Array) -> Array:
                f = named(_features(x, params, config), FEATURES)
                return _keep_first(y, _decoded(f, y, params, config), keep_first)

            return patch_function(fn, {target: replaced})(*args)

        return apply

    if not isinstance(network, LanguageModel):
        return dataclasses.replace(network, apply=spliced(network.apply))
    ours = {name: spliced(getattr(network, name)) for name in ("apply", "hidden", "decode")}
    return dataclasses.replace(network, **ours)


class LossRecovered(NamedTuple):
    """What a language model loses by a change inside it, for each of B texts; nats per predicted token.

    clean, spliced, ablated: [B] cross-entropy of the model, with the change, and with the site at zero
    kl_spliced, kl_ablated: [B] KL(model || changed model)
    """

    clean: Array
    spliced: Array
    ablated: Array
    kl_spliced: Array
    kl_ablated: Array

    @property
    def recovered(self) -> Array:
        """(mean ablated - mean spliced) / (mean ablated - mean clean) over [B] texts: 1 loses nothing, 0 is no better
        than zeros."""
        return _recovered(jnp.stack([self.clean, self.spliced, self.ablated], axis=1))

    def interval(self, key: Key, *, confidence: ArrayLike = 0.95) -> tuple[Array, Array]:
        """Bootstrap interval of `recovered` over the [B] texts: (low, high)."""
        losses = jnp.stack([self.clean, self.spliced, self.ablated], axis=1)
        return bootstrap_interval(key, losses, statistic=_recovered, confidence=confidence)


def _recovered(losses: Array) -> Array:
    clean, spliced, ablated = losses.mean(axis=0)
    return (ablated - spliced) / (ablated - clean)


def loss_recovered(
    network: Network,
    model_params: Params,
    tokens: ArrayLike,
    site: str,
    sae_params: Params,
    config: SAEConfig,
    *,
    mask: ArrayLike | None = None,
    keep_first: int = 0,
) -> LossRecovered:
    """What a model loses when the autoencoder stands in for a site, against the site set to zero.

    Args:
        network: apply(model_params, tokens[B, T]) -> logits [B, T, V]; one text at a time, so [1, T, V] is alive.
        tokens: [B, T].
        site, sae_params, config, keep_first: as in `splice_sae`; zeroing keeps the first positions too.
        mask: [B, T], which tokens are predicted and counted; None: all but the first.

    Raises ValueError if tokens and mask differ in shape, or if T < 2.
    """
    tokens = jnp.asarray(tokens)
    chex.assert_rank(tokens, 2)
    if tokens.shape[1] < 2:
        raise ValueError(f"loss_recovered: tokens need at least 2 positions, got shape {tokens.shape}")
    counted = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if counted.shape != tokens.shape:
        raise ValueError(f"loss_recovered: mask is {counted.shape}, tokens are {tokens.shape}")
    spliced = splice_sae(network, site, sae_params, config, keep_first=keep_first)
    ablated = patch(network, {site: lambda x: _keep_first(x, jnp.zeros_like(x), keep_first)})

    def one(text: tuple[Array, Array]) -> LossRecovered:
        row, wanted = text[0][None], text[1][None, 1:]

        def mean(per_token: Array) -> Array:
            return jnp.sum(per_token * wanted) / jnp.sum(wanted)

        def entropy_and_log_probs(model: Network) -> tuple[Array, Array]:
            logps = jax.nn.log_softmax(model.apply(model_params, row)[:, :-1])
            return -mean(jnp.take_along_axis(logps, row[:, 1:, None], axis=-1)[..., 0]), logps

        def divergence(other: Array) -> Array:
            return mean(jnp.sum(jnp.exp(own) * (own - other), axis=-1))

        clean, own = entropy_and_log_probs(network)
        (with_sae, q), (without, r) = entropy_and_log_probs(spliced), entropy_and_log_probs(ablated)
        return LossRecovered(clean, with_sae, without, divergence(q), divergence(r))

    return jax.lax.map(one, (tokens, counted))
