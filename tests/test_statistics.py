"""Aggregates and bootstrap intervals: hand numbers, identities, SciPy, coverage on a known distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxalign import statistics
from jaxalign.statistics import (
    bootstrap_interval,
    interquartile_mean,
    paired_difference_interval,
    probability_of_improvement,
    rank_correlation,
    stratified_bootstrap_interval,
    wilson_interval,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_interquartile_mean_by_hand():
    # 8 scores: two are cut at each end, the outliers among them.
    assert interquartile_mean([1000.0, 3, 4, 5, 6, 1, 2, -1000]) == pytest.approx(3.5)
    # fewer than 4 scores cut nothing
    assert interquartile_mean([1.0, 2, 6]) == pytest.approx(3.0)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 10, 101])
def test_interquartile_mean_is_scipys_trimmed_mean(n):
    scores = normal(n, 3, n) ** 3
    with jax.enable_x64(True):
        ours = interquartile_mean(scores)
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, scipy.stats.trim_mean(scores, 0.25, axis=-1), rtol=1e-12)
    np.testing.assert_allclose(interquartile_mean(scores), ours, rtol=1e-4, atol=1e-6)


def test_interquartile_mean_gradient_weighs_the_middle_half_only():
    gradient = jax.jit(jax.grad(interquartile_mean))(jnp.array([5.0, 1, 2, 3, 4, 0, -9, 90]))
    np.testing.assert_allclose(gradient, [0, 0.25, 0.25, 0.25, 0.25, 0, 0, 0], atol=1e-7)


def test_interquartile_mean_of_integers_halves_and_nan():
    assert interquartile_mean(jnp.array([0, 1, 1, 0])) == pytest.approx(0.5)
    assert interquartile_mean(jnp.ones(1000, jnp.bfloat16)).dtype == jnp.float32
    assert np.isnan(interquartile_mean(jnp.array([1.0, 2, 3, jnp.nan])))


def test_interval_of_equal_scores_is_a_point():
    low, high = bootstrap_interval(jax.random.key(0), jnp.full((5, 2), 3.0))
    np.testing.assert_allclose([low, high], np.full((2, 2), 3.0))
    low, high = bootstrap_interval(jax.random.key(0), jnp.array([7.0]))
    assert (float(low), float(high)) == (7.0, 7.0)


def test_interval_of_two_scores_by_hand():
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    low, high = bootstrap_interval(jax.random.key(0), jnp.array([0.0, 1.0]), confidence=0.8)
    assert (float(low), float(high)) == (0.0, 1.0)
    low, high = bootstrap_interval(jax.random.key(0), jnp.array([0.0, 1.0]), confidence=0.4)
    assert (float(low), float(high)) == (0.5, 0.5)


def test_interval_agrees_with_scipys_percentile_bootstrap():
    scores = normal(0, 30) ** 2
    low, high = bootstrap_interval(jax.random.key(0), scores, statistic=interquartile_mean, resamples=8000)
    reference = scipy.stats.bootstrap(
        (scores,),
        lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
        method="percentile",
        n_resamples=8000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    # Both are Monte Carlo; their ends differ by about 1% of the width's scale at 8000 resamples.
    width = reference.high - reference.low
    np.testing.assert_allclose([low, high], reference, atol=0.06 * width)


def test_interval_covers_the_mean_as_often_as_it_says():
    trials, runs = 400, 40
    scores = normal(1, trials, runs)
    keys = jax.random.split(jax.random.key(2), trials)
    interval = jax.jit(jax.vmap(lambda k, s: bootstrap_interval(k, s, confidence=0.9, resamples=500)))
    low, high = interval(keys, scores)
    covered = int(np.sum((low < 0) & (high > 0)))
    # The percentile interval is a z-interval with the plug-in deviation; its coverage at N=40 is known.
    expected = 2 * scipy.stats.t.cdf(scipy.stats.norm.ppf(0.95) * np.sqrt((runs - 1) / runs), runs - 1) - 1
    assert scipy.stats.binomtest(covered, trials, expected).pvalue > 1e-3


def test_chunks_estimate_the_same_interval_from_exactly_the_resamples_asked_for(monkeypatch):
    scores, quantile, seen = jnp.asarray(normal(3, 10, 4)), jnp.quantile, []
    whole = bootstrap_interval(jax.random.key(0), scores, resamples=300)

    def recorded(values, *args, **kwargs):
        seen.append(values.shape)
        return quantile(values, *args, **kwargs)

    monkeypatch.setattr(jnp, "quantile", recorded)
    monkeypatch.setattr(statistics, "CHUNK_ELEMENTS", 7 * scores.size)
    chunked = bootstrap_interval(jax.random.key(0), scores, resamples=300)
    assert seen == [(300, 4)]  # 43 chunks of 7 make 301
    np.testing.assert_allclose(chunked, whole, atol=0.2)


def test_memory_of_the_bootstrap_is_bounded():
    shapes = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    compiled = jax.jit(bootstrap_interval).lower(jax.random.key(0), shapes).compile()
    # 2000 resamples of 100,000 scores are 800 MB; a chunk is 4 MB and there are a few such buffers.
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6


def test_interval_under_jit_vmap_grad_and_x64():
    scores = jnp.asarray(normal(4, 12))
    key = jax.random.key(5)
    plain = bootstrap_interval(key, scores, resamples=200)
    jitted = jax.jit(lambda k, s, c: bootstrap_interval(k, s, confidence=c, resamples=200))(key, scores, 0.95)
    np.testing.assert_allclose(plain, jitted, rtol=1e-6)
    batched = jax.vmap(lambda s: jnp.stack(bootstrap_interval(key, s, resamples=200)))(jnp.stack([scores, 2 * scores]))
    np.testing.assert_allclose(batched, [np.array(plain), 2 * np.array(plain)], rtol=1e-5)
    # The interval moves with the scores, so the gradient of each end sums to one.
    gradient = jax.grad(lambda s: bootstrap_interval(key, s, resamples=200)[0])(scores)
    assert float(jnp.sum(gradient)) == pytest.approx(1.0, abs=1e-5)
    with jax.enable_x64(True):
        low, high = bootstrap_interval(key, normal(4, 12), resamples=200)
        assert low.dtype == high.dtype == jnp.float64


def test_stratified_interval_keeps_tasks_apart():
    # Every run of a task scores alike: resampling within tasks changes nothing, across tasks it would.
    scores = jnp.broadcast_to(jnp.array([[0.0, 1.0, 5.0, 6.0]]), (3, 4))
    low, high = stratified_bootstrap_interval(jax.random.key(0), scores, resamples=100)
    assert (float(low), float(high)) == (3.0, 3.0)


def test_stratified_interval_of_one_task_is_the_plain_interval():
    scores = jnp.asarray(normal(6, 20))
    plain = bootstrap_interval(jax.random.key(0), scores, resamples=4000)
    stratified = stratified_bootstrap_interval(
        jax.random.key(1), scores[:, None], statistic=jnp.mean, resamples=4000
    )
    np.testing.assert_allclose(stratified, plain, atol=0.05)


def test_stratified_interval_against_numpy():
    scores = normal(7, 5, 3) + np.array([[0.0, 4.0, 8.0]])
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 5, size=(4000, 5, 3))
    means = scores[rows, np.arange(3)].reshape(4000, -1)
    reference = np.quantile(scipy.stats.trim_mean(means, 0.25, axis=1), [0.025, 0.975])
    ours = stratified_bootstrap_interval(jax.random.key(0), scores, resamples=4000)
    np.testing.assert_allclose(ours, reference, atol=0.08 * (reference[1] - reference[0]))


def test_paired_interval_cancels_what_the_pairs_share():
    before = normal(8, 15) * 100
    low, high = paired_difference_interval(jax.random.key(0), before + 1.0, before)
    np.testing.assert_allclose([low, high], [1.0, 1.0], rtol=1e-4)
    after = before + 0.5 + 0.1 * normal(9, 15)
    paired = np.array(paired_difference_interval(jax.random.key(0), after, before))
    np.testing.assert_allclose(paired, bootstrap_interval(jax.random.key(0), after - before), rtol=1e-3)
    assert 0 < paired[0] < paired[1] < 1


def test_probability_of_improvement_by_hand():
    # x beats 1 and ties 2 (1.5 of 2), and beats both: 3.5 of 4.
    assert probability_of_improvement([2.0, 3.0], [1.0, 2.0]) == pytest.approx(3.5 / 4)
    assert probability_of_improvement([1.0], [1.0, 1.0, 1.0]) == pytest.approx(0.5)


def test_probability_of_improvement_is_mann_whitney():
    for seed, (n, m) in enumerate([(5, 9), (30, 30), (1, 7)]):
        x, y = np.round(normal(seed, n) + 0.2, 1), np.round(normal(seed + 10, m), 1)
        reference = scipy.stats.mannwhitneyu(x, y).statistic / (n * m)
        assert probability_of_improvement(x, y) == pytest.approx(reference, abs=1e-6)
        assert probability_of_improvement(x, y) + probability_of_improvement(y, x) == pytest.approx(1.0, abs=1e-6)


def test_probability_of_improvement_under_jit_vmap_grad_and_x64():
    x, y = jnp.asarray(normal(0, 4, 6)), jnp.asarray(normal(1, 4, 8))
    batched = jax.jit(jax.vmap(probability_of_improvement))(x, y)
    np.testing.assert_allclose(batched, [probability_of_improvement(a, b) for a, b in zip(x, y, strict=True)])
    np.testing.assert_array_equal(jax.grad(probability_of_improvement)(x[0], y[0]), jnp.zeros(6))
    assert np.isnan(probability_of_improvement(jnp.array([jnp.nan, 1.0]), y[0]))
    with jax.enable_x64(True):
        assert probability_of_improvement(np.arange(3.0), np.arange(2.0)).dtype == jnp.float64


def test_wilson_interval_by_hand():
    # 1 of 2 at z = 1: (1/2 + 1/4 -+ sqrt(1/8 + 1/16)) / (3/2)
    confidence = 2 * scipy.stats.norm.cdf(1.0) - 1
    low, high = wilson_interval(1, 2, confidence=confidence)
    np.testing.assert_allclose([low, high], [0.5 - np.sqrt(3) / 6, 0.5 + np.sqrt(3) / 6], rtol=1e-6)


def test_wilson_interval_is_scipys():
    trials = np.array([1, 1, 10, 10, 1000, 1000, 10_000])
    successes = np.array([0, 1, 3, 10, 0, 999, 9252])
    for confidence in (0.5, 0.95, 0.999):
        reference = [
            scipy.stats.binomtest(int(s), int(n)).proportion_ci(confidence, method="wilson")
            for s, n in zip(successes, trials, strict=True)
        ]
        with jax.enable_x64(True):
            exact = wilson_interval(successes, trials, confidence=confidence)
        np.testing.assert_allclose(np.stack(exact, axis=1), reference, rtol=1e-10, atol=1e-15)
        ours = jax.jit(wilson_interval)(successes, trials, confidence=confidence)
        np.testing.assert_allclose(np.stack(ours, axis=1), reference, rtol=2e-5)


def test_wilson_interval_at_its_ends():
    low, high = wilson_interval(jnp.array([0, 7]), 7)
    assert (float(low[0]), float(high[1])) == (0.0, 1.0)
    assert np.isnan(wilson_interval(0, 0)).all()
    mirrored = wilson_interval(np.array([5, 0]), np.array([7, 7]))
    np.testing.assert_allclose(1 - np.stack(wilson_interval(np.array([2, 7]), 7))[::-1], mirrored, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: wilson_interval(3, 2), r"\[0, trials\], got 3 of 2"),
        (lambda key: wilson_interval(-1, 2), r"\[0, trials\], got -1"),
        (lambda key: wilson_interval(1, 2, confidence=1.0), r"\(0, 1\), got 1.0"),
        (lambda key: interquartile_mean(jnp.zeros((3, 0))), r"N >= 1, got shape \(3, 0\)"),
        (lambda key: bootstrap_interval(key, jnp.zeros((0, 3))), r"N >= 1, got shape \(0, 3\)"),
        (lambda key: bootstrap_interval(key, jnp.zeros(3), confidence=95), r"\(0, 1\), got 95"),
        (lambda key: bootstrap_interval(key, jnp.zeros(3), resamples=0), "at least 1, got 0"),
        (lambda key: stratified_bootstrap_interval(key, jnp.zeros(3)), r"\[runs, tasks, ...\], got shape \(3,\)"),
        (lambda key: paired_difference_interval(key, jnp.zeros(3), jnp.zeros(4)), r"\(3,\), before is \(4,\)"),
        (lambda key: probability_of_improvement(jnp.zeros(0), jnp.zeros(3)), r"at least one run .* \(0,\)"),
    ],
)
def test_bad_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0))


def test_probability_of_improvement_refuses_a_matrix():
    with pytest.raises(AssertionError, match="rank"):
        probability_of_improvement(jnp.zeros((2, 3)), jnp.zeros(3))


def test_rank_correlation_with_ties_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, size=(2, 3, 20)).astype(np.float32)
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    run = jax.jit(jax.vmap(rank_correlation))
    np.testing.assert_allclose(run(x, y), expected, rtol=1e-5)
    assert np.isnan(run(np.ones_like(x), y)).all()
    line = jnp.arange(4.0)
    np.testing.assert_allclose([rank_correlation(line, line**3), rank_correlation(line, -line)], [1.0, -1.0], rtol=1e-6)
    np.testing.assert_allclose(rank_correlation(line, jnp.array([0, 2, 1, 3])), 0.8, rtol=1e-6)
