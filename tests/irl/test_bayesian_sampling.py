"""HMC, NUTS and SMC against quadrature; R-hat and ESS against NumPy and AR(1); samplers calibrated and not."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from benchmarks.peer.bayesian_irl import effective_samples, normal_scores
from jaxalign.irl.bayesian import (
    boltzmann_policy,
    dirichlet_prior,
    log_likelihood,
    log_posterior,
    policy_walk,
    uniform_prior,
)
from jaxalign.irl.bayesian_sampling import hmc, nuts, smc
from jaxalign.irl.diagnostics import (
    bulk_ess,
    posterior_predictive,
    predictive_log_score,
    rank_uniformity,
    simulation_based_calibration,
    split_rhat,
)
from jaxalign.irl.trajectories import pad_trajectories, sample_trajectories
from jaxalign.mdp import random_mdp

pytest.importorskip("blackjax")


@pytest.fixture(scope="module")
def problem():
    """Two rewards in a box: (log likelihood, log posterior, prior, exact mean, exact covariance, log evidence)."""
    mdp = random_mdp(jax.random.key(0), 2, 2, discount=0.5)
    log_policy = boltzmann_policy(mdp, jnp.array([0.8, -0.3]), beta=4.0)
    demonstrations = sample_trajectories(jax.random.key(1), mdp, log_policy, num=4, length=4)
    prior = uniform_prior(2)
    options = {"beta": 4.0, "policy": functools.partial(boltzmann_policy, tolerance=1e-5)}
    likelihood = log_likelihood(mdp, demonstrations, **options)
    axis = (np.arange(200) + 0.5) / 100 - 1
    grid = np.array(list(itertools.product(axis, axis)))
    log_weights = np.asarray(jax.jit(jax.vmap(likelihood))(jnp.asarray(grid, jnp.float32)), np.float64)
    weights = scipy.special.softmax(log_weights)
    mean = weights @ grid
    evidence = scipy.special.logsumexp(log_weights) - np.log(len(grid))
    covariance = (grid - mean).T @ (weights[:, None] * (grid - mean))
    return likelihood, log_posterior(mdp, demonstrations, prior, **options), prior, mean, covariance, evidence


@pytest.mark.parametrize("sampler", [pytest.param(hmc, marks=pytest.mark.slow), nuts])
def test_chains_have_the_moments_of_the_posterior(sampler, problem):
    _, posterior, prior, mean, covariance, _ = problem
    run = jax.jit(lambda key: sampler(key, posterior, prior, num_chains=8, num_samples=400, num_warmup=150))
    chains = run(jax.random.key(0))
    assert chains.samples.shape == (8, 400, 2)
    assert jnp.abs(chains.samples).max() <= 1.0
    assert split_rhat(chains.samples).max() < 1.02
    assert bulk_ess(chains.samples).min() > 500
    flat = chains.samples.reshape(-1, 2)
    np.testing.assert_allclose(flat.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(flat.T), covariance, atol=0.04)
    np.testing.assert_allclose(chains.log_posterior[0, :5], jax.vmap(posterior)(chains.samples[0, :5]), atol=1e-3)
    assert 0.6 < chains.acceptance_rate.mean() < 1.0
    assert chains.divergences.sum() < 8
    assert jnp.abs(run(jax.random.key(1)).samples - chains.samples).max() > 0.1


def test_smc_has_the_moments_and_the_evidence(problem):
    likelihood, _, prior, mean, covariance, evidence = problem
    particles = jax.jit(lambda key: smc(key, likelihood, prior, num_particles=1000))(jax.random.key(0))
    assert particles.tempering == 1.0
    assert particles.stages > 1
    np.testing.assert_allclose(particles.samples.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(particles.samples.T), covariance, atol=0.04)
    assert float(particles.log_evidence) == pytest.approx(evidence, abs=0.15)


def test_one_chain_cannot_adapt_to_the_others(problem):
    with pytest.raises(ValueError, match="num_chains=1"):
        hmc(jax.random.key(0), problem[1], problem[2], num_chains=1, num_samples=10)


def test_samplers_find_a_simplex_and_keep_to_it():
    alpha = jnp.array([2.0, 3.0, 5.0])
    prior = dirichlet_prior(3, maximum=2.0)
    target = dirichlet_prior(3, maximum=2.0, concentration=alpha)
    chains = jax.jit(lambda k: hmc(k, target.log_prob, prior, num_chains=8, num_samples=300, num_warmup=150))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(chains.samples.sum(axis=-1), 2.0, rtol=1e-4)
    np.testing.assert_allclose(chains.samples.mean(axis=(0, 1)), 2.0 * alpha / 10.0, atol=0.03)


@pytest.mark.parametrize("sampler", [hmc, nuts, smc, split_rhat])
def test_without_the_extra_the_error_names_it(sampler, monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    arguments = {
        smc: (jax.random.key(0), jnp.sum, uniform_prior(2)),
        split_rhat: (jnp.zeros((2, 8)),),
    }.get(sampler, (jax.random.key(0), jnp.sum, uniform_prior(2)))
    counts = {smc: {"num_particles": 4}, split_rhat: {}}.get(sampler, {"num_chains": 2, "num_samples": 2})
    with pytest.raises(ImportError, match=r"jaxalign\[bayes\]"):
        sampler(*arguments, **counts)


def numpy_split_rhat(draws):
    """Vehtari et al. 2021, one entry [C, N]."""

    def basic(x):
        within, between = x.var(axis=1, ddof=1).mean(), x.mean(axis=1).var(ddof=1)
        length = x.shape[1]
        return np.sqrt(((length - 1) / length * within + between) / within)

    def normal_scores(x):
        ranks = scipy.stats.rankdata(x).reshape(x.shape)
        return scipy.stats.norm.ppf((ranks - 0.375) / (x.size + 0.25))

    half = draws.shape[1] // 2
    split = np.concatenate([draws[:, :half], draws[:, half:]])
    return max(basic(normal_scores(split)), basic(normal_scores(np.abs(split - np.median(split)))))


def test_rhat_is_numpys_and_sees_shift_and_spread():
    draws = np.random.default_rng(0).normal(size=(4, 200, 2, 3))
    draws[0, :, 0, 0] += 1.0
    draws[1, :, 1, 2] *= 4.0
    found = split_rhat(jnp.asarray(draws, jnp.float32))
    assert found.shape == (2, 3)
    expected = [[numpy_split_rhat(draws[:, :, i, j]) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[0, 0] > 1.05
    assert found[1, 2] > 1.05
    assert found[0, 1] < 1.02
    assert split_rhat(jnp.asarray(draws[..., 0, 0])).shape == ()
    with pytest.raises(ValueError, match="at least 4 draws"):
        split_rhat(jnp.zeros((3, 2, 5)))


@pytest.mark.slow
def test_effective_sample_size_of_an_autoregression_is_known():
    phi = np.array([0.0, 0.5, 0.9])
    noise = np.random.default_rng(1).normal(size=(4, 2000, 3))
    draws = np.zeros_like(noise)
    draws[:, 0] = noise[:, 0]
    for t in range(1, 2000):
        draws[:, t] = phi * draws[:, t - 1] + np.sqrt(1 - phi**2) * noise[:, t]
    found = bulk_ess(jnp.asarray(draws, jnp.float32))
    np.testing.assert_allclose(found, 8_000 * (1 - phi) / (1 + phi), rtol=0.3)
    halves = np.concatenate([draws[:, :1000], draws[:, 1000:]])
    np.testing.assert_allclose(found, [effective_samples(normal_scores(halves[..., i])) for i in range(3)], rtol=1e-3)
    assert bulk_ess(jnp.asarray(draws[..., :1])).shape == (1,)


def test_predictive_averages_probabilities_over_the_posterior():
    mdp = random_mdp(jax.random.key(0), 3, 2)
    rewards = jax.random.normal(jax.random.key(1), (5, 3))
    log_policy = posterior_predictive(mdp, rewards, beta=2.0)
    mean = np.mean([np.exp(boltzmann_policy(mdp, reward, beta=2.0)) for reward in rewards], axis=0)
    np.testing.assert_allclose(np.exp(log_policy), mean, rtol=1e-5)
    alone = posterior_predictive(mdp, rewards[:1], beta=2.0)
    np.testing.assert_allclose(alone, boltzmann_policy(mdp, rewards[0], beta=2.0), rtol=1e-5, atol=1e-6)
    held_out = pad_trajectories([([0, 1], [1, 1]), ([2], [0])])
    score = (log_policy[0, 1] + log_policy[1, 1] + log_policy[2, 0]) / 3
    np.testing.assert_allclose(predictive_log_score(mdp, log_policy, held_out), score, rtol=1e-5)


def test_rank_uniformity_is_scipys_chi_square():
    ranks = np.random.default_rng(0).integers(0, 20, (500, 2))
    ranks[:, 1] = np.minimum(ranks[:, 1], 15)
    found = rank_uniformity(jnp.asarray(ranks), num_samples=19, num_bins=5)
    expected = [scipy.stats.chisquare(np.bincount(ranks[:, i] // 4, minlength=5)).pvalue for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-12)
    assert found[0] > 0.01 > found[1]
    with pytest.raises(ValueError, match="must divide num_samples"):
        rank_uniformity(jnp.asarray(ranks), num_samples=20, num_bins=5)


def calibration(assumed_beta):
    mdp = random_mdp(jax.random.key(2), 3, 2, discount=0.5)
    prior = uniform_prior(3)
    policy = functools.partial(boltzmann_policy, tolerance=1e-4)

    def sample_posterior(key, trajectories):
        posterior = log_posterior(mdp, trajectories, prior, beta=assumed_beta, policy=policy)
        return policy_walk(
            key, posterior, jnp.zeros(3), num_samples=31, step_size=0.6, burn_in=60, thinning=20, bounds=(-1.0, 1.0)
        )

    ranks = jax.jit(
        lambda key: simulation_based_calibration(
            key, mdp, prior, sample_posterior, beta=4.0, num_simulations=512, num_trajectories=3, length=10,
            policy=policy,
        )
    )(jax.random.key(0))  # fmt: skip
    assert ranks.shape == (512, 3)
    assert ranks.min() >= 0
    assert ranks.max() <= 31
    return rank_uniformity(ranks, num_samples=31, num_bins=8)


def test_a_right_sampler_is_calibrated():
    assert calibration(assumed_beta=4.0).min() > 0.01


def test_a_sampler_that_overrates_the_demonstrator_is_found_out():
    assert calibration(assumed_beta=1.0).min() < 1e-4
