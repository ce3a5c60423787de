"""A transformer's residual stream as a circuit graph: heads and MLPs as nodes that write to and read from it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interpretability.circuit_graph import CircuitGraph
from jaxalign.networks.transformer import TransformerConfig, apply_rope, rope_frequencies
from jaxalign.types import Array, Params


def transformer_graph(config: TransformerConfig, *, position: int | None = None) -> CircuitGraph:
    """The graph of `transformer(config)` on tokens[B, T], run with its parameters.

    Every source adds to the residual stream, and a reader reads the sum of all before it, so an edge is a sum over
    positions. Sources: "embedding", query heads "head 3.5" (layer 3) and "mlp 3": U = 1 + L (H + 1). Readers, before
    the norm: "head 4.1 q" for each query head, "head 4.0 k" and "head 4.0 v" for each key-value head (which feed H/K
    query heads each), "mlp 4" and "logits": V = L (H + 2 K + 1) + 1. Inputs may also be embeddings [B, T, D].
    Messages are [U, B, T, D].

    position: give the logits of this position only, [B, V], instead of all, [B, T, V]. The vocabulary is most of a
        small model's output.

    Layers stay a scan. Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Raises ValueError for adapters (merge them first), and at the run for inputs of another rank.
    """
    if config.lora_rank:
        raise ValueError("transformer_graph: merge the adapters into their kernels first (lora_rank must be 0)")
    layers, heads, groups = config.num_layers, config.num_heads, config.num_kv_heads
    each, reads = heads + 1, heads + 2 * groups + 1  # sources and readers of a layer
    sources, readers, feeds = _names(config)
    allowed = np.zeros((len(sources), len(readers)), bool)
    for layer in range(layers):
        allowed[: 1 + layer * each, layer * reads : (layer + 1) * reads - 1] = True
        allowed[: 1 + layer * each + heads, (layer + 1) * reads - 1] = True
    allowed[:, -1] = True

    def embed(params: Params, inputs: Array) -> Array:
        floats = jnp.issubdtype(inputs.dtype, jnp.floating)
        if inputs.ndim != (3 if floats else 2):
            raise ValueError(f"transformer_graph: needs tokens [B, T] or embeddings [B, T, D], got {inputs.shape}")
        if floats:
            return inputs
        return params["embedding"][inputs].astype(jnp.promote_types(jnp.float32, config.dtype))

    def forward(params: Params, inputs: Array, keep: Array, other: Array | None) -> tuple[Array, Array]:
        """(own - other messages [U, B, T, D], the last reader's input [B, T, D])."""
        x = embed(params, inputs)
        if other is None:
            other = jnp.zeros((len(sources), *x.shape), x.dtype)
        keep = jnp.where(allowed, keep, 0).astype(x.dtype)
        by_layer = keep[:, :-1].reshape(len(sources), layers, reads).swapaxes(0, 1)
        others = other[1:].reshape(layers, each, *x.shape)
        # What each layer's readers would see of the other run: its stream before the heads, and after them.
        after = other[0][None] + jnp.cumsum(others.sum(axis=1), axis=0)
        before = jnp.concatenate([other[:1], after[:-1]])
        streams = before, before + others[:, :-1].sum(axis=1)
        gap = _gaps(config, params["layers"], x - other[0], by_layer, others, streams)
        return gap, after[-1] + jnp.einsum("u,ubtd->btd", keep[:, -1], gap)

    def run(params: Params, inputs: Array, keep: Array, other: Array) -> Array:
        _, x = forward(params, inputs, keep, other)
        x = _rms_norm(config, params["final_norm"], x if position is None else x[:, position])
        table = params["embedding"] if config.tie_embeddings else params["unembedding"]
        return _product("...d,vd->...v", config, x, table)

    def messages(params: Params, inputs: Array) -> Array:
        return forward(params, inputs, jnp.ones(allowed.shape), None)[0]

    return CircuitGraph(sources, readers, allowed, feeds, embed, messages, run)


def _names(config: TransformerConfig) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    """(sources, readers, feeds [V, U])."""
    heads, groups = range(config.num_heads), range(config.num_kv_heads)
    shared = config.num_heads // config.num_kv_heads
    sources, readers, feeds = ["embedding"], [], []
    for i in range(config.num_layers):
        mine = [f"head {i}.{h}" for h in heads]
        readers += [f"{head} q" for head in mine] + [f"head {i}.{g} {part}" for part in "kv" for g in groups]
        feeds += [[head] for head in mine] + [mine[g * shared : (g + 1) * shared] for _ in "kv" for g in groups]
        sources += [*mine, f"mlp {i}"]
        readers.append(f"mlp {i}")
        feeds.append([f"mlp {i}"])
    readers, feeds = [*readers, "logits"], [*feeds, []]
    return tuple(sources), tuple(readers), np.array([[name in fed for name in sources] for fed in feeds])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gaps(
    config: TransformerConfig, layers: Params, first: Array, kept: Array, others: Array, streams: tuple[Array, Array]
) -> Array:
    """Own minus other messages [U, B, T, D] of all sources, the first being `first` [B, T, D].

    A reader sees the other run's stream [B, T, D] (before a layer's heads, and after them: each [L, B, T, D]) plus the
    gaps it keeps, kept[L, U, R]. `kept` is 0 where a source comes after the reader; others [L, H + 1, B, T, D].
    """
    each = config.num_heads + 1

    def layer(gap: Array, xs: Any) -> tuple[Array, None]:
        index, weights, kept, other, (before, after) = xs
        written = _attention(config, weights, _seen(before, kept[:, :-1], gap))
        gap = jax.lax.dynamic_update_slice_in_dim(gap, written - other[:-1], 1 + index * each, axis=0)
        written = _mlp(config, weights, _seen(after, kept[:, -1:], gap)[0])
        return jax.lax.dynamic_update_index_in_dim(gap, written - other[-1], (index + 1) * each, axis=0), None

    gap = jnp.zeros((kept.shape[1], *first.shape), first.dtype).at[0].set(first)
    return jax.lax.scan(layer, gap, (jnp.arange(config.num_layers), layers, kept, others, streams))[0]


def _seen(stream: Array, kept: Array, gap: Array) -> Array:
    """What readers see [R, B, T, D], of stream [B, T, D], kept[U, R] and gap[U, B, T, D]."""
    return stream[None] + jnp.einsum("ur,ubtd->rbtd", kept, gap)


def _gaps_forward(config: TransformerConfig, *arguments: Any) -> tuple[Array, Any]:
    gap = _gaps(config, *arguments)
    return gap, (arguments, gap)


def _gaps_backward(config: TransformerConfig, saved: Any, cotangent: Array) -> tuple[Any, ...]:
    """The layers in reverse. A row of `gap` is written once, so its end state says what every layer read.

    The derivative of a scan would keep `gap` as it was at each layer, L times the memory.
    """
    (layers, _, kept, _, streams), gap = saved
    each = config.num_heads + 1

    def layer(total: Array, xs: Any) -> tuple[Array, Any]:
        index, weights, kept, (before, after) = xs
        mlp = total[(index + 1) * each]
        _, pull = jax.vjp(functools.partial(_mlp, config), weights, _seen(after, kept[:, -1:], gap)[0])
        of_mlp, seen_mlp = pull(mlp)
        total = total + jnp.einsum("u,btd->ubtd", kept[:, -1], seen_mlp)
        heads = jax.lax.dynamic_slice_in_dim(total, 1 + index * each, config.num_heads, axis=0)
        _, pull = jax.vjp(functools.partial(_attention, config), weights, _seen(before, kept[:, :-1], gap))
        of_heads, seen = pull(heads)
        total = total + jnp.einsum("ur,rbtd->ubtd", kept[:, :-1], seen)
        seen = jnp.concatenate([seen, seen_mlp[None]])
        return total, (jax.tree.map(jnp.add, of_mlp, of_heads), seen, -jnp.concatenate([heads, mlp[None]]))

    total, (weights, seen, other) = jax.lax.scan(
        layer, cotangent, (jnp.arange(config.num_layers), layers, kept, streams), reverse=True
    )
    by_keep = jnp.einsum("ubtd,lrbtd->lur", gap, seen)
    return weights, total[0], by_keep, other, (seen[:, :-1].sum(axis=1), seen[:, -1])


_gaps.defvjp(_gaps_forward, _gaps_backward)


def _product(equation: str, config: TransformerConfig, x: Array, weights: Array) -> Array:
    """An einsum with operands in config.dtype and the sum in x's own, float32 or better."""
    return jnp.einsum(equation, x.astype(config.dtype), weights.astype(config.dtype), preferred_element_type=x.dtype)


def _rms_norm(config: TransformerConfig, params: Params, x: Array) -> Array:
    scale = params["scale"].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_epsilon) * scale


def _attention(config: TransformerConfig, weights: Params, seen: Array) -> Array:
    """What each head writes [H, B, T, D], from what each q, k, v reader sees [H + 2 K, B, T, D]."""
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
    normal = _rms_norm(config, weights["attention_norm"], seen)

    def projected(name: str, x: Array) -> Array:
        dense = weights["attention"][name]
        y = _product("hbtd,dhe->bthe", config, x, dense["kernel"].reshape(-1, len(x), size))
        return y + dense["bias"].reshape(1, 1, -1, size).astype(y.dtype) if config.attention_bias else y

    q, k = projected("q", normal[:heads]), projected("k", normal[heads : heads + groups])
    v = projected("v", normal[heads + groups :])
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    positions = jnp.broadcast_to(jnp.arange(seen.shape[2])[None, :], seen.shape[1:3])
    q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
    z = jax.nn.dot_product_attention(*(a.astype(config.dtype) for a in (q, k, v)), is_causal=True)
    kernel = weights["attention"]["o"]["kernel"].reshape(heads, size, -1)
    return _product("bthe,hed->hbtd", config, z.astype(seen.dtype), kernel)


def _mlp(config: TransformerConfig, weights: Params, x: Array) -> Array:
    normal = _rms_norm(config, weights["mlp_norm"], x)
    gate, up = (_product("btd,df->btf", config, normal, weights["mlp"][name]["kernel"]) for name in ("gate", "up"))
    return _product("btf,fd->btd", config, jax.nn.silu(gate) * up, weights["mlp"]["down"]["kernel"])
