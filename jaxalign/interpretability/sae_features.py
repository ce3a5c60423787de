"""From inputs to features and back: encoders of six activations, and the decoder they share."""

import math

import jax
import jax.numpy as jnp

from jaxalign.interpretability.kth_largest import kth_largest
from jaxalign.interpretability.sae_config import TRACKING, SAEConfig
from jaxalign.interpretability.sae_parameters import decoder_norms, safe_norms
from jaxalign.types import Array, ArrayLike, Params


def sae_encode(params: Params, x: ArrayLike, config: SAEConfig) -> Array:
    """Features [B, F] float32 of inputs x [B, D], each row by itself; [B, L, D] for a crosscoder.

    z = (x - b_dec) W_enc + b_enc (x alone without `apply_b_dec_to_input`), and where `rescale_by_decoder_norm`
    z <- z ||W_dec||. Then

        relu                   max(z, 0)
        topk                   max(z, 0) where z is among the row's k largest (all that tie for the last place)
        batchtopk, matryoshka  max(z, 0) where z > threshold, tracked in training (arXiv:2412.06410; 2503.17547)
        jumprelu               z where z > threshold (arXiv:2407.14435)
        gated                  max(exp(r_mag) (z - b_enc) + b_mag, 0) where z > 0, b_gate for b_enc (arXiv:2404.16014)

    Any number of axes may stand before the last; they are kept. Raises ValueError if x does not end in the input's
    shape, naming both.
    """
    x = jnp.asarray(x)
    f = _encode(params, flat_input(x, config), config)
    return f.reshape(*x.shape[: x.ndim - len(config.input_shape)], config.d_sae)


def _encode(params: Params, x: Array, config: SAEConfig) -> Array:
    z = pre_activations(params, x, config)
    if config.activation == "gated":
        return gate(params, z)[0]
    if config.rescale_by_decoder_norm:
        z = z * decoder_norms(params)[None]
    positive = jax.nn.relu(z)
    # Asked this way round a NaN is kept.
    if config.activation == "topk":
        return jnp.where(z < kth_largest(z, config.k)[:, None], 0.0, positive)
    if config.activation == "jumprelu" or config.activation in TRACKING:
        return jnp.where(z <= params["threshold"].reshape(1, -1), 0.0, positive)
    return positive


def sae_decode(params: Params, f: ArrayLike, config: SAEConfig) -> Array:
    """Reconstructions [B, D_out] float32 of features f [B, F]: f W_dec + b_dec, W_dec's rows scaled to norm 1 where
    `rescale_by_decoder_norm`. [B, L, D] for a crosscoder. Raises ValueError if f does not end in [F]."""
    f = jnp.asarray(f)
    if f.ndim == 0 or f.shape[-1] != config.d_sae:
        raise ValueError(f"sae_decode: f must end in d_sae = {config.d_sae}, its shape is {f.shape}")
    amounts = f.reshape(-1, config.d_sae)
    if config.rescale_by_decoder_norm:
        amounts = amounts / safe_norms(params)[None]
    out = matmul(amounts, flat_decoder(params), config.dtype) + params["b_dec"].reshape(1, -1)
    return out.reshape(*f.shape[:-1], *config.output_shape)


def flat_input(x: ArrayLike, config: SAEConfig, *, name: str = "x", output: bool = False) -> Array:
    """x [..., D] or [..., L, D] as rows [B, D] or [B, L D], float32 unless float64."""
    x = jnp.asarray(x)
    shape = config.output_shape if output else config.input_shape
    lead = x.ndim - len(shape)
    if lead < 0 or x.shape[lead:] != shape:
        sizes = "d_out" if output and config.d_out else "layers, d_in" if config.layers else "d_in"
        raise ValueError(f"sparse autoencoder: {name} must end in ({sizes}) = {shape}, its shape is {x.shape}")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, math.prod(shape))


def flat_decoder(params: Params) -> Array:
    """W_dec as [F, D_out], or [F, L D] of a crosscoder."""
    return params["W_dec"].reshape(params["W_dec"].shape[0], -1)


def encoder_terms(params: Params, x: Array, config: SAEConfig) -> tuple[Array, Array, Array]:
    """x [B, D], W [D, F] and bias [F] of which pre-activations are x W + bias; bias b_gate for "gated"."""
    bias = params["b_gate" if config.activation == "gated" else "b_enc"]
    w_enc = params["W_enc"].reshape(-1, params["W_enc"].shape[-1])
    if not config.apply_b_dec_to_input:
        return x, w_enc, bias
    b_dec = params["b_dec"].reshape(-1)
    fixed = jax.lax.stop_gradient(b_dec)
    # The shift is zero; through it b_dec has its gradient by a product with a vector, where x - b_dec costs a matrix.
    return x - fixed[None], w_enc, bias + (fixed - b_dec) @ jax.lax.stop_gradient(w_enc)


def pre_activations(params: Params, x: Array, config: SAEConfig) -> Array:
    """z = (x - b_dec) W_enc + b [B, F] of flat inputs [B, D], b = b_gate for "gated"."""
    x, w_enc, bias = encoder_terms(params, x, config)
    return matmul(x, w_enc, config.dtype) + bias[None]


def gate(params: Params, z: Array) -> tuple[Array, Array]:
    """(features, max(z, 0)) [B, F] of a gated encoder whose gate has pre-activations z."""
    magnitude = jnp.exp(params["r_mag"])[None] * (z - params["b_gate"][None]) + params["b_mag"][None]
    return jnp.where(z <= 0, 0.0, jax.nn.relu(magnitude)), jax.nn.relu(z)


def matmul(x: Array, w: Array, dtype: str) -> Array:
    """x [B, N] @ w [N, M] with factors in `dtype` and sums, and gradients, in float32."""
    return x @ w if dtype == "float32" else _half_matmul(x, w)


def _half(x: Array, w: Array) -> Array:
    narrow = jnp.bfloat16
    return jnp.matmul(x.astype(narrow), w.astype(narrow), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _half_matmul(x: Array, w: Array) -> Array:
    return _half(x, w)


def _half_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _half(x, w), (x, w)


def _half_backward(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # Autodiff would multiply g in float32, at half the speed or less.
    x, w = factors
    return _half(g, w.T).astype(x.dtype), _half(x.T, g).astype(w.dtype)


_half_matmul.defvjp(_half_forward, _half_backward)
