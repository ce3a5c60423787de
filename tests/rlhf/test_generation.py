"""Generation against the full forward pass, filters against NumPy, draws against the distribution they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.networks import TransformerConfig, transformer
from jaxalign.preferences import token_log_probs
from jaxalign.rlhf.generation import continue_text, generate, greedy
from jaxalign.rlhf.sampling import min_p_filter, top_k_filter, top_p_filter

SIZES = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2}
SIZES |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
PROMPTS = np.random.default_rng(0).integers(0, 13, (3, 5))
LENGTHS = np.array([5, 2, 1])


def build(dtype="float32"):
    model = transformer(TransformerConfig(**SIZES, dtype=dtype))
    # Larger weights than at initialisation: distributions that differ from position to position.
    return model, jax.tree.map(lambda x: (12.0 * x).astype(dtype) if x.ndim > 2 else x.astype(dtype),
                               jax.jit(model.init)(jax.random.key(0)))  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def sampled(model):
    network, params = model

    @jax.jit
    def run(key, params, prompts, lengths, temperature, top_k, top_p, min_p):
        run.traces += 1
        return generate(
            key, network, params, prompts, lengths, max_new_tokens=6, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, stop_ids=(3, 7), samples=4, pad_id=11,
        )  # fmt: skip

    run.traces = 0
    return run, params


def off_by(network, params, out, temperature):
    """The largest difference to log-probabilities recomputed from the whole sequences."""
    again = token_log_probs(network.apply(params, out.tokens) / temperature, out.tokens)
    return np.abs(np.where(out.mask[:, 1:], again - out.log_probs[:, 1:], 0.0)).max()


def test_log_probs_are_those_of_the_full_pass_and_rows_end_where_they_should(model, sampled):
    run, params = sampled
    for number, settings in enumerate([(1.0, 13, 1.0, 0.0), (0.7, 5, 0.8, 0.1)]):
        out = run(jax.random.key(number), params, PROMPTS, LENGTHS, *settings)
        assert off_by(*model, out, settings[0]) < 1e-4
        assert out.tokens.shape == (12, 11)
        for row in range(12):
            prompt, length = PROMPTS[row // 4], LENGTHS[row // 4]
            tokens = np.asarray(out.tokens[row])
            np.testing.assert_array_equal(tokens[:length], prompt[:length])
            stops = [t for t in range(length, length + 6) if tokens[t] in (3, 7)]
            end = stops[0] + 1 if stops else length + 6
            assert bool(out.ended[row]) == bool(stops)
            np.testing.assert_array_equal(out.mask[row], (np.arange(11) >= length) & (np.arange(11) < end))
            assert (tokens[end:] == 11).all()
            assert (np.asarray(out.log_probs[row])[~np.asarray(out.mask[row])] == 0).all()
        assert 0 < out.ended.sum() < 12
    assert run.traces == 1  # nothing of it is a constant of the program


def test_log_probs_in_double_precision():
    with jax.enable_x64(True):
        network, params = build("float64")
        out = jax.jit(lambda: generate(
            jax.random.key(0), network, params, PROMPTS, LENGTHS, max_new_tokens=4, temperature=1.3
        ))()  # fmt: skip
        assert out.log_probs.dtype == jnp.float64
        # Not 1e-9: `apply` takes the softmax of its attention in float32 whatever the type of the rest.
        assert off_by(network, params, out, 1.3) < 1e-8


def test_seeds_can_be_vmapped(sampled):
    run, params = sampled
    keys = jax.random.split(jax.random.key(5), 2)
    settings = (PROMPTS, LENGTHS, 0.9, 9, 0.9, 0.05)
    both = jax.vmap(lambda key: run(key, params, *settings))(keys)
    for i in range(2):
        alone = run(keys[i], params, *settings)
        np.testing.assert_array_equal(both.tokens[i], alone.tokens)
        np.testing.assert_allclose(both.log_probs[i], alone.log_probs, atol=1e-5)


def test_greedy_tokens_are_the_argmax_of_the_full_pass_whatever_the_padding(model):
    network, params = model
    out = jax.jit(lambda prompts: greedy(network, params, prompts, LENGTHS, max_new_tokens=5))(PROMPTS)
    expected = network.apply(params, out.tokens).argmax(-1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(out.tokens[row, length : length + 5], expected[row, length - 1 : length + 4])
    assert off_by(network, params, out, 1.0) < 1e-4
    junk = np.where(np.arange(5)[None, :] < LENGTHS[:, None], PROMPTS, 12)
    junk = np.pad(junk, ((0, 0), (0, 3)))
    padded = jax.jit(lambda prompts: greedy(network, params, prompts, LENGTHS, max_new_tokens=5))(junk)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(padded.tokens[row, : length + 5], out.tokens[row, : length + 5])


def test_a_cold_draw_is_greedy_and_a_cache_goes_on_where_it_stopped(model):
    network, params = model
    params = network.for_decoding(params)
    whole = jax.jit(lambda: greedy(network, params, PROMPTS, LENGTHS, max_new_tokens=6))()
    cold = jax.jit(lambda: generate(
        jax.random.key(0), network, params, PROMPTS, LENGTHS, max_new_tokens=6, temperature=1e-5
    ))()  # fmt: skip
    np.testing.assert_array_equal(cold.tokens, whole.tokens)

    _, cache = jax.jit(network.decode)(params, PROMPTS, network.init_cache(3, 12))
    part = jax.jit(lambda last, cache: continue_text(None, network, params, last, cache, max_new_tokens=3))
    last = jnp.take_along_axis(jnp.asarray(PROMPTS), LENGTHS[:, None] - 1, axis=1)[:, 0]
    first, cache = part(last, cache._replace(length=jnp.asarray(LENGTHS - 1)))
    second, cache = part(first.tokens[:, -1], cache)
    pieces = np.concatenate([first.tokens, second.tokens], axis=1)
    np.testing.assert_array_equal(pieces, [whole.tokens[b, n : n + 6] for b, n in enumerate(LENGTHS)])
    np.testing.assert_array_equal(cache.length, LENGTHS + 5)


def test_draws_follow_the_softmax(model):
    """Pearson's chi-squared over 4,000 first tokens stays below its 99.9 % point."""
    from scipy.stats import chi2

    network, params = model
    out = jax.jit(lambda: generate(
        jax.random.key(3), network, params, PROMPTS[:1], LENGTHS[:1], max_new_tokens=1, temperature=1.5, samples=4000
    ))()  # fmt: skip
    counts = np.bincount(np.asarray(out.tokens[:, 5]), minlength=13)
    expected = 4000 * np.asarray(jax.nn.softmax(network.apply(params, PROMPTS[:1])[0, -1] / 1.5), np.float64)
    often = expected > 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert often.sum() > 3
    assert statistic < chi2.ppf(0.999, often.sum() - 1)


LOGITS = np.random.default_rng(1).normal(0, 2, (4, 9)).astype(np.float32)


def numpy_filter(kept):
    return np.where(kept, LOGITS, -np.inf)


@pytest.mark.parametrize("k", [1, 3, 9, 20])
def test_top_k(k):
    rank = (-LOGITS).argsort(1).argsort(1)
    np.testing.assert_array_equal(jax.jit(top_k_filter)(LOGITS, k), numpy_filter(rank < k))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.999, 1.0])
def test_top_p(p):
    kept = np.zeros(LOGITS.shape, bool)
    for row, logits in enumerate(LOGITS.astype(np.float64)):
        mass, weights = 0.0, np.exp(logits) / np.exp(logits).sum()
        for token in (-logits).argsort():
            if mass < p:
                kept[row, token] = True
            mass += weights[token]
    np.testing.assert_array_equal(jax.jit(top_p_filter)(LOGITS, p), numpy_filter(kept))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(p):
    weights = np.exp(LOGITS.astype(np.float64))
    kept = weights >= p * weights.max(1, keepdims=True)
    np.testing.assert_array_equal(jax.jit(min_p_filter)(LOGITS, p), numpy_filter(kept))


def test_filters_by_hand():
    logits = np.log([[0.5, 0.25, 0.15, 0.1]])
    for out, count in ((top_k_filter(logits, 2), 2), (top_p_filter(logits, 0.8), 3), (min_p_filter(logits, 0.29), 3)):
        np.testing.assert_array_equal(np.isfinite(out[0]), np.arange(4) < count)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"temperature": 0.0}, "above 0; `greedy`"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"prompt_lengths": np.array([5, 0, 1])}, r"prompt_lengths\[1\] is 0"),
        ({"prompt_lengths": np.array([5, 2, 6])}, r"prompt_lengths\[2\] is 6.*1 \.\. 5"),
        ({"prompts": PROMPTS * 1.0}, "integers"),
        ({"max_length": 8}, "5 positions and 4 new tokens exceed"),
    ],
)
def test_impossible_requests_are_named(model, options, message):
    arguments = {"prompts": PROMPTS, "prompt_lengths": LENGTHS, "max_new_tokens": 4, **options}
    prompts, lengths = arguments.pop("prompts"), arguments.pop("prompt_lengths")
    with pytest.raises(ValueError, match=message):
        generate(jax.random.key(0), *model, prompts, lengths, **arguments)
