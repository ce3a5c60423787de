"""Top examples, samples and statistics of features, gathered batch by batch and compared with all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.feature_examples import (
    FiringSample,
    merge_sample,
    merge_top,
    no_examples,
    no_sample,
    quantile_groups,
    row_peaks,
)
from jaxalign.interpretability.feature_statistics import (
    correlations,
    logit_effects,
    merge_histogram,
    merge_statistics,
    most_correlated,
    no_statistics,
)

BATCHES, B, F = 4, 6, 5
TOP = jax.jit(merge_top)


@pytest.fixture(scope="module")
def fired():
    """[BATCHES, B, F] sparse activations; feature 4 never fires."""
    rng = np.random.default_rng(0)
    f = np.maximum(rng.normal(size=(BATCHES, B, F)), 0).astype(np.float32)
    f[..., 4] = 0
    return f


@pytest.fixture(scope="module")
def gathered(fired):
    """One scan over the batches: (top 3, sample of 4, statistics, products of features 0 and 2 with all)."""
    index = np.arange(BATCHES * B, dtype=np.int32).reshape(BATCHES, B)

    @jax.jit
    def run(fired, index):
        def step(carry, batch):
            top, sample, statistics, products = carry
            key, f, i = batch
            carry = (merge_top(top, f, i), merge_sample(key, sample, f, i), merge_statistics(statistics, f),
                     products + f[:, jnp.array([0, 2])].T @ f)  # fmt: skip
            return carry, None

        begin = (no_examples(F, 3), no_sample(F, 4), no_statistics(F), jnp.zeros((2, F)))
        return jax.lax.scan(step, begin, (jax.random.split(jax.random.key(0), BATCHES), fired, index))[0]

    return run(fired, index)


def test_top_examples_are_those_of_a_full_sort(fired, gathered):
    flat, top = fired.reshape(-1, F), gathered[0]
    order = np.argsort(-flat, axis=0, kind="stable")[:3].T
    np.testing.assert_array_equal(top.value, np.take_along_axis(flat.T, order, axis=1))
    np.testing.assert_array_equal(top.index[:4], order[:4])
    np.testing.assert_array_equal(top.index[4], [-1, -1, -1])


def test_of_equal_firings_the_earlier_stays_by_hand():
    top = TOP(no_examples(1, 2), np.array([[2.0], [1.0], [2.0]]), np.array([7, 8, 9]))
    assert top.index.tolist() == [[7, 9]]
    top = TOP(top, np.array([[2.0], [3.0]]), np.array([10, 11]))
    assert top.index.tolist() == [[11, 7]]
    assert top.value.tolist() == [[3.0, 2.0]]


def test_a_row_of_text_gives_one_peak():
    f = np.zeros((2, 3, 1), np.float32)
    f[0, :, 0], f[1, :, 0] = [1, 5, 4], [0, 0, 2]
    top, value, index = jax.jit(lambda f, i: (merge_top(no_examples(1, 4), *row_peaks(f, i)), *row_peaks(f, i)))(
        f, np.arange(6).reshape(2, 3)
    )
    assert (value.ravel().tolist(), index.ravel().tolist()) == ([5, 2], [1, 5])
    assert top.index.tolist() == [[1, 5, -1, -1]]


def test_a_sample_holds_firings_once_each_with_their_values(fired, gathered):
    flat, sample = fired.reshape(-1, F), gathered[1]
    for feature in range(F):
        index = np.asarray(sample.index[feature])
        kept = index[index >= 0]
        assert len(kept) == len(set(kept.tolist())) == min(4, (flat[:, feature] > 0).sum())
        np.testing.assert_array_equal(np.asarray(sample.value[feature])[index >= 0], flat[kept, feature])
        assert (flat[kept, feature] > 0).all()


def test_every_firing_is_equally_likely_to_be_sampled():
    f = np.array([[0.1], [0.0], [5.0], [2.0], [1.0]], np.float32)

    def draw(key):
        first, second = jax.random.split(key)
        sample = merge_sample(first, no_sample(1, 2), f[:3], jnp.arange(3))
        return merge_sample(second, sample, f[3:], jnp.arange(3, 5)).index[0]

    index = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)))
    share = np.bincount(index.ravel(), minlength=5) / 4000
    np.testing.assert_allclose(share, [0.5, 0, 0.5, 0.5, 0.5], atol=0.04)  # 5 standard deviations


def test_quantile_groups_by_hand():
    value = np.array([[3, 8, 1, 6, 2, 7, 4, 5], [9, 4, 0, 0, 0, 0, 0, 0]], np.float32)
    index = np.where(value > 0, 10 * value, -1).astype(np.int32)
    sample = FiringSample(np.where(value > 0, 0.5, -1.0), value, index)
    groups = jax.jit(lambda sample: quantile_groups(sample, 2, count=2))(sample)
    # Ranks 1 and 3 of the strong half 8 7 6 5, and of the weak half 4 3 2 1.
    assert groups.value[0].tolist() == [[7, 5], [3, 1]]
    assert groups.index[0].tolist() == [[70, 50], [30, 10]]
    # Two firings for four places: each is shown once.
    assert groups.value[1].tolist() == [[9, 0], [4, 0]]
    assert groups.index[1].tolist() == [[90, -1], [40, -1]]


def test_statistics_are_those_of_all_tokens(fired, gathered):
    flat, statistics = fired.reshape(-1, F), gathered[2]
    assert int(statistics.tokens) == len(flat)
    np.testing.assert_array_equal(statistics.fired, (flat > 0).sum(axis=0))
    np.testing.assert_array_equal(statistics.maximum, flat.max(axis=0))
    np.testing.assert_allclose(statistics.density, (flat > 0).mean(axis=0))
    some = flat[:, 0]
    np.testing.assert_allclose(statistics.mean_when_firing[0], some[some > 0].mean(), rtol=1e-6)
    half = jax.jit(merge_statistics)(no_statistics(F), flat, np.arange(len(flat)) < 5)
    np.testing.assert_array_equal(half.fired, (flat[:5] > 0).sum(axis=0))
    assert int(half.tokens) == 5


def test_histograms_are_numpys(fired, gathered):
    maximum = np.asarray(gathered[2].maximum)
    step = jax.jit(merge_histogram)
    counts = jnp.zeros((F, 4), jnp.int32)
    for f in fired:
        counts = step(counts, f, maximum)
    flat = fired.reshape(-1, F)
    for feature in range(4):
        some = flat[:, feature]
        expected, _ = np.histogram(some[some > 0], bins=4, range=(0, maximum[feature]))
        np.testing.assert_array_equal(counts[feature], expected)
    assert counts[4].tolist() == [0, 0, 0, 0]


def test_correlations_are_numpys_and_leave_the_feature_itself_out(fired, gathered):
    flat, (_, _, statistics, products) = fired.reshape(-1, F).astype(np.float64), gathered
    chosen = np.array([0, 2])

    @jax.jit
    def run(products, statistics):
        correlation = correlations(products, chosen, statistics)
        return correlation, *most_correlated(correlation, chosen, 2)

    found, value, feature = map(np.asarray, run(products, statistics))
    expected = np.corrcoef(flat[:, :4].T)[[0, 2]]
    np.testing.assert_allclose(found[:, :4], expected, atol=1e-5)
    np.testing.assert_array_equal(found[:, 4], 0)  # of a feature that never varies nothing can be said
    others = np.where(np.arange(4)[None, :] == chosen[:, None], -2, found[:, :4])
    np.testing.assert_allclose(value[:, 0], np.maximum(others.max(axis=1), 0), atol=1e-6)
    assert not (feature == np.array([[0], [2]])).any()


def test_logit_effects_are_the_extremes_of_the_whole_matrix():
    rng = np.random.default_rng(1)
    w_dec, unembedding, scale = rng.normal(size=(70, 4)), rng.normal(size=(9, 4)), rng.uniform(0.5, 2, 4)
    found = jax.jit(lambda *x: logit_effects(*x, count=2))(w_dec, unembedding, scale)
    effect = (w_dec * scale) @ unembedding.T
    effect -= effect.mean(axis=1, keepdims=True)
    order = np.argsort(effect, axis=1)
    np.testing.assert_array_equal(found.top_tokens, order[:, :-3:-1])
    np.testing.assert_array_equal(found.bottom_tokens, order[:, :2])
    np.testing.assert_allclose(found.top, np.take_along_axis(effect, order[:, :-3:-1], 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.bottom, np.take_along_axis(effect, order[:, :2], 1), rtol=1e-4, atol=1e-5)


def test_gathering_vmaps_over_autoencoders(fired):
    two = np.stack([fired[0], 2 * fired[1]])
    top = jax.jit(jax.vmap(lambda f: merge_top(no_examples(F, 2), f, jnp.arange(B))))(two)
    one = TOP(no_examples(F, 2), two[1], np.arange(B))
    np.testing.assert_array_equal(top.value[1], one.value)
    np.testing.assert_array_equal(top.index[1], one.index)
