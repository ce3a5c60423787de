"""Between a checkpoint's tensors (one per layer, [out, in]) and the Transformer's leaves (stacked, [L, in, out])."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import LanguageModel, path_name
from jaxalign.types import Params

# Leaf -> tensor name; {} is the layer. Leaves that end in "kernel" are transposed.
HUGGING_FACE_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "unembedding": "lm_head.weight",
}
GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/q/kernel": "blk.{}.attn_q.weight",
    "layers/attention/q/bias": "blk.{}.attn_q.bias",
    "layers/attention/k/kernel": "blk.{}.attn_k.weight",
    "layers/attention/k/bias": "blk.{}.attn_k.bias",
    "layers/attention/v/kernel": "blk.{}.attn_v.weight",
    "layers/attention/v/bias": "blk.{}.attn_v.bias",
    "layers/attention/o/kernel": "blk.{}.attn_output.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "unembedding": "output.weight",
}


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """A checkpoint open for reading.

    shapes: tensor name -> shape, as the checkpoint writes it
    read: `name -> np.ndarray` of that shape, in any float type; may be a view of a mapped file
    where: `name -> str`, the file that holds (or should hold) the tensor, for messages
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    where: Callable[[str], str]


def _tensors_of(leaf: str, layers: int, names: Mapping[str, str]) -> list[str]:
    return [names[leaf].format(i) for i in range(layers)] if leaf.startswith("layers/") else [names[leaf]]


def _check(source: TensorSource, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes before a byte of weights is read."""
    if missing := [name for name in wanted if name not in source.shapes]:
        raise ValueError(f"{source.where(missing[0])}: no tensor {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(source.shapes.keys() - wanted.keys()):
        raise ValueError(
            f"{source.where(extra[0])}: tensor {extra[0]!r} has no place in this architecture ({len(extra)} such)"
        )
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise ValueError(
                f"{source.where(name)}: tensor {name!r} is {source.shapes[name]}, the configuration says {shape}"
            )


def stack_params(network: LanguageModel, source: TensorSource, names: Mapping[str, str], *, param_dtype: Any) -> Params:
    """Read a whole checkpoint into the parameter tree of `network`, leaves in `param_dtype`.

    One stacked leaf is on the host at a time, so the peak is the model and its largest leaf. Adapter leaves of a
    network with LoRA are left out: `network.starting_from` draws them.

    Raises ValueError naming file and tensor if one is missing, unknown, or of another shape.
    """
    expected = jax.tree.leaves_with_path(jax.eval_shape(network.init, jax.random.key(0)))
    shapes = {path_name(path): leaf.shape for path, leaf in expected if path_name(path) in names}
    tensors = {leaf: _tensors_of(leaf, shape[0], names) for leaf, shape in shapes.items()}
    wanted = {}
    for leaf, shape in shapes.items():
        one = shape[1:] if leaf.startswith("layers/") else shape
        wanted.update(dict.fromkeys(tensors[leaf], one[::-1] if leaf.endswith("kernel") else one))
    _check(source, wanted)

    params: dict[str, Any] = {}
    for leaf, shape in shapes.items():
        stacked = np.empty(shape, jnp.dtype(param_dtype))
        slots = stacked if leaf.startswith("layers/") else stacked[None]
        for slot, name in zip(slots, tensors[leaf], strict=True):
            tensor = source.read(name)
            slot[...] = tensor.T if leaf.endswith("kernel") else tensor
        *parents, last = leaf.split("/")
        place = params
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = jnp.asarray(stacked)
    return params


def unstack_params(params: Params, names: Mapping[str, str]) -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """The tensors of a checkpoint, in file order: (name, shape, read), where `read()` gives a C-contiguous array.

    Layer by layer, so that a reader of layer i needs few shards. Raises ValueError for a leaf that has no tensor name.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params, is_leaf=lambda x: x is None)}
    for leaf, value in leaves.items():
        if leaf not in names:
            raise ValueError(f"save_pretrained: parameter {leaf!r} has no place in a checkpoint")
        if value is None:
            raise ValueError(f"save_pretrained: parameter {leaf!r} is None; a TrainState's are in `state.all_params`")
    layers = {leaf: value.shape[0] for leaf, value in leaves.items() if leaf.startswith("layers/")}
    if len(set(layers.values())) > 1:
        raise ValueError(f"save_pretrained: leaves disagree on the number of layers: {layers}")

    def tensor(leaf: str, layer: int | None) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
        value, transposed = leaves[leaf], leaf.endswith("kernel")
        shape = tuple(value.shape if layer is None else value.shape[1:])

        def read() -> np.ndarray:
            array = np.asarray(value if layer is None else value[layer])
            # safetensors writes the buffer as it lies: a transposed view would be saved scrambled.
            return np.ascontiguousarray(array.T if transposed else array)

        return (shape[::-1] if transposed else shape), read

    for leaf in names:
        if leaf in leaves and leaf == "embedding":
            yield names[leaf], *tensor(leaf, None)
    for layer in range(max(layers.values(), default=0)):
        for leaf in names:
            if leaf in layers:
                yield names[leaf].format(layer), *tensor(leaf, layer)
    for leaf in names:
        if leaf in leaves and leaf not in layers and leaf != "embedding":
            yield names[leaf], *tensor(leaf, None)
