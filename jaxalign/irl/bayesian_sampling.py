"""Posterior samples by gradients: Hamiltonian Monte Carlo, NUTS and tempered sequential Monte Carlo, through BlackJAX.

Chains run in the unconstrained space of the prior and come back as rewards. Extra: `pip install "jaxalign[bayes]"`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import train
from jaxalign.irl.bayesian import LogDensity, Prior, unconstrained
from jaxalign.irl.posterior_chains import ChainState, chain_samples, import_blackjax, posterior_chains
from jaxalign.types import Array, ArrayLike, Key


class Chains(NamedTuple):
    """Several chains of rewards and how they went.

    samples: [C, num_samples, ...] rewards
    log_posterior: [C, num_samples] of each, in reward space, up to the log evidence
    acceptance_rate: [C], the mean over samples
    divergences: [C] int, samples whose trajectory's energy went astray; more than a few: do not trust the chain
    step_size: scalar, as adapted
    """

    samples: Array
    log_posterior: Array
    acceptance_rate: Array
    divergences: Array
    step_size: Array


def hmc(
    key: Key,
    log_posterior: LogDensity,
    prior: Prior,
    *,
    num_chains: int,
    num_samples: int,
    num_warmup: int = 200,
    num_integration_steps: int = 10,
    jitter: ArrayLike = 0.3,
    target_acceptance: ArrayLike = 0.8,
) -> Chains:
    """Hamiltonian Monte Carlo in C chains at once, which share one adapted step size and diagonal mass.

    A whole run of `posterior_chains`, which see for how they adapt and for `num_integration_steps` and `jitter`.

    Args:
        log_posterior: reward [...] -> scalar, the prior included. Chains start from draws of the prior.
        target_acceptance: lower it to about 0.65 where the hard maximum of Q* makes the posterior rough.

    Returns Chains of rewards [C, num_samples, ...]. Raises ImportError without the extra `bayes`, ValueError with fewer
    than 2 chains. Neal 2011, "MCMC using Hamiltonian dynamics".
    """
    return _whole_run(
        key, log_posterior, prior, num_chains=num_chains, num_samples=num_samples, num_warmup=num_warmup,
        num_integration_steps=num_integration_steps, jitter=jitter, target_acceptance=target_acceptance,
    )  # fmt: skip


def nuts(
    key: Key,
    log_posterior: LogDensity,
    prior: Prior,
    *,
    num_chains: int,
    num_samples: int,
    num_warmup: int = 200,
    target_acceptance: ArrayLike = 0.8,
) -> Chains:
    """The no-U-turn sampler: `hmc` that chooses the length of each trajectory; log_posterior: reward [...] -> scalar.

    Under vmap a step takes as long as its longest trajectory. Hoffman & Gelman 2014.
    """
    return _whole_run(
        key, log_posterior, prior, num_chains=num_chains, num_samples=num_samples, num_warmup=num_warmup,
        kernel=import_blackjax().nuts.build_kernel(), jitter=0.0, target_acceptance=target_acceptance,
    )  # fmt: skip


def _whole_run(
    key: Key, log_posterior: LogDensity, prior: Prior, *, num_samples: int, num_warmup: int, **options: Any
) -> Chains:
    algorithm = posterior_chains(
        lambda reward, _: log_posterior(reward), prior, num_samples=num_samples, num_warmup=num_warmup, **options
    )
    state, _ = train(algorithm, key, None, length=num_warmup + num_samples)
    chains: ChainState = state.opt_state
    acceptance_rate = chains.accepted / num_samples
    samples = chain_samples(state, prior)
    return Chains(samples, chains.log_posterior.T, acceptance_rate, chains.divergences, chains.step_size)


class Particles(NamedTuple):
    """What `smc` returns.

    samples: [num_particles, ...] rewards, equally weighted
    log_evidence: log p(demonstrations), nats, a scalar; unbiased after exp
    tempering: the power of the likelihood reached, 1 unless `max_stages` ran out
    stages: int, how many temperatures were passed
    acceptance_rate: of the last stage's moves
    """

    samples: Array
    log_evidence: Array
    tempering: Array
    stages: Array
    acceptance_rate: Array


def smc(
    key: Key,
    log_likelihood: LogDensity,
    prior: Prior,
    *,
    num_particles: int,
    num_moves: int = 5,
    num_integration_steps: int = 5,
    target_ess: ArrayLike = 0.5,
    max_stages: int = 200,
) -> Particles:
    """Adaptive tempered sequential Monte Carlo from the prior to prior * likelihood^1.

    Each stage raises the likelihood's power until the weights' effective sample size falls to `target_ess` of the
    particles, resamples, and moves every particle by `num_moves` of HMC, its mass from the particles' variance and its
    step size following the acceptance rate.

    log_likelihood: reward [...] -> scalar nats, the prior not included.
    Returns Particles of rewards [num_particles, ...]. Raises ImportError without the extra `bayes`.
    Del Moral, Doucet & Jasra 2006; the schedule of Jasra et al. 2011.
    """
    blackjax = import_blackjax()
    tempered = blackjax.smc.adaptive_tempered
    kernel = tempered.build_kernel(
        unconstrained(prior.log_prob, prior),
        lambda point: log_likelihood(prior.constrain(point)[0]),
        functools.partial(blackjax.hmc.build_kernel(), num_integration_steps=num_integration_steps),
        blackjax.hmc.init,
        blackjax.smc.resampling.systematic,
        target_ess,
    )
    start_key, run_key = jax.random.split(key)
    points = jax.vmap(lambda k: prior.unconstrain(prior.sample(k)))(jax.random.split(start_key, num_particles))
    state = tempered.init(points)._replace(tempering_param=jnp.zeros((), points.dtype))

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, step_size, evidence, stage, _ = carry
        variance = jnp.var(state.particles, axis=0) + 1e-6
        parameters = {"step_size": step_size[None], "inverse_mass_matrix": variance[None]}
        state, info = kernel(jax.random.fold_in(run_key, stage), state, num_moves, parameters)
        acceptance = jnp.mean(info.update_info.acceptance_rate)
        step_size = step_size * jnp.exp(acceptance - 0.8)
        return state, step_size, evidence + info.log_likelihood_increment, stage + 1, acceptance

    zero = jnp.zeros((), points.dtype)
    carry = (state, zero + 0.5, zero, jnp.int32(0), zero)
    unfinished: Callable[[tuple[Any, ...]], Array] = lambda c: (c[0].tempering_param < 1.0) & (c[3] < max_stages)  # noqa: E731
    carry = jax.lax.while_loop(unfinished, advance, carry)
    # Once at 1 a further stage weighs nothing anew: it resamples by the last weights and moves under the posterior.
    state, _, evidence, stages, acceptance = advance(carry)
    samples = jax.vmap(lambda point: prior.constrain(point)[0])(state.particles)
    return Particles(samples, evidence, state.tempering_param, stages, acceptance)
