"""GGUF files: logits against float64 NumPy, the row order of queries and keys, the tokenizer, and clear refusals."""

import struct

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from jaxalign.interop import load_pretrained
from jaxalign.interop.gguf import gguf_config, gguf_tokenizer
from jaxalign.interop.gguf_file import GGUFFile
from jaxalign.networks.transformer import RopeScaling

pytest.importorskip("gguf")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("arch", "bias"), [("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("quantized", [(), ("_proj.weight", "embed_tokens.weight")])
def test_logits(arch, bias, tied, quantized, tmp_path):
    """float32 logits agree with float64 NumPy on the dequantised values in their original row order."""
    tensors = tiny.random_tensors(1, bias=bias, tied=tied)
    values = tiny.write_gguf(tmp_path / "m.gguf", tensors, arch=arch, quantized=quantized)
    if quantized:
        assert any(np.any(values[name] != tensors[name]) for name in tensors)
    model = load_pretrained(tmp_path / "m.gguf")
    assert model.config.tie_embeddings is tied
    logits = model.network.apply(model.params, jnp.asarray(tiny.TOKENS))
    np.testing.assert_allclose(logits, tiny.forward(values, tiny.TOKENS), atol=2e-4, rtol=1e-4)


def test_the_row_order_matters(tmp_path):
    """Rows left interleaved would be seen by this tolerance."""
    tensors = tiny.random_tensors(1)
    wrong = {
        name: tiny.interleave(t, tiny.H if "q_" in name else tiny.K) if "q_proj" in name or "k_proj" in name else t
        for name, t in tensors.items()
    }
    assert np.abs(tiny.forward(wrong, tiny.TOKENS) - tiny.forward(tensors, tiny.TOKENS)).max() > 0.1


def test_configuration(tmp_path):
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_tensors(1))
    config = load_pretrained(tmp_path / "m.gguf", remat="none").config
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (tiny.H, tiny.K, tiny.E)
    assert config.rms_norm_epsilon == 1e-5  # not 9.999999747378752e-06, as stored
    assert (config.rope_theta, config.max_length, config.remat) == (10_000.0, 128, "none")


def test_llama3_rope_divisors(tmp_path):
    """The divisors a converter stores are traced back to factor 8, 1, 4, 8192; others are refused."""
    tensors, divisors = tiny.random_tensors(1), tiny.rope_divisors(tiny.LLAMA3)
    assert divisors.max() == 8.0
    tiny.write_gguf(tmp_path / "m.gguf", tensors, rope_freqs=divisors)
    model = load_pretrained(tmp_path / "m.gguf")
    assert model.config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    expected = tiny.forward(tensors, tiny.TOKENS, scaling=tiny.LLAMA3)
    np.testing.assert_allclose(model.network.apply(model.params, jnp.asarray(tiny.TOKENS)), expected, atol=2e-4)
    tiny.write_gguf(tmp_path / "ones.gguf", tensors, rope_freqs=np.ones_like(divisors))
    assert load_pretrained(tmp_path / "ones.gguf").config.rope_scaling is None
    tiny.write_gguf(tmp_path / "odd.gguf", tensors, rope_freqs=np.linspace(1, 8, len(divisors), dtype=np.float32))
    with pytest.raises(ValueError, match=r"odd.gguf: tensor 'rope_freqs.weight' is not the scaling"):
        load_pretrained(tmp_path / "odd.gguf")


def test_tokenizer_equals_the_one_it_was_written_from(tmp_path):
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_tensors(1))
    tokenizer = load_pretrained(tmp_path / "m.gguf").tokenizer
    reference = tiny.small_bpe()
    for text in ("hello wor", "hell<|im_end|>hello", "é 123 121", " w w\nst"):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.vocab_size == tiny.V
    assert tokenizer.render([{"role": "a", "content": "b"}]) == "<|im_start|>a\nb<|im_end|>\n"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġthings", "Ċ", "Ġok"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġthings", "Ċ", "Ġok"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġthings", "Ċ", "Ġok"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġthings", "Ċ", "Ġok"]),
    ],
)
def test_splitting_rules(pre, pieces, tmp_path):
    """How each rule cuts contractions, digits and spaces, worked out by hand from its pattern."""
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_tensors(1), pre=pre)
    tokenizer = gguf_tokenizer(GGUFFile(tmp_path / "m.gguf"))
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("It's 1234 things\n ok")
    assert [piece for piece, _ in cut] == pieces
    # Only llama-bpe opens a text with bos unasked.
    front = [0] if pre == "llama-bpe" else []
    assert tokenizer.encode("st", add_special_tokens=True) == front + tokenizer.encode("st")


def test_bos_and_eos_are_added_where_the_file_says(tmp_path):
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_tensors(1), metadata=flags)
    tokenizer = load_pretrained(tmp_path / "m.gguf").tokenizer
    assert tokenizer.encode("st", add_special_tokens=True) == [0, *tokenizer.encode("st"), 1]
    assert 0 not in tokenizer.encode("st")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "gemma"}, "general.architecture 'gemma' is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not known"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type 'yarn'"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "rope.dimension_count is 8"),
        ({"metadata": {"llama.attention.sliding_window": 64}}, "sliding_window"),
        ({"metadata": {"llama.attention.key_length": 32}}, "attention.value_length is 16"),
    ],
)
def test_unsupported_models_are_refused(kwargs, message, tmp_path):
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_tensors(1), **kwargs)
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(tmp_path / "m.gguf")
    assert "m.gguf" in str(raised.value)


def test_extra_and_missing_tensors_are_named(tmp_path):
    tensors = tiny.random_tensors(1, bias=True)
    tiny.write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ValueError, match=r"m.gguf: tensor 'blk.0.attn_k.bias' has no place"):
        load_pretrained(tmp_path / "m.gguf")
    del tensors["model.layers.1.self_attn.v_proj.bias"]
    tiny.write_gguf(tmp_path / "n.gguf", tensors, arch="qwen2")
    with pytest.raises(ValueError, match=r"n.gguf: no tensor 'blk.1.attn_v.bias' \(1 missing\)"):
        load_pretrained(tmp_path / "n.gguf")


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    tiny.write_gguf(path, tiny.random_tensors(1))
    whole = path.read_bytes()
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match=r"m.gguf: not a GGUF file"):
        load_pretrained(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(ValueError, match="GGUF version 1"):
        load_pretrained(path)
    for cut in (6, 20, 200, 1500, len(whole) - 4000):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"m.gguf: cut short"):
            load_pretrained(path)


def test_every_float_and_common_block_format_is_read(tmp_path):
    """The file's tensors equal what `gguf` itself reads, in each format."""
    import gguf

    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 256)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = GGUFFile(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(x.shape)
        np.testing.assert_array_equal(file.read(tensor.name), expected)
        assert np.abs(expected - x).max() < 0.4  # and it is x, roughly
    assert sorted(file.tensors) == sorted(kinds)


def test_metadata_equals_what_the_package_reads(tmp_path):
    import gguf

    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_tensors(1))
    ours = GGUFFile(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert ours.metadata == {k: f.contents() for k, f in theirs.items() if not k.startswith("GGUF.")}
    assert gguf_config(ours).vocab_size == tiny.V
