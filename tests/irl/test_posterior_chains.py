"""Posterior sampling as an Algorithm, on targets whose moments are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("blackjax")

import jaxalign
from jaxalign.irl import chain_samples, gaussian_prior, posterior_chains, uniform_prior


def test_a_gaussian_posterior_has_its_moments():
    """Prior N(0, 1), one observation x of noise s: the posterior is N(x / (1 + s^2), s^2 / (1 + s^2))."""
    prior = gaussian_prior(4)
    noise = jnp.array([0.1, 0.5, 1.0, 3.0])
    seen = jnp.array([1.0, -2.0, 0.5, 0.0])

    def log_posterior(reward, batch):
        return prior.log_prob(reward) - 0.5 * jnp.sum(((reward - batch) / noise) ** 2)

    algorithm = posterior_chains(log_posterior, prior, num_chains=8, num_samples=600, num_warmup=200)
    batches = jnp.broadcast_to(seen[None], (800, 4))
    state, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, batches))(jax.random.key(0))
    draws = chain_samples(state, prior)
    assert draws.shape == (8, 600, 4)
    variance = noise**2 / (1 + noise**2)
    np.testing.assert_allclose(draws.mean(axis=(0, 1)), seen / (1 + noise**2), atol=0.1)
    np.testing.assert_allclose(draws.var(axis=(0, 1)), variance, rtol=0.15)
    assert 0.6 < float(metrics["acceptance"][200:].mean()) < 0.95
    # The mass follows the posterior's own scales.
    np.testing.assert_allclose(state.opt_state.variance, variance, rtol=0.5)


def test_bounds_are_kept_and_what_is_not_drawn_is_the_middle():
    prior = uniform_prior(2, low=0.0, high=2.0)
    algorithm = posterior_chains(
        lambda reward, _: prior.log_prob(reward), prior, num_chains=4, num_samples=400, num_warmup=40
    )
    run = jax.jit(lambda key, length: jaxalign.train(algorithm, key, None, length=length)[0], static_argnums=1)
    draws = np.asarray(chain_samples(run(jax.random.key(1), 440), prior))
    assert draws.min() >= 0.0
    assert draws.max() <= 2.0
    np.testing.assert_allclose(draws.mean(), 1.0, atol=0.1)
    np.testing.assert_allclose(draws.std(), 2.0 / np.sqrt(12.0), rtol=0.1)
    early = np.asarray(chain_samples(run(jax.random.key(1), 50), prior))
    np.testing.assert_array_equal(early[:, 10:], 1.0)


def test_counts_too_small_are_refused():
    with pytest.raises(ValueError, match="num_warmup=0"):
        posterior_chains(lambda r, _: 0.0, gaussian_prior(1), num_chains=2, num_samples=1, num_warmup=0)
