"""Posterior samples by gradients: Hamiltonian Monte Carlo, NUTS and tempered sequential Monte Carlo, through BlackJAX.

Chains run in the unconstrained space of the prior and come back as rewards. Extra: `pip install "jaxalign[bayes]"`.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.irl.bayesian import LogDensity, Prior, unconstrained
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

    All chains take as many gradients, so under vmap none waits for another. In each warm-up step the inverse mass moves
    towards the variance over chains and the step size by dual averaging of the mean acceptance rate (Nesterov); chains
    adapt together because C of them know the scale of the posterior sooner than one.

    Args:
        log_posterior: reward [...] -> scalar, the prior included. Chains start from draws of the prior.
        jitter: each step's size is multiplied by U(1 - jitter, 1 + jitter), lest trajectories close on themselves.
        target_acceptance: lower it to about 0.65 where the hard maximum of Q* makes the posterior rough.

    Returns Chains of rewards [C, num_samples, ...]. Raises ImportError without the extra `bayes`, ValueError with fewer
    than 2 chains. Neal 2011, "MCMC using Hamiltonian dynamics".
    """
    options = {"num_integration_steps": num_integration_steps}
    kernel = functools.partial(import_blackjax().hmc.build_kernel(), **options)
    counts = (num_chains, num_samples, num_warmup)
    return _chains(kernel, key, log_posterior, prior, *counts, target_acceptance, jitter)


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
    kernel = import_blackjax().nuts.build_kernel()
    return _chains(kernel, key, log_posterior, prior, num_chains, num_samples, num_warmup, target_acceptance, 0.0)


def _chains(
    kernel: Callable[..., Any],
    key: Key,
    log_posterior: LogDensity,
    prior: Prior,
    num_chains: int,
    num_samples: int,
    num_warmup: int,
    target_acceptance: ArrayLike,
    jitter: ArrayLike,
) -> Chains:
    if min(num_chains - 1, num_samples, num_warmup) < 1:
        raise ValueError(f"needs {num_chains=} >= 2, {num_samples=} >= 1 and {num_warmup=} >= 1")
    blackjax = import_blackjax()
    density = unconstrained(log_posterior, prior)
    begin, update, average = blackjax.adaptation.step_size.dual_averaging_adaptation(target_acceptance)
    start_key, warmup_key, run_key = jax.random.split(key, 3)

    def move(key: Key, states: Any, step_size: Array, variance: Array) -> tuple[Any, Any]:
        jitter_key, move_key = jax.random.split(key)
        step_size = step_size * jax.random.uniform(jitter_key, minval=1.0 - jitter, maxval=1.0 + jitter)
        keys = jax.random.split(move_key, num_chains)
        return jax.vmap(lambda key, state: kernel(key, state, density, step_size, variance))(keys, states)

    def warm_up(carry: tuple[Any, Array, Any], inputs: tuple[Array, Key]) -> tuple[tuple[Any, Array, Any], None]:
        states, variance, averaging = carry
        time, key = inputs
        states, info = move(key, states, jnp.exp(averaging.log_step_size), variance)
        # The weights make it the mean over time with weight ~ time, which forgets the start.
        spread = jnp.var(states.position, axis=0, ddof=1)
        variance = variance + 2.0 / (time + 2.0) * (spread - variance)
        return (states, variance, _strong(update(averaging, jnp.mean(info.acceptance_rate)))), None

    def sample(states: Any, key: Key) -> tuple[Any, tuple[Array, ...]]:
        states, info = move(key, states, step_size, variance)
        rewards, log_jacobians = jax.vmap(prior.constrain)(states.position)
        return states, (rewards, states.logdensity - log_jacobians, info.acceptance_rate, info.is_divergent)

    starts = jax.vmap(lambda k: prior.unconstrain(prior.sample(k)))(jax.random.split(start_key, num_chains))
    states = jax.vmap(lambda point: blackjax.hmc.init(point, density))(starts)
    carry = (states, jnp.var(starts, axis=0, ddof=1), _strong(begin(jnp.full((), 0.1, starts.dtype))))
    inputs = (jnp.arange(num_warmup, dtype=starts.dtype), jax.random.split(warmup_key, num_warmup))
    (states, variance, averaging), _ = jax.lax.scan(warm_up, carry, inputs)
    step_size = average(averaging)
    _, outputs = jax.lax.scan(sample, states, jax.random.split(run_key, num_samples))
    samples, values, acceptance, divergent = (jnp.moveaxis(x, 0, 1) for x in outputs)
    return Chains(samples, values, jnp.mean(acceptance, axis=1), jnp.sum(divergent, axis=1), step_size)


def _strong(tree: Any) -> Any:
    """The same numbers without weak types, which a loop's carry cannot keep."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


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


def import_blackjax() -> ModuleType:
    """BlackJAX, or an ImportError that says how to get it."""
    try:
        import blackjax
    except ImportError as error:
        raise ImportError('sampling by gradients needs BlackJAX: pip install "jaxalign[bayes]"') from error
    return blackjax
