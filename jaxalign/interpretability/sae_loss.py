"""What a sparse autoencoder minimises: reconstruction, sparsity, and the second chance of dead features."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.interpretability.jump_relu import jump_relu, step_above
from jaxalign.interpretability.kth_largest import kth_largest
from jaxalign.interpretability.sae_config import SELECTING, TRACKING, SAEConfig
from jaxalign.interpretability.sae_features import (
    encoder_terms,
    flat_decoder,
    flat_input,
    gate,
    matmul,
    pre_activations,
)
from jaxalign.interpretability.sae_parameters import decoder_norms
from jaxalign.interpretability.sae_sparse import combine, pick, plan_of
from jaxalign.types import Array, ArrayLike, Metrics, Params

MIN_ROWS, MIN_RATIO = 64, 24  # of `uses_entries`


class Forward(NamedTuple):
    """What a forward pass made of a batch.

    error: [B, D_out], x_hat - x
    extra: scalar, further reconstruction errors (of prefixes, or of the gated encoder's gate)
    penalty: [B] the sparsity term before lambda; zeros for what selects
    z: [B, F] the pre-activations, or None where their gradient is not at hand
    l0, fired, smallest: [] mean features above zero; [F] which were; [] the least of them, inf if there is none
    """

    error: Array
    extra: Array
    penalty: Array
    z: Array | None
    l0: Array
    fired: Array
    smallest: Array


def sae_loss(params: Params, state: Any, x: Any, config: SAEConfig) -> tuple[Array, Metrics]:
    """(loss, metrics) of a batch x [B, D]; a transcoder's is (x_in [B, D], x_out [B, D_out]), a crosscoder's [B, L, D].

    loss = mean_b |x_hat - x|^2 + lambda mean_b penalty + aux_coefficient aux, with |.|^2 summed over D and

        relu      penalty = sum_f f ||W_dec_f||
        jumprelu  penalty = l0, sum_f tanh(tanh_scale f ||W_dec_f||), or 2 (l0 - target_l0)^2 / target_l0; the
                  threshold's gradient is a rectangle kernel's of width `bandwidth` (arXiv:2407.14435, eq. 11 and 12)
        gated     penalty = sum_f max(pi, 0) sg(||W_dec_f||), and |x - (max(pi, 0) sg(W_dec) + sg(b_dec))|^2 is added
                  (arXiv:2404.16014, eq. 8)
        others    no penalty; k features are kept, by row ("topk") or the k B largest of the batch. "matryoshka" sums
                  the reconstruction errors of its prefixes (arXiv:2503.17547). aux = min(dead / k_aux, 1) mean_b
                  |sg(x - x_hat) - sum of the k_aux largest dead z_f W_dec_f|^2 (arXiv:2406.04093, section A.2)

    Args:
        state: an `SAEState`; its `since_fired` says which features are dead, its `step` how warm lambda is.

    Metrics, all means over the batch: mse (summed over D), l0, explained_variance, dead_fraction (by `since_fired`),
    and where they apply sparsity_loss (with lambda), aux_loss (with its coefficient), threshold.
    """
    loss, metrics, _ = batch_loss(params, x, state.since_fired, state.step, config)
    return loss, metrics


def batch_loss(
    params: Params, x: Any, since_fired: Array, step: ArrayLike, config: SAEConfig, *, axis: str | None = None
) -> tuple[Array, Metrics, Forward]:
    """`sae_loss` with since_fired [F], and the forward pass it is of; `axis` is the mesh axis dividing F, if any."""
    inputs, targets = sides(x, config)
    params = unit_rows(params) if config.decoder_norm == "unit" else params
    norms = decoder_norms(params)
    if axis is None and uses_entries(config, inputs.shape[0]):
        out = _by_entries(params, inputs, targets, norms, config)
    else:
        out = _by_features(params, inputs, targets, norms, config, axis)
    mse = jnp.square(out.error).sum(axis=-1).mean()
    dead = since_fired > config.dead_after
    loss = mse + out.extra
    metrics = {
        "mse": mse,
        "l0": out.l0,
        "explained_variance": 1 - mse / jnp.maximum(_variance(targets), 1e-12),
        "dead_fraction": over(axis, jax.lax.pmean, dead.mean(dtype=jnp.float32)),
    }
    if config.activation in SELECTING:
        aux = config.aux_coefficient * _auxiliary(params, inputs, out, norms, dead, config, axis)
        loss, metrics["aux_loss"] = loss + aux, aux
    else:
        warmth = jnp.minimum((jnp.asarray(step, mse.dtype) + 1) / max(config.sparsity_warm_up, 1), 1.0)
        sparsity = config.sparsity * warmth * out.penalty.mean()
        loss, metrics["sparsity_loss"] = loss + sparsity, sparsity
    if config.activation in TRACKING:
        metrics["threshold"] = params["threshold"]
    return loss, metrics, out


def over(axis: str | None, collective: Callable[[Any, str], Any], x: Any) -> Any:
    """`collective(x, axis)` of x [...], or x where nothing is divided."""
    return x if axis is None else collective(x, axis)


def sides(x: Any, config: SAEConfig) -> tuple[Array, Array]:
    """Flat inputs [B, D] and targets [B, D_out]."""
    pair = isinstance(x, tuple | list)
    if pair != (config.d_out is not None):
        need = "a pair (x_in, x_out)" if config.d_out else "one array"
        raise ValueError(f"sparse autoencoder: with d_out = {config.d_out} a batch x is {need}, got {type(x).__name__}")
    if not pair:
        inputs = flat_input(x, config)
        targets = inputs
    else:
        inputs, targets = flat_input(x[0], config, name="x_in"), flat_input(x[1], config, name="x_out", output=True)
    rank = len(config.input_shape) + 1
    if any(jnp.ndim(leaf) != rank for leaf in jax.tree.leaves(x)) or targets.shape[0] != inputs.shape[0]:
        raise ValueError(f"sparse autoencoder: x must be one batch of rows, its shape is {jax.tree.map(jnp.shape, x)}")
    return inputs, targets


def _variance(x: Array) -> Array:
    """E|x - E x|^2 of x [B, D]."""
    return jnp.square(x - x.mean(axis=0, keepdims=True)).sum(axis=-1).mean()


def unit_rows(params: Params) -> Params:
    """W_dec [F, ...] scaled to `decoder_norms` 1; through it no gradient goes along a row."""
    w_dec = params["W_dec"]
    norms = jnp.maximum(decoder_norms(params), 1e-8).reshape((-1,) + (1,) * (w_dec.ndim - 1))
    return {**params, "W_dec": w_dec / norms}


def _by_features(
    params: Params, x: Array, targets: Array, norms: Array, config: SAEConfig, axis: str | None
) -> Forward:
    """The forward pass by products of whole matrices."""
    z = pre_activations(params, x, config)
    extra, penalty = jnp.zeros((), z.dtype), jnp.zeros(z.shape[0], z.dtype)
    if config.activation == "relu":
        f = jax.nn.relu(z)
        penalty = over(axis, jax.lax.psum, f @ norms)
    elif config.activation == "gated":
        f, opened = gate(params, z)
        # A W_dec that shrank would make the penalty cheap, and the detached guess could not grow it back.
        fixed = jax.lax.stop_gradient({"norms": norms, **params})
        penalty = over(axis, jax.lax.psum, opened @ fixed["norms"])
        guess = over(axis, jax.lax.psum, matmul(opened, flat_decoder(fixed), config.dtype))
        guess = guess + fixed["b_dec"].reshape(1, -1)
        extra = jnp.square(guess - targets).sum(axis=-1).mean()
    elif config.activation == "jumprelu":
        f = jump_relu(z, params["threshold"], config.bandwidth)
        penalty = _jump_penalty(f, z, params["threshold"], norms, config, axis)
    else:
        scaled = z * norms[None] if config.rescale_by_decoder_norm else z
        f = jnp.where(_left_out(jax.lax.stop_gradient(scaled), config, axis), 0.0, jax.nn.relu(z))
    error, inner = _reconstruction(params, f, targets, config, axis)
    fixed_f = jax.lax.stop_gradient(f * norms[None] if config.rescale_by_decoder_norm else f)
    positive = fixed_f > 0
    return Forward(
        error=error,
        extra=extra + inner,
        penalty=penalty,
        z=z,
        l0=over(axis, jax.lax.psum, positive.sum(axis=-1, dtype=jnp.float32)).mean(),
        fired=positive.any(axis=0),
        smallest=over(axis, jax.lax.pmin, jnp.min(jnp.where(positive, fixed_f, jnp.inf))),
    )


def _by_entries(params: Params, x: Array, targets: Array, norms: Array, config: SAEConfig) -> Forward:
    """The forward pass of "topk" by the entries that are kept; the encoder alone is a product of whole matrices."""
    x, w_enc, bias = encoder_terms(params, x, config)
    kept = kept_entries(config)
    assert kept is not None
    z = jax.lax.stop_gradient(x @ w_enc + bias[None])
    scaled = z * jax.lax.stop_gradient(norms)[None] if config.rescale_by_decoder_norm else z
    # Without its values XLA would make a full sort of this.
    largest, indices = jax.lax.optimization_barrier(jax.lax.top_k(scaled, kept))
    plan = plan_of(indices, config.d_sae)
    values = jax.nn.relu(pick(x, w_enc, bias, z, indices, plan))
    values = jnp.where((jnp.arange(kept) < config.k)[None], values, 0.0)
    error = combine(values, indices, plan, flat_decoder(params)) + params["b_dec"].reshape(1, -1) - targets
    positive = jax.lax.stop_gradient(values) > 0
    return Forward(
        error=error,
        extra=jnp.zeros((), error.dtype),
        penalty=jnp.zeros(error.shape[0], error.dtype),
        z=None,
        l0=positive.sum(axis=-1, dtype=jnp.float32).mean(),
        fired=jnp.zeros(config.d_sae, bool).at[indices].max(positive),
        smallest=jnp.min(jnp.where(positive, largest, jnp.inf)),
    )


def kept_entries(config: SAEConfig) -> int | None:
    """The most features of [F] that "topk" keeps in a row, where that is known before k is."""
    if config.activation != "topk":
        return None
    return config.k if isinstance(config.k, int) else config.k_max


def uses_entries(config: SAEConfig, rows: int) -> bool:
    """Whether `_by_entries` is the quicker way for [rows, D]: on a CPU, if entries are few among F and rows not.

    Measured with benchmarks/sae.py. Accelerators multiply whole matrices faster than they gather.
    """
    kept = kept_entries(config)
    if kept is None or config.dtype != "float32" or jax.default_backend() != "cpu":
        return False
    return rows >= MIN_ROWS and config.d_sae >= MIN_RATIO * kept


def _left_out(scaled: Array, config: SAEConfig, axis: str | None) -> Array:
    """Which of scaled [B, F] are below the k largest of their row, or of all rows together; a NaN is not."""
    if config.activation == "topk":
        if axis is None or not isinstance(config.k, int):
            return scaled < kth_largest(scaled, config.k, axis_name=axis)[:, None]
        local = jax.lax.top_k(scaled, min(config.k, scaled.shape[1]))[0]
        return scaled < kth_largest(jax.lax.all_gather(local, axis, axis=1, tiled=True), config.k)[:, None]
    count = jnp.floor(jnp.asarray(config.k, jnp.float32) * scaled.shape[0]).astype(jnp.int32)
    return scaled < kth_largest(jax.nn.relu(scaled).reshape(-1), count, axis_name=axis)


def _jump_penalty(f: Array, z: Array, threshold: Array, norms: Array, config: SAEConfig, axis: str | None) -> Array:
    if config.l0_penalty == "tanh":
        return over(axis, jax.lax.psum, jnp.tanh(config.tanh_scale * f * norms[None]).sum(axis=-1))
    l0 = over(axis, jax.lax.psum, step_above(z, threshold, config.bandwidth).sum(axis=-1))
    if config.l0_penalty == "step":
        return l0
    assert config.target_l0 is not None
    return 2 * jnp.square(l0 - config.target_l0) / config.target_l0


def _reconstruction(
    params: Params, amounts: Array, targets: Array, config: SAEConfig, axis: str | None
) -> tuple[Array, Array]:
    """(x_hat - x [B, D_out], the sum of the squared errors of the prefixes before the last)."""
    w_dec, total = flat_decoder(params), params["b_dec"].reshape(1, -1) - targets
    inner, begin = jnp.zeros((), targets.dtype), 0
    for width in config.widths or (config.d_sae,):
        if axis is None:
            part = matmul(amounts[:, begin:width], w_dec[begin:width], config.dtype)
        else:
            feature = jax.lax.axis_index(axis) * w_dec.shape[0] + jnp.arange(w_dec.shape[0])
            inside = (feature >= begin) & (feature < width)
            part = jax.lax.psum(matmul(amounts * inside[None], w_dec, config.dtype), axis)
        total = total + part
        inner += jnp.square(total).sum(axis=-1).mean() if width < config.d_sae else 0.0
        begin = width
    return total, inner


def _auxiliary(
    params: Params, x: Array, out: Forward, norms: Array, dead: Array, config: SAEConfig, axis: str | None
) -> Array:
    """min(dead / k_aux, 1) mean_b |error + sum of the k_aux largest dead amounts times their rows|^2."""
    k_aux = config.k_aux
    assert k_aux is not None

    def of_the_dead(trained: dict[str, Array], fixed: dict[str, Array]) -> Array:
        count = over(axis, jax.lax.psum, fixed["dead"].sum())
        z = trained["z"] if "z" in trained else fixed["x"] @ trained["W_enc"] + trained["bias"][None]
        among = jax.lax.stop_gradient(jnp.where(fixed["dead"][None], z * fixed["scale"][None], -jnp.inf))
        kept = fixed["dead"][None] & (among >= kth_largest(among, jnp.minimum(k_aux, count), axis_name=axis)[:, None])
        guess = over(axis, jax.lax.psum, matmul(jnp.where(kept, z, 0.0), trained["W_dec"], config.dtype))
        return jnp.minimum(count / k_aux, 1.0) * jnp.square(guess + fixed["error"]).sum(axis=-1).mean()

    scale = norms if config.rescale_by_decoder_norm else jnp.ones_like(norms)
    fixed = jax.lax.stop_gradient({"dead": dead, "scale": scale, "error": out.error})
    trained = {"W_dec": flat_decoder(params)}
    if out.z is None:
        fixed["x"], trained["W_enc"], trained["bias"] = encoder_terms(params, x, config)
    else:
        trained["z"] = out.z
    return value_if(of_the_dead, over(axis, jax.lax.pmax, dead.any().astype(jnp.int32)) > 0, trained, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def value_if(function: Callable[[Any, Any], Array], wanted: Array, trained: Any, fixed: Any) -> Array:
    """`function(trained, fixed)`, a scalar [], if wanted, else 0; gradients go to `trained` alone.

    The gradient is taken with the value: a `cond` that is differentiated hands on all that its backward pass may need,
    as zeros where it is not wanted.
    """
    dtype = jax.eval_shape(function, trained, fixed).dtype
    return jax.lax.cond(wanted, function, lambda *_: jnp.zeros((), dtype), trained, fixed)


def _value_if_forward(function: Callable[[Any, Any], Array], wanted: Array, trained: Any, fixed: Any) -> Any:
    def nothing(trained: Any, fixed: Any) -> tuple[Array, Any]:
        return jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, trained)

    dtype = jax.eval_shape(function, trained, fixed).dtype
    value, gradient = jax.lax.cond(wanted, jax.value_and_grad(function), nothing, trained, fixed)
    return value, gradient


def _value_if_backward(function: Callable[[Any, Any], Array], gradient: Any, g: Array) -> tuple[Any, ...]:
    return None, jax.tree.map(lambda x: g * x, gradient), None


value_if.defvjp(_value_if_forward, _value_if_backward)
