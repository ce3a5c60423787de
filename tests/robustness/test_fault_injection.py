"""Faults occur at the rate asked for, and voting undoes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxalign.robustness.fault_injection import (
    degradation_curve,
    flip_bits,
    gaussian_noise,
    majority_vote,
    median_logits,
    stuck_at_zero,
)

PARAMS = {"w": jnp.linspace(-2.0, 3.0, 4000).reshape(40, 100), "half": jnp.ones(300, jnp.bfloat16), "n": jnp.arange(3)}


def test_bits_flip_each_at_the_rate():
    flip = jax.jit(lambda key, rate: flip_bits(key, PARAMS, rate=rate))
    faulty = flip(jax.random.key(0), 0.1)
    for name, unsigned, width in (("w", np.uint32, 32), ("half", np.uint16, 16)):
        assert faulty[name].dtype == PARAMS[name].dtype
        changed = np.asarray(faulty[name]).view(unsigned) ^ np.asarray(PARAMS[name]).view(unsigned)
        for bit in range(width):
            flips = int(((changed.ravel() >> bit) & 1).sum())
            assert stats.binomtest(flips, changed.size, 0.1).pvalue > 1e-4
    np.testing.assert_array_equal(faulty["n"], PARAMS["n"])
    same, inverse = (flip(jax.random.key(1), rate) for rate in (0.0, 1.0))
    np.testing.assert_array_equal(same["w"], PARAMS["w"])
    np.testing.assert_array_equal(np.asarray(inverse["w"]).view(np.uint32), ~np.asarray(PARAMS["w"]).view(np.uint32))


def test_noise_and_stuck_weights():
    key = jax.random.key(0)
    noisy, stuck = jax.jit(lambda: (gaussian_noise(key, PARAMS, scale=0.1), stuck_at_zero(key, PARAMS, rate=0.3)))()
    noise = noisy["w"] - PARAMS["w"]
    size = np.sqrt(np.mean(np.square(PARAMS["w"])))
    assert stats.kstest(np.ravel(noise) / (0.1 * size), "norm").pvalue > 1e-3
    kept = np.asarray(stuck["w"] != 0)
    assert stats.binomtest(int(kept.sum()), kept.size, 0.7).pvalue > 1e-4
    np.testing.assert_array_equal(np.asarray(stuck["w"])[kept], np.asarray(PARAMS["w"])[kept])
    assert stuck["half"].dtype == jnp.bfloat16


def test_votes_and_medians_by_hand():
    nan, inf = jnp.nan, jnp.inf
    logits = jnp.array(
        [  # [E = 3, B = 4, C = 3]
            [[2.0, 0.0, 1.0], [0.0, 5.0, 0.0], [nan, 0.0, 9.0], [nan, nan, nan]],
            [[2.0, 1.0, 0.0], [4.0, 0.0, 3.9], [0.0, 3.0, 1.0], [nan, nan, nan]],
            [[0.0, 0.0, 90.0], [0.0, 0.0, inf], [0.0, 3.0, 1.0], [nan, nan, nan]],
        ]
    )
    # Two against one however loud; one vote each, decided by probability; a member that fails has no vote.
    votes, medians = jax.jit(lambda logits: (majority_vote(logits), median_logits(logits)))(logits)
    assert votes.tolist() == [0, 1, 1, -1]
    np.testing.assert_allclose(medians[:3], [[2, 0, 1], [0, 0, 3.9], [0, 3, 1]])
    assert jnp.isnan(medians[3]).all()
    assert votes.dtype == jnp.int32


def test_degradation_and_its_mending_by_votes():
    x = jax.random.normal(jax.random.key(0), (200, 4))
    w = jnp.eye(4)
    y = jnp.argmax(x @ w, axis=1)

    def predict(key, rate):
        return jnp.where(rate < 0, jnp.nan, x @ stuck_at_zero(key, w, rate=rate))

    def members(key, rate):
        return jax.vmap(lambda each: predict(each, rate))(jax.random.split(key, 9))

    def vote(key, rate):
        return jax.nn.one_hot(majority_vote(members(key, rate)), 4)

    rates = jnp.array([0.0, 0.2, 1.0, -1.0])
    curve = functools.partial(degradation_curve, jax.random.key(1), y=y, rates=rates, draws=20)
    alone, voting = jax.jit(lambda: (curve(predict), curve(vote)))()
    assert alone.shape == (4, 20)
    np.testing.assert_array_equal(alone[0], 1.0)
    np.testing.assert_allclose(alone[2], np.mean(y == 0), rtol=1e-6)  # all logits equal: the first class
    assert alone[1].mean() < 0.95
    assert voting[1].mean() > alone[1].mean() + 0.05
    np.testing.assert_array_equal(alone[3], 0.0)  # NaN is wrong, whatever argmax makes of it


@pytest.mark.parametrize("function", [majority_vote, median_logits])
def test_an_ensemble_has_three_axes(function):
    with pytest.raises(AssertionError):
        function(jnp.zeros((3, 4)))
