"""Token, sequence and chunked log-probabilities: hand numbers, NumPy float64, and chunked against unchunked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxalign.preferences import (
    chunked_log_probs_and_entropy,
    chunked_sequence_log_probs,
    chunked_token_log_probs,
    sequence_entropy,
    sequence_log_probs,
    token_log_probs,
)

B, T, D, V = 3, 9, 5, 11


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    mask = np.zeros((B, T), np.float32)
    mask[0, 4:8], mask[1, 1:] = 1, 1  # row 2 stays empty
    return hidden, unembedding, tokens, mask


def unchunked(hidden, unembedding, tokens, mask, **options):
    return sequence_log_probs(hidden @ unembedding.T, tokens, mask, **options)


def test_token_log_probs_by_hand():
    # Odds 3:1 for token 1 at the first position, 1:1 at the second; the last position scores nothing.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [1.0, 9.0]]]))
    np.testing.assert_allclose(token_log_probs(logits, jnp.array([[0, 1, 0]])), np.log([[0.75, 0.5]]), rtol=1e-6)


def test_token_log_probs_match_scipy(problem):
    hidden, unembedding, tokens, _ = problem
    logits = 30 * hidden @ unembedding.T
    expected = np.take_along_axis(scipy.special.log_softmax(logits, axis=-1)[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(token_log_probs(logits, tokens), expected, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        assert token_log_probs(logits, tokens).dtype == jnp.float64
        np.testing.assert_allclose(token_log_probs(logits, tokens), expected, rtol=1e-13, atol=1e-13)


def test_half_precision_logits_are_normalised_in_float32():
    logits = jnp.zeros((1, 2, 1000), jnp.bfloat16)
    out = token_log_probs(logits, jnp.zeros((1, 2), jnp.int32))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, -np.log(1000), rtol=1e-6)  # bfloat16 would be off by up to 0.016


def test_sequence_log_probs_sum_the_completion_only(problem):
    hidden, unembedding, tokens, mask = problem
    logits = hidden @ unembedding.T
    token_logps = np.asarray(token_log_probs(logits, tokens))
    expected = [token_logps[0, 3:7].sum(), token_logps[1].sum(), 0.0]
    np.testing.assert_allclose(sequence_log_probs(logits, tokens, mask), expected, rtol=1e-6)
    lengths = np.array([4, 8, 1])
    np.testing.assert_allclose(sequence_log_probs(logits, tokens, mask, average=True), expected / lengths, rtol=1e-6)
    np.testing.assert_allclose(sequence_log_probs(logits, tokens, mask != 0), expected, rtol=1e-6)


def test_padding_and_prompt_do_not_change_the_value(problem):
    hidden, unembedding, tokens, mask = problem
    logits = hidden @ unembedding.T
    padded = jnp.pad(logits, ((0, 0), (0, 3), (0, 0)), constant_values=7.0)
    padded_tokens, padded_mask = jnp.pad(tokens, ((0, 0), (0, 3))), jnp.pad(mask, ((0, 0), (0, 3)))
    expected = sequence_log_probs(logits, tokens, mask)
    np.testing.assert_allclose(sequence_log_probs(padded, padded_tokens, padded_mask), expected, rtol=1e-6)
    first_marked = mask.copy()
    first_marked[:, 0] = 1
    np.testing.assert_array_equal(sequence_log_probs(logits, tokens, first_marked), expected)


@pytest.mark.parametrize("average", [False, True])
def test_empty_rows_and_impossible_masked_tokens_leave_finite_gradients(problem, average):
    hidden, unembedding, tokens, mask = problem
    logits = jnp.asarray(hidden @ unembedding.T).at[0, 0, tokens[0, 1]].set(-jnp.inf)
    score = functools.partial(sequence_log_probs, average=average)
    value, gradient = jax.value_and_grad(lambda x: score(x, tokens, mask).sum())(logits)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
    assert not gradient[2].any()


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 12, 100])
@pytest.mark.parametrize("average", [False, True])
def test_chunked_equals_unchunked_in_float64(problem, chunk_size, average):
    hidden, unembedding, tokens, mask = problem
    mask = mask * np.random.default_rng(1).uniform(0.5, 2.0, mask.shape)  # weights, not only 0 and 1
    upstream = np.array([1.0, -2.0, 3.0])

    def values_and_gradients(score):
        def scalar(h, w):
            out = score(h, w, tokens, mask, average=average)
            return (upstream * out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(hidden, unembedding)
        return out, *gradients

    with jax.enable_x64(True):
        chunked = values_and_gradients(functools.partial(chunked_sequence_log_probs, chunk_size=chunk_size))
        for ours, expected in zip(chunked, values_and_gradients(unchunked), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_chunked_value_without_gradients_equals_the_value_with_them(problem):
    hidden, unembedding, tokens, mask = problem
    score = functools.partial(chunked_sequence_log_probs, chunk_size=4)
    plain = score(hidden, unembedding, tokens, mask)
    value, _ = jax.vjp(lambda h: score(h, unembedding, tokens, mask), jnp.asarray(hidden))
    np.testing.assert_allclose(plain, value, rtol=1e-6)
    np.testing.assert_allclose(plain, unchunked(hidden, unembedding, tokens, mask), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(score)(hidden, unembedding, tokens, mask), plain, rtol=1e-6)


@pytest.mark.parametrize("shared_head", [True, False])
def test_chunked_under_vmap_with_lanes_of_different_lengths(problem, shared_head):
    hidden, unembedding, tokens, mask = problem
    lanes = np.stack([mask, np.zeros_like(mask), np.ones_like(mask)])
    hiddens, tokenses = np.stack([hidden, 2 * hidden, -hidden]), np.stack([tokens, tokens[::-1], tokens])
    heads = unembedding if shared_head else np.stack([unembedding, -unembedding, 2 * unembedding])
    axes = (0, None if shared_head else 0, 0, 0)

    def gradients(score):
        def scalar(h, w):
            return (jax.vmap(score, axes)(h, w, tokenses, lanes) ** 2).sum()

        return jax.jit(jax.value_and_grad(scalar, (0, 1)))(hiddens, heads)

    with jax.enable_x64(True):
        chunked = gradients(functools.partial(chunked_sequence_log_probs, chunk_size=4))
        for ours, expected in zip(jax.tree.leaves(chunked), jax.tree.leaves(gradients(unchunked)), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_chunked_bfloat16_sums_in_float32(problem):
    hidden, unembedding, tokens, mask = problem
    half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(unembedding, jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in half)
    score = functools.partial(chunked_sequence_log_probs, chunk_size=4)
    out = score(*half, tokens, mask)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, unchunked(*exact, tokens, mask), rtol=1e-5)
    ours = jax.grad(lambda h, w: score(h, w, tokens, mask).sum(), (0, 1))(*half)
    expected = jax.grad(lambda h, w: unchunked(h, w, tokens, mask).sum(), (0, 1))(*exact)
    for x, y in zip(ours, expected, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0.02, atol=0.02 * float(jnp.abs(y).max()))


def test_chunked_hessian_products_forward_over_reverse(problem):
    hidden, unembedding, tokens, mask = problem

    def product(score):
        gradient = jax.grad(lambda h: score(h, unembedding, tokens, mask).sum())
        return jax.jvp(gradient, (hidden,), (np.ones_like(hidden),))[1]

    with jax.enable_x64(True):
        ours = product(functools.partial(chunked_sequence_log_probs, chunk_size=4))
        np.testing.assert_allclose(ours, product(unchunked), rtol=1e-9, atol=1e-11)


def temporary_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def test_chunked_never_holds_all_the_logits():
    rows, length, width, words = 4, 64, 8, 4096
    shapes = [(rows, length, width), (words, width), (rows, length), (rows, length)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    score = functools.partial(chunked_sequence_log_probs, chunk_size=16)
    compiled = jax.jit(jax.grad(lambda *a: score(*a).sum(), (0, 1))).lower(*args).compile()
    logits = 4 * rows * (length - 1) * words
    assert temporary_bytes(compiled) < logits / 3
    whole = jax.jit(jax.grad(lambda *a: unchunked(*a).sum(), (0, 1))).lower(*args).compile()
    assert temporary_bytes(whole) >= logits


def test_a_frozen_head_costs_no_second_pass():
    """Only d/d hidden asked for: the loop over chunks in the backward pass is gone from the compiled program."""
    args = jnp.ones((2, 8, 4)), jnp.ones((16, 4)), jnp.ones((2, 8), jnp.int32), jnp.ones((2, 8))
    score = functools.partial(chunked_sequence_log_probs, chunk_size=4)

    def loops(argnums):
        text = jax.jit(jax.grad(lambda *a: score(*a).sum(), argnums)).lower(*args).compile().as_text()
        return text.count(" while(")

    assert 2 * loops(0) == loops((0, 1)) > 0


def test_one_token_sequences_and_bad_arguments(problem):
    hidden, unembedding, tokens, mask = problem
    one = chunked_sequence_log_probs(hidden[:, :1], unembedding, tokens[:, :1], mask[:, :1], chunk_size=4)
    np.testing.assert_array_equal(one, np.zeros(B))
    with pytest.raises(ValueError, match="chunk_size"):
        chunked_sequence_log_probs(hidden, unembedding, tokens, mask, chunk_size=0)
    with pytest.raises(AssertionError):
        sequence_log_probs(hidden @ unembedding.T, tokens, mask[:, 1:])
    with pytest.raises(AssertionError):
        token_log_probs(hidden @ unembedding.T, tokens[:, 1:])


def test_entropy_by_hand_and_its_limits():
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.25]))[None, None, :], (2, 4, 3))
    mask = jnp.array([[0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(sequence_entropy(logits, mask), [1.5 * np.log(2.0), 0.0], rtol=1e-6)
    np.testing.assert_allclose(sequence_entropy(jnp.zeros((1, 4, 7)), mask[:1]), [np.log(7.0)], rtol=1e-6)
    certain = jnp.zeros((1, 4, 7)).at[..., 2].set(1e4)
    np.testing.assert_allclose(sequence_entropy(certain, mask[:1]), [0.0], atol=1e-6)


def test_entropy_agrees_with_scipy_chunked_or_not():
    stats = pytest.importorskip("scipy.stats")
    keys = jax.random.split(jax.random.key(9), 3)
    hidden, unembedding = jax.random.normal(keys[0], (3, 6, 5)), jax.random.normal(keys[1], (11, 5))
    tokens = jax.random.randint(keys[2], (3, 6), 0, 11)
    mask = jnp.arange(6)[None, :] >= jnp.array([[1], [3], [5]])
    logits = hidden @ unembedding.T
    per_token = stats.entropy(np.asarray(jax.nn.softmax(logits[:, :-1], axis=-1), np.float64), axis=-1)
    expected = (per_token * np.asarray(mask[:, 1:])).sum(axis=1) / np.asarray(mask[:, 1:]).sum(axis=1)
    np.testing.assert_allclose(sequence_entropy(logits, mask), expected, rtol=1e-5)
    logps, entropy = chunked_log_probs_and_entropy(hidden, unembedding, tokens, mask, chunk_size=4)
    np.testing.assert_allclose(entropy, expected, rtol=1e-5)
    np.testing.assert_allclose(logps, sequence_log_probs(logits, tokens, mask), rtol=1e-5)
    gradient = jax.grad(lambda h: chunked_log_probs_and_entropy(h, unembedding, tokens, mask, chunk_size=4)[1].sum())
    np.testing.assert_array_equal(gradient(hidden), jnp.zeros_like(hidden))


def test_chunked_tokens_are_the_tokens_of_the_full_logits(problem):
    hidden, unembedding, tokens, mask = problem
    weights = np.random.default_rng(1).normal(size=(B, T - 1))
    wanted = mask[:, 1:] != 0

    def scalar(score):
        return lambda h, w: jnp.sum(weights * score(h, w))

    def chunked(h, w):
        return chunked_token_log_probs(h, w, tokens, mask, chunk_size=4)[0]

    def full(h, w):
        return jnp.where(wanted, token_log_probs(h @ w.T, tokens), 0.0)

    with jax.enable_x64(True):
        h, w = jnp.asarray(hidden), jnp.asarray(unembedding)
        np.testing.assert_allclose(chunked(h, w), full(h, w), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(
            jax.grad(scalar(chunked), (0, 1))(h, w), jax.grad(scalar(full), (0, 1))(h, w), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
        _, entropies = chunked_token_log_probs(h, w, tokens, mask, chunk_size=4)
        p = scipy.special.softmax(hidden @ unembedding.T, axis=-1)[:, :-1]
        np.testing.assert_allclose(entropies, np.where(wanted, scipy.special.entr(p).sum(-1), 0.0), atol=1e-12)
