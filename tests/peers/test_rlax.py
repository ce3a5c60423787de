"""GAE, lambda-returns and V-trace agree with rlax where rlax can tell the ends of episodes apart."""

import jax
import numpy as np
import pytest

from jaxalign.rl.advantages import generalized_advantage_estimation, lambda_returns, vtrace

rlax = pytest.importorskip("rlax")
pytestmark = pytest.mark.peer

T, N = 40, 6


@pytest.fixture(scope="module")
def data():
    """Values at T + 1 times, rewards, and episodes that end in terminal states only: rlax has no truncation."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(T + 1, N)).astype(np.float32)
    rewards, log_ratio = rng.normal(size=(2, T, N)).astype(np.float32)
    return values, rewards, rng.random((T, N)) < 0.1, 0.5 * log_ratio


def each(function):
    return jax.jit(jax.vmap(function, in_axes=1, out_axes=1))


@pytest.mark.parametrize("method", ["scan", "associative"])
def test_gae(data, method):
    values, rewards, ended, _ = data
    gae = jax.jit(generalized_advantage_estimation, static_argnames="method")
    ours, targets = gae(rewards, values[:-1], values[1:], ended, ended, discount=0.97, gae_lambda=0.9, method=method)
    peer = each(lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, 0.9, v))
    expected = peer(rewards, np.float32(0.97) * ~ended, values)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(targets, expected + values[:-1], rtol=1e-4, atol=1e-5)


def test_lambda_returns(data):
    values, rewards, ended, _ = data
    ours = jax.jit(lambda_returns)(rewards, values[1:], ended, ended, discount=0.97, return_lambda=0.8)
    expected = each(lambda r, d, v: rlax.lambda_returns(r, d, v, 0.8))(rewards, np.float32(0.97) * ~ended, values[1:])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_vtrace(data):
    values, rewards, ended, log_ratio = data
    advantages, targets = jax.jit(vtrace)(
        log_ratio, rewards, values[:-1], values[1:], ended, ended, discount=0.97, gae_lambda=0.8
    )
    peer = each(lambda v, n, r, d, rho: rlax.vtrace_td_error_and_advantage(v, n, r, d, rho, 0.8))
    expected = peer(values[:-1], values[1:], rewards, np.float32(0.97) * ~ended, np.exp(log_ratio))
    np.testing.assert_allclose(targets, expected.errors + values[:-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(advantages, expected.pg_advantage, rtol=1e-4, atol=1e-5)
