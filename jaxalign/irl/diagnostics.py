"""Is a posterior over rewards to be trusted? R-hat, effective samples, predictive scores, calibration."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.stats import chi2

from jaxalign.irl.bayesian import Prior, boltzmann_policy
from jaxalign.irl.posterior_chains import import_blackjax
from jaxalign.irl.trajectories import Trajectories, sample_trajectories, visit_counts
from jaxalign.mdp import TabularMDP
from jaxalign.types import Array, ArrayLike, Key

Policy = Callable[..., Array]


def split_rhat(samples: Array) -> Array:
    """Rank-normalised split R-hat of every entry: samples [C, N, ...] of C chains -> [...]; below 1.01 is well mixed.

    The larger of the ratio of variances between and within half chains for the ranks, and for the ranks of the distance
    from the median, so that chains that differ in spread are seen as well. NaN if an entry never moves. Raises
    ImportError without the extra `bayes`. Vehtari et al. 2021, section 4.
    """
    return _per_entry(import_blackjax().diagnostics.rhat, samples)


def bulk_ess(samples: Array) -> Array:
    """Effective sample size of every entry's rank-normalised half chains: samples [C, N, ...] -> [...].

    How many independent draws would estimate the posterior's centre as well; 100 per chain is comfortable. Raises
    ImportError without the extra `bayes`. Vehtari et al. 2021, section 3, with Geyer's monotone sequence.
    """
    return _per_entry(import_blackjax().diagnostics.ess_bulk, samples)


def _per_entry(statistic: Callable[[Array], Array], samples: Array) -> Array:
    samples = jnp.asarray(samples)
    if samples.ndim < 2 or samples.shape[1] < 4:
        raise ValueError(f"samples must be [chains, at least 4 draws, ...], got {samples.shape}")
    entries = samples.reshape(*samples.shape[:2], -1)
    return jax.vmap(statistic, in_axes=-1)(entries).reshape(samples.shape[2:])


def posterior_predictive(
    mdp: TabularMDP, rewards: Array, *, beta: ArrayLike, policy: Policy = boltzmann_policy
) -> Array:
    """log E_reward[P(a | s, reward)]: the demonstrator's policy averaged over posterior rewards [N, ...] -> [S, A].

    policy: as in `log_likelihood`. Not the policy of the mean reward: that forgets the uncertainty.
    """
    log_policies = jax.vmap(lambda reward: policy(mdp, reward, beta=beta))(rewards)
    return jax.nn.logsumexp(log_policies, axis=0) - jnp.log(len(rewards))


def predictive_log_score(mdp: TabularMDP, log_policy: Array, trajectories: Trajectories) -> Array:
    """The mean of log_policy[s, a], [S, A], over the steps of held-out demonstrations, in nats; higher is better."""
    counts = visit_counts(mdp, trajectories)
    return jnp.sum(counts * log_policy) / jnp.sum(counts)


def simulation_based_calibration(
    key: Key,
    mdp: TabularMDP,
    prior: Prior,
    sample_posterior: Callable[[Key, Trajectories], Array],
    *,
    beta: ArrayLike,
    num_simulations: int,
    num_trajectories: int,
    length: int,
    policy: Policy = boltzmann_policy,
    batch_size: int | None = None,
) -> Array:
    """Ranks of true rewards among their posterior samples: uniform on 0..L if the sampler is right.

    Each simulation draws a reward from the prior, demonstrations from `policy` with `beta`, and L posterior samples
    [L, ...] by `sample_posterior(key, trajectories)`; rank = how many samples lie below the true entry.

    Args:
        sample_posterior: should thin until its samples are nearly independent; autocorrelation alone bends the ranks.
        num_trajectories, length: of the demonstrations of each simulation.
        batch_size: simulations at a time, to save memory; None: all.

    Returns int [num_simulations, ...]; test them by `rank_uniformity`. Talts et al. 2018, algorithm 1.
    """

    def simulate(key: Key) -> Array:
        reward_key, demonstration_key, sample_key = jax.random.split(key, 3)
        reward = prior.sample(reward_key)
        log_policy = policy(mdp, reward, beta=beta)
        trajectories = sample_trajectories(demonstration_key, mdp, log_policy, num=num_trajectories, length=length)
        return jnp.sum(sample_posterior(sample_key, trajectories) < reward[None], axis=0)

    keys = jax.random.split(key, num_simulations)
    return jax.lax.map(simulate, keys, batch_size=num_simulations if batch_size is None else batch_size)


def rank_uniformity(ranks: Array, *, num_samples: int, num_bins: int) -> Array:
    """The chi-square p-value that ranks [N, ...] in 0..num_samples are uniform, for every entry [...].

    statistic = sum_bins (count - N / num_bins)^2 / (N / num_bins), num_bins - 1 degrees of freedom; N / num_bins should
    be 5 or more. Raises ValueError unless num_bins divides num_samples + 1, or the bins would differ in size.
    """
    if (num_samples + 1) % num_bins:
        raise ValueError(f"rank_uniformity: {num_bins=} must divide num_samples + 1 = {num_samples + 1}")
    bins = ranks * num_bins // (num_samples + 1)
    counts = jnp.sum(jax.nn.one_hot(bins, num_bins), axis=0)
    expected = len(ranks) / num_bins
    return chi2.sf(jnp.sum((counts - expected) ** 2, axis=-1) / expected, num_bins - 1)

