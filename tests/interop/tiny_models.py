"""Tiny checkpoints on disk, written without the library under test, and their logits in float64 NumPy."""

import json
import math

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

V, D, F, L, H, K, E = 40, 64, 96, 2, 4, 2, 16
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
TOKENS = np.array([[3, 17, 5, 5, 39, 0, 21, 8, 1], [9, 9, 2, 30, 11, 4, 4, 4, 7]])


def random_tensors(seed, *, bias=False, tied=False):
    """Tensors in Hugging Face's names and [out, in] order, float32."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(L):
        p = f"model.layers.{i}."
        for name, rows in (("q", H * E), ("k", K * E), ("v", K * E)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, D)
            if bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes[p + "self_attn.o_proj.weight"] = (D, H * E)
        shapes[p + "mlp.gate_proj.weight"] = shapes[p + "mlp.up_proj.weight"] = (F, D)
        shapes[p + "mlp.down_proj.weight"] = (D, F)
        shapes[p + "input_layernorm.weight"] = shapes[p + "post_attention_layernorm.weight"] = (D,)
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    scale = {1: 0.5, 2: 0.25}
    return {n: (rng.normal(size=s) * scale[len(s)] + ("norm" in n)).astype(np.float32) for n, s in shapes.items()}


def forward(tensors, tokens, *, theta=10_000.0, scaling=None, epsilon=1e-5):
    """Logits [B, T, V] in float64, one position and one head at a time."""
    w = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * scale

    def rotate(x, t):  # [E], coordinate i turned with i + E/2
        out = x.copy()
        for i in range(E // 2):
            f = theta ** (-2 * i / E)
            if scaling is not None:
                wavelength = 2 * math.pi / f
                low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
                high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
                if wavelength > low:
                    f /= scaling["factor"]
                elif wavelength > high:
                    s = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                        scaling["high_freq_factor"] - scaling["low_freq_factor"]
                    )
                    f = (1 - s) * f / scaling["factor"] + s * f
            c, s = math.cos(t * f), math.sin(t * f)
            out[i], out[i + E // 2] = x[i] * c - x[i + E // 2] * s, x[i + E // 2] * c + x[i] * s
        return out

    def attend(x, p):
        def project(name):
            y = x @ w[f"{p}{name}_proj.weight"].T + w.get(f"{p}{name}_proj.bias", 0.0)
            return y.reshape(len(x), -1, E)

        q, k, v = project("q"), project("k"), project("v")
        out = np.zeros((len(x), H, E))
        for h in range(H):
            g = h // (H // K)
            keys = np.stack([rotate(k[t, g], t) for t in range(len(x))])
            for t in range(len(x)):
                scores = keys[: t + 1] @ rotate(q[t, h], t) / math.sqrt(E)
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ v[: t + 1, g]
        return out.reshape(len(x), -1) @ w[p + "o_proj.weight"].T

    rows = []
    for row in tokens:
        x = w["model.embed_tokens.weight"][row]
        for i in range(L):
            p = f"model.layers.{i}."
            x = x + attend(norm(x, w[p + "input_layernorm.weight"]), p + "self_attn.")
            y = norm(x, w[p + "post_attention_layernorm.weight"])
            gate = y @ w[p + "mlp.gate_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (y @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        rows.append(norm(x, w["model.norm.weight"]) @ head.T)
    return np.stack(rows)


def config_json(**changes):
    """The entries of a config.json for these sizes; None removes one."""
    entries = {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        **changes,
    }
    return {name: value for name, value in entries.items() if value is not None}


def write_folder(folder, tensors, *, config, shards=1, dtype=np.float32, tokenizer=True):
    """A Hugging Face folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.ascontiguousarray(tensor.astype(dtype)) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names, weight_map = list(tensors), {}
        for i in range(shards):
            part, file = names[i::shards], f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: tensors[name] for name in part}, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if tokenizer:
        small_bpe().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": TEMPLATE})
        )


VOCABULARY = ["<|im_start|>", "<|im_end|>", "<unk>", *"abcdehlorstuw0123", "Ġ", "Ċ", "Ã", "©", "he", "ll", "hell"]
VOCABULARY += ["hello", "Ġw", "or", "Ġwor", "12", "st", "123"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "s t", "12 3"]
TEMPLATE = (
    "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "\n{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def small_bpe():
    """A byte-level BPE over VOCABULARY and MERGES, split as GPT-2 does."""
    bpe = models.BPE({token: i for i, token in enumerate(VOCABULARY)}, [tuple(m.split()) for m in MERGES])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in VOCABULARY[:3]])
    return tokenizer


GGUF_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"
    return f"{GGUF_PARTS[stem]}.{kind}"


def interleave(weight, heads):
    """What llama.cpp's converter does to query and key rows: row i of a head's first half, then row i of its second."""
    out = np.empty_like(weight)
    half = weight.shape[0] // heads // 2
    for head in range(heads):
        for i in range(half):
            out[2 * (head * half + i)] = weight[2 * head * half + i]
            out[2 * (head * half + i) + 1] = weight[2 * head * half + half + i]
    return out


def write_gguf(path, tensors, *, arch="llama", quantized=(), rope_freqs=None, metadata=None, pre="gpt-2"):
    """A GGUF file by the `gguf` package; returns the tensors as their quantised values, in Hugging Face's names."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    padding = [f"[PAD{i}]" for i in range(V - len(VOCABULARY))]
    writer.add_token_list(VOCABULARY + padding)
    writer.add_token_types([3] * 3 + [1] * (len(VOCABULARY) - 3) + [5] * len(padding))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for key, value in (metadata or {}).items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        (add if isinstance(value, int) else writer.add_string)(key, value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    values = {}
    for name, tensor in tensors.items():
        stored = tensor
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = interleave(tensor, H if "q_proj" in name else K)
        values[name] = tensor
        if tensor.ndim == 2 and name.endswith(tuple(quantized)) and quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            values[name] = gguf.dequantize(gguf.quantize(tensor, kind), kind)  # blocks lie within a row
            writer.add_tensor(gguf_name(name), gguf.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def rope_divisors(scaling):
    """The `rope_freqs.weight` [E / 2] that llama.cpp's converter writes for llama3 scaling."""
    out = []
    for i in range(E // 2):
        wavelength = 2 * math.pi * 10_000.0 ** (2 * i / E)
        low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
        high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(scaling["factor"])
        else:
            s = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            out.append(1 / ((1 - s) / scaling["factor"] + s))
    return np.array(out, np.float32)


