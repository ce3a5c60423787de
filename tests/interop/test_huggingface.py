"""Hugging Face folders: logits against float64 NumPy, round trips, and errors that name the file and the tensor."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models as tiny

from jaxalign.interop import ByteTokenizer, Pretrained, load_pretrained, save_pretrained
from jaxalign.networks.transformer import RopeScaling

ROPE_PARAMETERS = {"rope_type": "llama3", "rope_theta": 500.0, **tiny.LLAMA3}
VARIANTS = {
    "llama": dict(config={}),
    "tied": dict(config={"tie_word_embeddings": True}, tied=True),
    "qwen2": dict(config={"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, bias=True),
    "llama3": dict(config={"rope_scaling": {"type": "llama3", **tiny.LLAMA3}, "rope_theta": 500.0}, theta=500.0),
    "llama3, new entry": dict(config={"rope_parameters": ROPE_PARAMETERS, "rope_theta": None}, theta=500.0),
    "default, new entry": dict(config={"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, theta=500.0),
    "sharded": dict(config={}, shards=3),
    "bfloat16": dict(config={"torch_dtype": "bfloat16"}, dtype=ml_dtypes.bfloat16),
    "float16, sharded": dict(config={"mlp_bias": False}, dtype=np.float16, shards=2),
    "mistral": dict(config={"model_type": "mistral", "sliding_window": None, "head_dim": 16}),
}


def make(folder, *, config, theta=10_000.0, bias=False, tied=False, shards=1, dtype=np.float32):
    tensors = tiny.random_tensors(0, bias=bias, tied=tied)
    tiny.write_folder(folder, tensors, config=tiny.config_json(**config), shards=shards, dtype=dtype)
    stored = {name: tensor.astype(dtype).astype(np.float64) for name, tensor in tensors.items()}
    scaling = tiny.LLAMA3 if "llama3" in json.dumps(config) else None
    return tiny.forward(stored, tiny.TOKENS, theta=theta, scaling=scaling)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_round_trip(variant, tmp_path):
    """float32 logits agree with float64 NumPy on the stored values, and saving gives the same tensors back."""
    expected = make(tmp_path / "in", **VARIANTS[variant])
    model = load_pretrained(tmp_path / "in")
    logits = model.network.apply(model.params, jnp.asarray(tiny.TOKENS))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=2e-4, rtol=1e-4)

    save_pretrained(tmp_path / "out", model, max_shard_bytes=60_000 if "sharded" in variant else 10**9)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == ("sharded" in variant)
    again = load_pretrained(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.tokenizer.encode("hello wor<|im_end|>") == model.tokenizer.encode("hello wor<|im_end|>")


def test_the_numpy_reference_sees_rope_scaling():
    """The reference moves by far more than the tolerance when theta or the scaling changes: neither is idle."""
    tensors = tiny.random_tensors(0)
    plain = tiny.forward(tensors, tiny.TOKENS, theta=500.0)
    near = {**tiny.LLAMA3, "original_max_position_embeddings": 64}
    assert np.abs(tiny.forward(tensors, tiny.TOKENS, theta=500.0, scaling=near) - plain).max() > 0.05
    assert np.abs(tiny.forward(tensors, tiny.TOKENS, theta=1e4) - plain).max() > 0.05


def test_short_context_rope_scaling(tmp_path):
    """With an original context of 64 positions the scaling bends most frequencies."""
    scaling = {**tiny.LLAMA3, "original_max_position_embeddings": 64}
    tensors = tiny.random_tensors(3)
    tiny.write_folder(tmp_path / "m", tensors, config=tiny.config_json(rope_scaling={"rope_type": "llama3", **scaling}))
    model = load_pretrained(tmp_path / "m")
    assert model.config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64)
    expected = tiny.forward(tensors, tiny.TOKENS, scaling=scaling)
    np.testing.assert_allclose(
        model.network.apply(model.params, jnp.asarray(tiny.TOKENS)), expected, atol=2e-4, rtol=1e-4
    )


def test_layout(tmp_path):
    """Kernels are stacked and transposed, everything else only stacked."""
    make(tmp_path / "m", config={})
    tensors, params = tiny.random_tensors(0), load_pretrained(tmp_path / "m").params
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert up.shape == (tiny.L, tiny.D, tiny.F)
    np.testing.assert_array_equal(up[1], tensors["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(params["unembedding"], tensors["lm_head.weight"])


def test_overrides_dtype_and_adapters(tmp_path):
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m", param_dtype="bfloat16", lora_rank=2, dtype="bfloat16")
    q = model.params["layers"]["attention"]["q"]
    assert q["kernel"].dtype == jnp.bfloat16
    assert q["lora_a"].shape == (tiny.L, tiny.D, 2)
    assert not jnp.any(q["lora_b"])
    assert model.config.dtype == "bfloat16"
    other = load_pretrained(tmp_path / "m", lora_rank=2, key=jax.random.key(1)).params["layers"]["attention"]["q"]
    assert jnp.any(other["lora_a"] != q["lora_a"])
    with pytest.raises(TypeError, match="no field 'lora_ranks'"):
        load_pretrained(tmp_path / "m", lora_ranks=2)


def test_saving_merges_adapters(tmp_path):
    """kernel + alpha / rank * a @ b is what is written, and it computes what the adapted model does."""
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m", lora_rank=2, lora_alpha=6.0)
    params = jax.tree.map(lambda x: x, model.params)
    params["layers"]["attention"]["v"]["lora_b"] = jnp.full((tiny.L, 2, tiny.K * tiny.E), 0.1)
    save_pretrained(tmp_path / "out", model._replace(params=params))
    merged = load_pretrained(tmp_path / "out")
    v = params["layers"]["attention"]["v"]
    np.testing.assert_allclose(
        merged.params["layers"]["attention"]["v"]["kernel"], v["kernel"] + 3.0 * v["lora_a"] @ v["lora_b"], atol=1e-6
    )
    tokens = jnp.asarray(tiny.TOKENS)
    adapted = model.network.apply(params, tokens)
    assert jnp.abs(adapted - model.network.apply(model.params, tokens)).max() > 0.1
    np.testing.assert_allclose(merged.network.apply(merged.params, tokens), adapted, atol=2e-4)
    with pytest.raises(ValueError, match="lora_a' has no place"):
        save_pretrained(tmp_path / "bad", (params, load_pretrained(tmp_path / "m").config, None))
    assert not (tmp_path / "bad").exists()


def test_non_contiguous_arrays_are_saved_as_they_read(tmp_path):
    """Some releases of safetensors write a strided array's buffer as it lies; ours must come back equal."""
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m")
    strided = jax.tree.map(lambda x: np.asfortranarray(np.asarray(x)), model.params)
    assert not strided["embedding"].flags.c_contiguous
    save_pretrained(tmp_path / "out", (strided, model.config, None))
    again = load_pretrained(tmp_path / "out")
    assert again.tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_saving_in_bfloat16(tmp_path):
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m")
    save_pretrained(tmp_path / "out", model, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_pretrained(tmp_path / "out").params["embedding"]
    np.testing.assert_array_equal(again, model.params["embedding"].astype(jnp.bfloat16).astype(jnp.float32))
    narrow = load_pretrained(tmp_path / "m", param_dtype="bfloat16")
    save_pretrained(tmp_path / "narrow", narrow)
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_pretrained(tmp_path / "m", model)
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", model)
    assert len({file.stat().st_mode for file in (tmp_path / "empty").iterdir()}) == 1

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path / "full", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m"]


def test_frozen_leaves_must_be_put_back(tmp_path):
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"'embedding' is None.*all_params"):
        save_pretrained(tmp_path / "out", (dict(model.params, embedding=None), model.config, None))
    with pytest.raises(TypeError, match="a ByteTokenizer has no Hugging Face files"):
        save_pretrained(tmp_path / "out", (model.params, model.config, ByteTokenizer()))
    with pytest.raises(ValueError, match="dtype must be a float type"):
        save_pretrained(tmp_path / "out", model, dtype="int32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"model_type": "mistral", "sliding_window": 64}, r"sliding_window attention \(64\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "without 'low_freq_factor'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"hidden_size": None}, "no entry 'hidden_size'"),
        ({"intermediate_size": 64}, r"down_proj.weight' is \(64, 96\), the configuration says \(64, 64\)"),
        ({"num_hidden_layers": 3}, r"no tensor 'model.layers.2.self_attn.k_proj.weight' \(9 missing\)"),
        ({"num_hidden_layers": 1}, r"'model.layers.1.input_layernorm.weight' has no place"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from the embedding"),
    ],
)
def test_unsupported_configurations_are_refused(change, message, tmp_path):
    make(tmp_path / "m", config=change)
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(tmp_path / "m")
    assert str(tmp_path / "m") in str(raised.value)


def test_a_tied_head_stored_twice_and_old_rotary_constants_are_read(tmp_path):
    tensors = tiny.random_tensors(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tiny.write_folder(tmp_path / "m", tensors, config=tiny.config_json(tie_word_embeddings=True))
    assert "unembedding" not in load_pretrained(tmp_path / "m").params


def test_broken_files_are_named(tmp_path):
    make(tmp_path / "m", config={}, shards=2)
    first, second = sorted((tmp_path / "m").glob("*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors: cut short: tensor"):
        load_pretrained(tmp_path / "m")
    first.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors: not a safetensors file"):
        load_pretrained(tmp_path / "m")
    first.write_bytes((12).to_bytes(8, "little") + b'{"a": "b"}  ')
    with pytest.raises(ValueError, match="its header is not what the format says"):
        load_pretrained(tmp_path / "m")
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors: no tensor 'model.embed_tokens.weight'"):
        load_pretrained(tmp_path / "m")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00002.safetensors, which is not in the folder"):
        load_pretrained(tmp_path / "m")


def test_missing_files_are_named(tmp_path):
    make(tmp_path / "m", config={})
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        load_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "m.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing.*give the GGUF file itself"):
        load_pretrained(tmp_path / "m")


def test_integer_weights_are_refused_by_name(tmp_path):
    tensors = tiny.random_tensors(0)
    tiny.write_folder(tmp_path / "m", tensors, config=tiny.config_json(), dtype=np.int8)
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'model.embed_tokens.weight' is I8"):
        load_pretrained(tmp_path / "m")


def test_pretrained_trains_from_its_weights(tmp_path):
    """`network.starting_from(params)` gives the loaded leaves back, so any algorithm starts there."""
    make(tmp_path / "m", config={})
    model = load_pretrained(tmp_path / "m")
    assert isinstance(model, Pretrained)
    again = model.network.starting_from(model.params).init(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, again, model.params)
