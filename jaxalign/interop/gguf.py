"""llama.cpp's GGUF models: metadata to configuration and tokenizer, tensors to a TensorSource."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.extras import lm_extra
from jaxalign.interop.gguf_file import GGUFFile
from jaxalign.interop.tensor_layout import TensorSource
from jaxalign.interop.tokenizer import Tokenizer
from jaxalign.networks.transformer import RopeScaling, TransformerConfig, rope_frequencies

ARCHITECTURES = ("llama", "qwen2")
ROPE_FACTORS = "rope_freqs.weight"
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + WORDS_AND_SPACE
LLAMA3_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + WORDS_AND_SPACE


class _Splitting(NamedTuple):
    """How text is cut before byte-pair merging.

    steps: `tokenizers` -> its pre-tokenizers
    nfc: whether text is first put in Unicode's composed form
    ignore_merges: whether a whole piece that is in the vocabulary is taken as it is
    add_bos: whether a bos opens each text where the file does not say
    """

    steps: Callable[[Any], list[Any]]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _by_pattern(pattern: str) -> Callable[[Any], list[Any]]:
    def steps(tokenizers: Any) -> list[Any]:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        return [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    return steps


def _gpt2(tokenizers: Any) -> list[Any]:
    return [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _smollm(tokenizers: Any) -> list[Any]:
    return [tokenizers.pre_tokenizers.Digits(individual_digits=True), *_gpt2(tokenizers)]


SPLITTINGS = {  # by tokenizer.ggml.pre
    "smollm": _Splitting(_smollm),
    "gpt-2": _Splitting(_gpt2),
    "qwen2": _Splitting(_by_pattern(QWEN2_PATTERN), nfc=True),
    "llama-bpe": _Splitting(_by_pattern(LLAMA3_PATTERN), ignore_merges=True, add_bos=True),
}


def gguf_config(file: GGUFFile) -> TransformerConfig:
    """The TransformerConfig of a GGUF file's metadata.

    Raises ValueError naming the file and the key for an architecture or feature the Transformer does not have.
    """
    metadata, path = file.metadata, file.path
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path}: general.architecture {kind!r} is not supported; supported are {ARCHITECTURES}")

    def entry(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise ValueError(f"{path}: no metadata {kind}.{name}")
        if isinstance(value, list):
            raise ValueError(f"{path}: {kind}.{name} differs by layer; only uniform layers are supported")
        # Floats are stored in single precision: take the shortest decimal, 1e-5 and not 9.99999974e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    heads, width, length = entry("attention.head_count"), entry("embedding_length"), entry("context_length")
    head_dim = entry("attention.key_length", width // heads)
    if entry("expert_count", 0):
        raise ValueError(f"{path}: {kind}.expert_count: mixtures of experts are not supported")
    for name, default in (("attention.value_length", width // heads), ("rope.dimension_count", head_dim)):
        if (size := entry(name, default)) != head_dim:
            raise ValueError(f"{path}: {kind}.{name} is {size}; it must equal the key size {head_dim}")
    if entry("rope.scaling.type", "none") != "none":
        raise ValueError(f"{path}: {kind}.rope.scaling.type {entry('rope.scaling.type')!r} is not supported")
    if entry("attention.sliding_window", length) < length:
        raise ValueError(f"{path}: {kind}.attention.sliding_window is not supported")
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in file.tensors:
            raise ValueError(f"{path}: no tensor {name!r}")
    theta = entry("rope.freq_base", 10_000.0)
    return TransformerConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=entry("feed_forward_length"),
        num_layers=entry("block_count"),
        num_heads=heads,
        num_kv_heads=entry("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim, theta),
        max_length=length,
        rms_norm_epsilon=entry("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        attention_bias=kind == "qwen2",
    )


def _rope_scaling(file: GGUFFile, head_dim: int, theta: float) -> RopeScaling | None:
    """The llama3 scaling behind the per-frequency divisors [head_dim / 2] that a GGUF holds in its place.

    The divisors do not give it uniquely, so it is looked for among what Llama 3.1 to 3.3 use (any factor; 1, 4, 8192)
    and checked against all of them.
    """
    if ROPE_FACTORS not in file.tensors:
        return None
    divisors = file.read(ROPE_FACTORS)
    if np.all(divisors == 1.0):
        return None
    scaling = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
    expected = np.asarray(rope_frequencies(head_dim, theta)) / np.asarray(rope_frequencies(head_dim, theta, scaling))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(f"{file.path}: tensor {ROPE_FACTORS!r} is not the scaling of Llama 3.1 to 3.3")
    return scaling


def gguf_source(file: GGUFFile, config: TransformerConfig) -> TensorSource:
    """The weights of a GGUF file in Hugging Face's row order.

    For llama models, the converter interleaves the two halves of each query and key head's rows, because llama.cpp
    rotates neighbouring coordinates; here row i is paired with row i + head_dim/2, so the rows are put back.
    """
    interleaved = file.metadata["general.architecture"] == "llama"

    def read(name: str) -> np.ndarray:
        tensor = file.read(name)
        if interleaved and name.endswith(("attn_q.weight", "attn_k.weight")):
            pairs = tensor.reshape(-1, config.head_dim // 2, 2, tensor.shape[-1])
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
        return tensor

    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
    return TensorSource(shapes, read, lambda name: str(file.path))


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF file's metadata.

    Raises ValueError naming the file for other models (SentencePiece) and for splitting rules it does not know.
    """
    tokenizers = lm_extra("tokenizers")
    metadata, path = file.metadata, file.path
    model, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise ValueError(f"{path}: tokenizer.ggml.model {model!r} is not read, only 'gpt2'; use the safetensors folder")
    if rule not in SPLITTINGS:
        raise ValueError(f"{path}: tokenizer.ggml.pre {rule!r} is not known; known are {', '.join(SPLITTINGS)}")
    for name in ("tokens", "merges", "token_type"):
        if f"tokenizer.ggml.{name}" not in metadata:
            raise ValueError(f"{path}: no metadata tokenizer.ggml.{name}")
    tokens, splitting = metadata["tokenizer.ggml.tokens"], SPLITTINGS[rule]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens holds a token twice")
    # A merge is two pieces around a space; no byte-level piece holds one.
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        bpe = tokenizers.models.BPE(vocabulary, merges, ignore_merges=splitting.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: the tokenizer's merges do not fit its tokens: {error}") from error
    backend = tokenizers.Tokenizer(bpe)
    if splitting.nfc:
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splitting.steps(tokenizers))
    backend.decoder = tokenizers.decoders.ByteLevel()
    for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
            backend.add_special_tokens([added]) if kind == CONTROL else backend.add_tokens([added])

    def token_of(role: str) -> str | None:
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(f"{path}: tokenizer.ggml.{role}_token_id {number} is outside the vocabulary")
        return None if number is None else tokens[number]

    bos, eos = token_of("bos"), token_of("eos")
    front = [bos] if bos and metadata.get("tokenizer.ggml.add_bos_token", splitting.add_bos) else []
    back = [eos] if eos and metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if front or back:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*front, "$A", *back],
            pair=[*front, "$A", *back, *front, "$B:1", *back],
            special_tokens=[(token, vocabulary[token]) for token in (*front, *back)],
        )
    settings = {"model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length")}
    return Tokenizer(
        backend,
        bos_token=bos,
        eos_token=eos,
        pad_token=token_of("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
        settings={key: value for key, value in settings.items() if value is not None},
    )
