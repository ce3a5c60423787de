"""Group-relative advantages: hand numbers, NumPy float64, groups of equal rewards, and what cannot be a group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.rl.group_relative import grpo_advantages, rloo_advantages

REWARDS = np.random.default_rng(0).normal(size=(5, 4))
CENTERED = REWARDS - REWARDS.mean(axis=1, keepdims=True)
grpo, rloo = jax.jit(grpo_advantages, static_argnames="scale"), jax.jit(rloo_advantages)
FUNCTIONS = {
    "grpo": (grpo, CENTERED / (REWARDS.std(axis=1, ddof=1, keepdims=True) + 1e-4)),
    "grpo without scale": (functools.partial(grpo, scale=False), CENTERED),
    "rloo": (rloo, np.stack([REWARDS[:, g] - np.delete(REWARDS, g, 1).mean(1) for g in range(4)], axis=1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_matches_numpy(name):
    function, expected = FUNCTIONS[name]
    single = function(REWARDS)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(single.sum(axis=1), 0.0, atol=1e-5)
    with jax.enable_x64(True):
        lanes = jax.jit(jax.vmap(function))
        np.testing.assert_allclose(lanes(REWARDS[None])[0], expected, rtol=1e-12)
        check_grads(lanes, (REWARDS[None],), order=1, modes=["rev"])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_rewards_teach_nothing(name):
    function, _ = FUNCTIONS[name]
    equal = jnp.full((5, 4), 3.0)
    np.testing.assert_array_equal(function(equal), 0.0)
    assert np.isfinite(jax.jit(jax.grad(lambda r: jnp.sum(function(r) ** 2)))(equal)).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_group_is_named(name):
    function, _ = FUNCTIONS[name]
    with pytest.raises(ValueError, match=r"\(5, 1\)"):
        function(jnp.zeros((5, 1)))
    with pytest.raises(AssertionError):
        function(jnp.zeros(5))


def test_by_hand():
    half = np.sqrt(0.75)
    found = grpo(np.array([[1.0, 1.0, 0.0, 0.0]]), epsilon=0.0)
    np.testing.assert_allclose(found, [[half, half, -half, -half]], rtol=1e-6)
    np.testing.assert_allclose(rloo(np.array([[1.0, 0.0, 0.0, 3.0]])), [[0.0, -4 / 3, -4 / 3, 8 / 3]], rtol=1e-6)


def test_the_scale_is_the_groups_own():
    widths = np.array([1.0, 100.0, 0.01, 5.0, 2.0])[:, None]
    np.testing.assert_allclose(grpo(widths * REWARDS, epsilon=0.0), grpo(REWARDS, epsilon=0.0), rtol=1e-4)
