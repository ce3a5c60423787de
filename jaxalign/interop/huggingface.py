"""Hugging Face model folders, in and out: config.json, safetensors and tokenizer files."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.interop.safetensor_files import open_safetensors, write_safetensors
from jaxalign.interop.tensor_layout import HUGGING_FACE_NAMES, TensorSource, unstack_params
from jaxalign.interop.tokenizer import Tokenizer
from jaxalign.networks.lora import merge_lora
from jaxalign.networks.transformer import RopeScaling, TransformerConfig
from jaxalign.types import Params

MODEL_TYPES = ("llama", "mistral", "qwen2")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def _rope(raw: dict[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{file}: partial_rotary_factor is not 1; partial RoPE is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{file}: RoPE scaling of type {kind!r} is not supported; 'default' and 'llama3' are")
    if missing := [name for name in RopeScaling._fields if name not in rope]:
        raise ValueError(f"{file}: llama3 RoPE scaling without {missing[0]!r}")
    return theta, RopeScaling(**{name: rope[name] for name in RopeScaling._fields})


def read_config(file: Path) -> TransformerConfig:
    """The TransformerConfig that a config.json describes.

    Raises ValueError naming the file and the entry for an architecture or a feature the Transformer does not have.
    """
    raw = json.loads(file.read_text(encoding="utf-8"))
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"{file}: model_type {kind!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    if raw.get("quantization_config"):
        raise ValueError(f"{file}: quantized weights (quantization_config) are not read; use the full-precision folder")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported; 'silu' is")
    if kind != "qwen2":
        for name in ("attention_bias", "mlp_bias"):
            if raw.get(name):
                raise ValueError(f"{file}: {name} is true; biases are supported on q, k and v of Qwen2 only")
    max_length = raw.get("max_position_embeddings", 2048)
    window = raw.get("sliding_window") if raw.get("use_sliding_window", kind == "mistral") else None
    if window is not None and window < max_length:
        raise ValueError(f"{file}: sliding_window attention ({window}) is not supported")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in needed if name not in raw]:
        raise ValueError(f"{file}: no entry {missing[0]!r}")
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw, file)
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        max_length=max_length,
        rms_norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=kind == "qwen2",
    )


def open_folder(folder: Path) -> tuple[TransformerConfig, TensorSource, Tokenizer | None]:
    """The configuration, weights and tokenizer of a folder; the tokenizer is None if no file belongs to one."""
    file = folder / "config.json"
    if not file.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; give the GGUF file itself: {ggufs[0]}" if ggufs else ""
        raise FileNotFoundError(f"{file} is missing: not a Hugging Face model folder{hint}")
    config = read_config(file)
    source = open_safetensors(folder)
    shapes = dict(source.shapes)
    for name in source.shapes:
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old exporters saved
            del shapes[name]
    if config.tie_embeddings and "lm_head.weight" in shapes:
        if not np.array_equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
            raise ValueError(
                f"{source.where('lm_head.weight')}: tensor 'lm_head.weight' differs from the embedding, "
                f"but {file} says tie_word_embeddings"
            )
        del shapes["lm_head.weight"]
    found = any((folder / name).exists() for name in ("tokenizer.json", *TOKENIZER_FILES))
    tokenizer = Tokenizer.load(folder) if found else None
    return config, TensorSource(shapes, source.read, source.where), tokenizer


def _config_entries(config: TransformerConfig, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    kind, name = ("qwen2", "Qwen2ForCausalLM") if config.attention_bias else ("llama", "LlamaForCausalLM")
    scaling = None if config.rope_scaling is None else {"rope_type": "llama3", **config.rope_scaling._asdict()}
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.rms_norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        **({"use_sliding_window": False} if config.attention_bias else {"attention_bias": False, "mlp_bias": False}),
        "torch_dtype": dtype,
        "bos_token_id": tokenizer and tokenizer.bos_id,
        "eos_token_id": tokenizer and tokenizer.eos_id,
        "pad_token_id": tokenizer and tokenizer.pad_id,
    }


def save_folder(
    folder: Path,
    params: Params,
    config: TransformerConfig,
    tokenizer: Tokenizer | None,
    *,
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    """Write the files of a Hugging Face folder; see `save_pretrained`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save_pretrained: {folder} exists and is not an empty folder; nothing is overwritten")
    if config.lora_rank:
        params = merge_lora(params, scale=config.lora_alpha / config.lora_rank)
    if dtype is None:
        dtype = str(max((leaf.dtype for leaf in jax.tree.leaves(params)), key=lambda d: d.itemsize))
    tensors = list(unstack_params(params, HUGGING_FACE_NAMES))
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed: the folder is there whole or not at all.
    working = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    working.mkdir()
    try:
        entries = _config_entries(config, tokenizer, dtype)
        (working / "config.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(working)
        write_safetensors(working, tensors, dtype=np.dtype(dtype), max_shard_bytes=max_shard_bytes)
        # Some releases of safetensors leave their files readable by the owner alone.
        for file in working.iterdir():
            file.chmod((working / "config.json").stat().st_mode)
        if folder.exists():
            folder.rmdir()
        os.rename(working, folder)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
