"""The parameters of a sparse autoencoder: their first values, decoder norms, and what can be folded into them."""

import math

import jax
import jax.numpy as jnp

from jaxalign.interpretability.sae_config import SELECTING, TRACKING, SAEConfig
from jaxalign.types import Array, ArrayLike, Key, Params


def sae_init(key: Key, config: SAEConfig, *, b_dec: ArrayLike | None = None) -> Params:
    """Fresh parameters, float32: rows of W_dec in random directions, W_enc its transpose, biases zero.

    W_enc [D, F], W_dec [F, D_out], b_dec [D_out] and, by activation,
    b_enc [F] for all but "gated", which has b_gate, b_mag, r_mag [F];
    threshold [F] for "jumprelu" (trained, kept >= 0), threshold [] for "batchtopk" and "matryoshka" (tracked).
    A crosscoder has W_enc [L, D, F], W_dec [F, L, D] and b_dec [L, D]. Where the output is not of the input's width,
    W_enc has directions of its own.

    Args:
        b_dec: of its own shape, the mean or `geometric_median` of some activations; zeros unless given.
    """
    encoder_key, decoder_key = jax.random.split(key)
    features = config.d_sae
    w_dec = _directions(decoder_key, (features, *config.output_shape)) * config.initial_decoder_norm
    if config.d_out in (None, config.d_in):
        w_enc = jnp.moveaxis(w_dec, 0, -1)
    else:
        rows = _directions(encoder_key, (features, *config.input_shape)) * config.initial_decoder_norm
        w_enc = jnp.moveaxis(rows, 0, -1)
    zeros = jnp.zeros(features, jnp.float32)
    params = {"W_enc": w_enc, "W_dec": w_dec, "b_dec": jnp.zeros(config.output_shape, jnp.float32)}
    if b_dec is not None:
        given = jnp.asarray(b_dec, jnp.float32)
        if given.shape != config.output_shape:
            raise ValueError(f"sae_init: b_dec is {given.shape}, it must be {config.output_shape}")
        params["b_dec"] = given
    if config.activation == "gated":
        return params | {"b_gate": zeros, "b_mag": zeros, "r_mag": zeros}
    params["b_enc"] = zeros
    if config.activation == "jumprelu":
        params["threshold"] = jnp.full(features, config.initial_threshold, jnp.float32)
    if config.activation in TRACKING:
        params["threshold"] = jnp.zeros((), jnp.float32)
    return params


def _directions(key: Key, shape: tuple[int, ...]) -> Array:
    """Gaussian rows with each [..., D] vector scaled to norm 1."""
    rows = jax.random.normal(key, shape, jnp.float32)
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


def decoder_norms(params: Params) -> Array:
    """||W_dec|| of each feature [F]; of a crosscoder sum_l ||W_dec[:, l]||. Its gradient at a row of zeros is zero."""
    w_dec = params["W_dec"]
    squares = jnp.square(w_dec).sum(axis=-1)
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return norms if w_dec.ndim == 2 else norms.sum(axis=1)


def safe_norms(params: Params) -> Array:
    """`decoder_norms` [F], at least 1e-8, to divide by."""
    return jnp.maximum(decoder_norms(params), 1e-8)


def fold_input_scale(params: Params, scale: ArrayLike, config: SAEConfig) -> Params:
    """Parameters that act on x as `params`, trained on scale * x, act on scale * x; reconstructions are of x.

    W_enc scale, W_dec / scale, b_dec / scale: features are unchanged, except that with `rescale_by_decoder_norm` they
    and the threshold are in units of the new decoder norm, and so are divided by `scale`.

    Args:
        scale: positive scalar; of a crosscoder scalar or [L], one for each layer (which cannot be folded where
            features are rescaled, whose ratios it would change).
    """
    scale = jnp.asarray(scale, jnp.float32)
    if scale.ndim > (config.layers is not None) or (scale.ndim and scale.shape != (config.layers,)):
        raise ValueError(f"fold_input_scale: scale must be a scalar, or [L] for a crosscoder; it is {scale.shape}")
    if scale.ndim and config.rescale_by_decoder_norm:
        raise ValueError("fold_input_scale: one scale per layer changes the ratios of decoder norms; fold these first")
    each = scale[:, None] if scale.ndim else scale
    folded = dict(params)
    folded["W_enc"] = params["W_enc"] * (each[..., None] if scale.ndim else scale)
    folded["W_dec"] = params["W_dec"] / (each[None] if scale.ndim else scale)
    folded["b_dec"] = params["b_dec"] / each
    if config.rescale_by_decoder_norm and "threshold" in params:
        folded["threshold"] = params["threshold"] / scale
    return folded


def fold_decoder_norm(params: Params, config: SAEConfig) -> Params:
    """The same autoencoder with decoder rows [F, D] of norm 1, features and encoder taking the norm over.

    W_enc, b_enc (or b_gate and b_mag) and a jumprelu threshold times ||W_dec||, W_dec divided by it. A feature f
    becomes f ||W_dec||, or stays as it is with `rescale_by_decoder_norm`. Raises ValueError where k are selected
    without that: others would be.
    """
    if config.activation in SELECTING and not config.rescale_by_decoder_norm:
        raise ValueError("fold_decoder_norm: without rescale_by_decoder_norm it would change which k are the largest")
    norms = safe_norms(params)
    names = {"b_enc", "b_gate", "b_mag"} | ({"threshold"} if config.activation == "jumprelu" else set())
    folded = {name: value * norms if name in names else value for name, value in params.items()}
    folded["W_enc"] = params["W_enc"] * norms.reshape((1,) * (params["W_enc"].ndim - 1) + (-1,))
    folded["W_dec"] = params["W_dec"] / norms.reshape((-1,) + (1,) * (params["W_dec"].ndim - 1))
    return folded


def geometric_median(x: ArrayLike, *, steps: int = 20) -> Array:
    """The point m [...] least far in sum from the rows of x [N, ...], by Weiszfeld's steps from their mean.

    m <- sum_i x_i / |x_i - m|  /  sum_i 1 / |x_i - m|; Bricken et al. (2023) begin b_dec there.
    """
    x = jnp.asarray(x)
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def improve(_: Array, m: Array) -> Array:
        weight = 1 / jnp.maximum(jnp.linalg.norm(flat - m[None], axis=1), 1e-12)
        return weight @ flat / weight.sum()

    return jax.lax.fori_loop(0, steps, improve, flat.mean(axis=0)).reshape(x.shape[1:])
