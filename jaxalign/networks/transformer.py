"""A Llama-family decoder: grouped-query attention, RoPE, RMSNorm, SwiGLU, scanned layers.

It covers Llama 2 and 3, SmolLM2 and Qwen2/2.5 (biases on q, k, v). Shapes: B batch, T positions, D hidden size, H query
heads, K key-value heads, E head size, F intermediate size, L layers, V vocabulary, S cache length.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel
from jaxalign.networks.dense import Dense
from jaxalign.networks.sites import site
from jaxalign.types import Array, Params

REMAT = ("none", "dots", "full")


class RopeScaling(NamedTuple):
    """Llama 3's stretching of the slow rotary frequencies for contexts longer than those trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes and choices that define a Transformer; all static.

    dtype: of the products ("float32", "bfloat16", "float64"); sums, norms, softmax and the residual stream stay in
        float32 or better.
    lora_rank, lora_alpha: adapters beside every kernel, scaled by lora_alpha / lora_rank; rank 0 is none.
    remat: what the backward pass recomputes: "none" keeps every activation, "dots" keeps the outputs of matrix products
        only, "full" keeps one [B, T, D] per layer and runs each layer's forward pass again.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_length: int = 2048
    rms_norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    dtype: str = "float32"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    remat: str = "full"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {REMAT}, got {self.remat!r}")


class Cache(NamedTuple):
    """Of each layer the keys and values [B, K, S, E] of a row's first `length` [B] positions; the rest is ignored.

    One array per layer, so that a loop over tokens updates each in place.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Array


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Array:
    """Rotary frequencies theta^(-2i / head_dim), i = 0 .. head_dim/2 - 1, as [head_dim / 2] radians per position.

    With `scaling`, wavelengths above original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor are kept, and those between are blended linearly in their frequency.
    Su et al. 2021 (arXiv 2104.09864), equation 15; the Llama 3 report (arXiv 2407.21783), section 3.2.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def apply_rope(x: Array, positions: Array, frequencies: Array) -> Array:
    """Rotate x[B, T, H, E] by positions[B, T] * frequencies[E / 2]; coordinate i is paired with i + E/2."""
    angle = positions[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis of x[..., D]. Zhang and Sennrich, arXiv 1910.07467."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype)
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return normal * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _dense(config: TransformerConfig, features: int, name: str, *, use_bias: bool = False) -> Dense:
    return Dense(
        features,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        kernel_init=nn.initializers.normal(0.02),
        name=name,
    )


def _attend(q: Array, keys: Array, values: Array, visible: Array) -> Array:
    """Attention of q[B, T, H, E] to keys and values [B, K, S, E] where visible[B or 1, T, S], as [B, T, H, E].

    One [H/K T, E] x [E, S] product per row and key-value head, on a cache as it lies: for a single query
    `jax.nn.dot_product_attention` first copies keys and values into another order.
    """
    batch, length, heads, size = q.shape
    groups = keys.shape[1]
    q = q.reshape(batch, length, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgte,bkse->bkgts", q, keys, preferred_element_type=accumulator) / math.sqrt(size)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    pattern = site(weights.reshape(batch, heads, length, -1), "attention_pattern")
    weights = pattern.reshape(weights.shape).astype(q.dtype)
    out = jnp.einsum("bkgts,bkse->bkgte", weights, values, preferred_element_type=accumulator)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


class Attention(nn.Module):
    """Causal grouped-query attention on x[B, T, D]; `cached` is one layer's (keys, values) [B, K, S, E] or None.

    With `segments` [B, T] a position sees those of its own segment only; not with a cache.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, positions: Array, segments: Array | None, cached: Any) -> tuple[Array, Any]:
        c = self.config
        batch, length = x.shape[:2]

        def heads(name: str, count: int) -> Array:
            y = _dense(c, count * c.head_dim, name, use_bias=c.attention_bias)(x)
            return y.reshape(batch, length, count, c.head_dim)

        counts = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        q, k, v = (site(heads(name, count), f"attention_{name}") for name, count in counts.items())
        frequencies = rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
        q, k, v = (a.astype(c.dtype) for a in (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))
        if cached is None:
            visible = jnp.tril(jnp.ones((1, length, length), bool))
            if segments is not None:
                visible = visible & (segments[:, :, None] == segments[:, None, :])
        else:
            write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
            cached = tuple(write(old, a, positions[:, 0]) for old, a in zip(cached, (k, v), strict=True))
            k, v = cached
            visible = jnp.arange(k.shape[2])[None, None, :] <= positions[:, :, None]
        z = site(_attend(q, k, v, visible), "attention_z")
        out = _dense(c, c.hidden_size, "o")(z.reshape(batch, length, -1)).astype(x.dtype)
        return site(out, "attention_out"), cached


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) on x[B, T, D]. Shazeer 2020, arXiv 2002.05202."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = site(_dense(c, c.intermediate_size, "gate")(x), "mlp_pre")
        up = _dense(c, c.intermediate_size, "up")(x)
        post = site(nn.silu(gate) * up, "mlp_post")
        return site(_dense(c, c.hidden_size, "down")(post), "mlp_out")


class Layer(nn.Module):
    """One pre-norm residual layer: attention, then SwiGLU."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, positions: Array, segments: Array | None, cached: Any) -> tuple[Array, Any]:
        c = self.config
        x = site(x, "resid_pre")
        normal = site(RMSNorm(c.rms_norm_epsilon, name="attention_norm")(x), "attention_input")
        y, cached = Attention(c, name="attention")(normal, positions, segments, cached)
        x = site(x + y, "resid_mid")
        normal = site(RMSNorm(c.rms_norm_epsilon, name="mlp_norm")(x), "mlp_input")
        return site(x + SwiGLU(c, name="mlp")(normal), "resid_post"), cached


def _scanned_layers(config: TransformerConfig) -> type[nn.Module]:
    layer: Any = Layer
    if config.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
        layer = nn.remat(layer, prevent_cse=False, policy=policy)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        out_axes=0,
        length=config.num_layers,
    )


def _embed(config: TransformerConfig, table: Array, tokens: Array) -> Array:
    """The residual stream's beginning [B, T, D], in float32 or better."""
    return site(table[tokens].astype(jnp.promote_types(jnp.float32, config.dtype)), "embedding")


class Transformer(nn.Module):
    """The decoder as a Linen module; `transformer` wraps it as a LanguageModel."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        self.layers = _scanned_layers(c)(c)
        self.final_norm = RMSNorm(c.rms_norm_epsilon)
        if not c.tie_embeddings:
            self.unembedding = self.param("unembedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))

    def __call__(self, tokens: Array, positions: Array, segments: Array | None = None) -> Array:
        """Hidden states [B, T, D] after the final norm."""
        x, _ = self.layers(_embed(self.config, self.embedding, tokens), positions, segments, None)
        return site(self.final_norm(x), "final_norm")


def positions_in(segments: Array) -> Array:
    """How far each position of segments[B, T] is from the beginning of its run of equal numbers, [B, T] int32."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :], segments.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def transformer(config: TransformerConfig) -> LanguageModel:
    """A Llama-family Transformer as a LanguageModel over tokens[B, T].

    Causal, with positions 0 .. T-1: right-padding never changes what stands before it, so no attention mask is needed.
    `segments` [B, T] int packs several sequences into a row: each run of one number is a sequence of its own.
    Logits are in float32 or better. Parameters (layers stacked on a leading axis [L]): `embedding` [V, D],
    `layers/attention/{q,k,v,o}/kernel`, `layers/mlp/{gate,up,down}/kernel` ([L, I, O], adapters beside them),
    `layers/{attention_norm,mlp_norm}/scale`, `final_norm/scale`, and `unembedding` [V, D] unless embeddings are tied.

    Sites (see `jaxalign.interpretability.capture`), in every layer: `resid_pre`, `resid_mid`, `resid_post` [B, T, D];
    `attention_input` and `mlp_input` [B, T, D], normalised;
    `attention_q` [B, T, H, E], `attention_k` and `attention_v` [B, T, K, E] before RoPE, `attention_pattern`
    [B, H, T, S], `attention_z` [B, T, H, E], `attention_out` [B, T, D]; `mlp_pre` (the gate before silu) and `mlp_post`
    [B, T, F], `mlp_out` [B, T, D]. Once: `embedding` and `final_norm` [B, T, D].
    """
    module = Transformer(config)

    def positions_of(tokens: Array) -> Array:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)

    def init(key: Array) -> Params:
        tokens = jnp.zeros((1, 2), jnp.int32)
        return module.init(key, tokens, positions_of(tokens))["params"]

    def unembedding(params: Params) -> Array:
        return params["embedding"] if config.tie_embeddings else params["unembedding"]

    def logits_of(params: Params, x: Array) -> Array:
        w = unembedding(params).astype(config.dtype)
        rows = x.reshape(-1, x.shape[-1]).astype(config.dtype)
        out = jax.lax.dot_general(rows, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def hidden(params: Params, tokens: Array, segments: Array | None = None) -> Array:
        positions = positions_of(tokens) if segments is None else positions_in(segments)
        return module.apply({"params": params}, tokens, positions, segments)

    def init_cache(batch_size: int, length: int) -> Cache:
        shape = (batch_size, config.num_kv_heads, length, config.head_dim)
        keys, values = (tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers)) for _ in range(2))
        return Cache(keys, values, jnp.zeros(batch_size, jnp.int32))

    def for_decoding(params: Params) -> Params:
        if isinstance(params["layers"], tuple):
            return params
        layers = (jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.num_layers))
        return {**params, "layers": tuple(layers)}

    def decode(params: Params, tokens: Array, cache: Cache) -> tuple[Array, Cache]:
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])[None, :]
        x = _embed(config, params["embedding"], tokens)
        updated = []
        # Not a scan: it would copy each layer's weights and cache out of the stack at every token.
        for one, *cached in zip(for_decoding(params)["layers"], cache.keys, cache.values, strict=True):
            x, new = Layer(config).apply({"params": one}, x, positions, None, cached)
            updated.append(new)
        x = site(RMSNorm(config.rms_norm_epsilon).apply({"params": params["final_norm"]}, x), "final_norm")
        keys, values = zip(*updated, strict=True)
        return logits_of(params, x), Cache(keys, values, cache.length + tokens.shape[1])

    return LanguageModel(
        init=init,
        apply=lambda params, tokens, segments=None: logits_of(params, hidden(params, tokens, segments)),
        hidden=hidden,
        unembedding=unembedding,
        init_cache=init_cache,
        decode=decode,
        for_decoding=for_decoding,
    )
