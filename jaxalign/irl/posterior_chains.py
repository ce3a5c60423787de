"""Posterior sampling by gradients as an Algorithm: one step is one move of every chain, so a run can be resumed.

`bayesian_sampling.hmc` and `nuts` are whole runs of it. Extra: `pip install "jaxalign[bayes]"`.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Algorithm, TrainState
from jaxalign.irl.bayesian import Prior, unconstrained
from jaxalign.types import Array, ArrayLike, Key, Metrics


class ChainState(NamedTuple):
    """What C chains have learned of the posterior's scale, and what they keep of it.

    step_size: scalar, of the next move
    averaging: the state of its adaptation
    variance: [D], of points: the inverse mass of every chain
    samples: [num_samples, C, D] points; those not drawn yet are 0
    log_posterior: [num_samples, C] of their rewards
    accepted: [C], acceptance rates summed over the samples
    divergences: [C] int32, samples whose trajectory's energy went astray
    """

    step_size: Array
    averaging: Any
    variance: Array
    samples: Array
    log_posterior: Array
    accepted: Array
    divergences: Array


def posterior_chains(
    log_posterior: Callable[[Array, Any], Array],
    prior: Prior,
    *,
    num_chains: int,
    num_samples: int,
    num_warmup: int,
    num_integration_steps: int = 8,
    kernel: Callable[..., tuple[Any, Any]] | None = None,
    jitter: ArrayLike = 0.3,
    target_acceptance: ArrayLike = 0.8,
) -> Algorithm:
    """Hamiltonian Monte Carlo in C chains that share one adapted step size and diagonal mass.

    In each of the first `num_warmup` steps the inverse mass moves towards the variance over chains and the step size by
    dual averaging of the mean acceptance rate (Nesterov); chains adapt together because C of them know the scale of the
    posterior sooner than one. The next `num_samples` steps are kept; further ones move the chains and keep nothing.

    Args:
        log_posterior: (reward [...], batch) -> scalar, the prior included; batch is the step's, None if there is none.
        prior: chains start from its draws and move in its unconstrained space, points [D].
        num_integration_steps: gradients of a move. All chains take as many, so under vmap none waits for another.
        kernel: another one of BlackJAX's, (key, state, log_density, step_size, inverse_mass) -> (state, info).
        jitter: each step's size is multiplied by U(1 - jitter, 1 + jitter), lest trajectories close on themselves.
        target_acceptance: lower it to about 0.65 where the hard maximum of Q* makes the posterior rough.

    state.params: {"points": [C, D]}; `chain_samples(state, prior)` gives the rewards.
    Metrics: "loss" (the mean over chains of -log_posterior, nats), "acceptance", "step_size", "divergent" (a share).
    Raises ImportError without the extra `bayes`, ValueError with fewer than 2 chains or a count below 1.
    """
    if num_chains < 2 or min(num_samples, num_warmup, num_integration_steps) < 1:
        raise ValueError(
            f"posterior_chains: needs {num_chains=} >= 2, {num_samples=} >= 1, {num_warmup=} >= 1 and "
            f"{num_integration_steps=} >= 1"
        )
    blackjax = import_blackjax()
    if kernel is None:
        kernel = functools.partial(blackjax.hmc.build_kernel(), num_integration_steps=num_integration_steps)
    begin, update, average = blackjax.adaptation.step_size.dual_averaging_adaptation(target_acceptance)

    def init(key: Key) -> TrainState:
        draw_key, run_key = jax.random.split(key)
        rewards = jax.vmap(prior.sample)(jax.random.split(draw_key, num_chains))
        points = jax.vmap(prior.unconstrain)(rewards)
        step_size = jnp.full((), 0.1, points.dtype)
        chains = _nothing_kept(points, num_samples, step_size, _strong(begin(step_size)))
        return TrainState(jnp.zeros((), jnp.int32), {"points": points}, chains, run_key)

    def adapt(chains: ChainState, step: Array, points: Array, values: Array, info: Any) -> ChainState:
        averaging = _strong(update(chains.averaging, jnp.mean(info.acceptance_rate)))
        # These weights make it the mean over time with weight ~ time, which forgets the start.
        spread = jnp.var(points, axis=0, ddof=1)
        variance = chains.variance + 2.0 / (step + 2.0) * (spread - chains.variance)
        step_size = jnp.where(step + 1 == num_warmup, average(averaging), jnp.exp(averaging.log_step_size))
        return chains._replace(step_size=step_size, averaging=averaging, variance=variance)

    def keep(chains: ChainState, step: Array, points: Array, values: Array, info: Any) -> ChainState:
        return _kept(chains, step - num_warmup, points, values, info)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key, jitter_key, move_key = jax.random.split(state.key, 3)
        chains = state.opt_state
        density = unconstrained(lambda reward: log_posterior(reward, batch), prior)
        step_size = chains.step_size * jax.random.uniform(jitter_key, minval=1.0 - jitter, maxval=1.0 + jitter)

        def move(key: Key, point: Array) -> tuple[Array, Array, Any]:
            moved, info = kernel(key, blackjax.hmc.init(point, density), density, step_size, chains.variance)
            return moved.position, moved.logdensity - prior.constrain(moved.position)[1], info

        points, values, info = jax.vmap(move)(jax.random.split(move_key, num_chains), state.params["points"])
        chains = jax.lax.cond(state.step < num_warmup, adapt, keep, chains, state.step, points, values, info)
        metrics = {
            "loss": -jnp.mean(values),
            "acceptance": jnp.mean(info.acceptance_rate),
            "step_size": chains.step_size,
            "divergent": jnp.mean(info.is_divergent.astype(points.dtype)),
        }
        return state.replace(step=state.step + 1, params={"points": points}, opt_state=chains, key=key), metrics

    return Algorithm(init, step)


def _nothing_kept(points: Array, num_samples: int, step_size: Array, averaging: Any) -> ChainState:
    chains, dtype = len(points), points.dtype
    return ChainState(
        step_size,
        averaging,
        jnp.var(points, axis=0, ddof=1),
        jnp.zeros((num_samples, *points.shape), dtype),
        jnp.zeros((num_samples, chains), dtype),
        jnp.zeros(chains, dtype),
        jnp.zeros(chains, jnp.int32),
    )


def _kept(chains: ChainState, place: Array, points: Array, values: Array, info: Any) -> ChainState:
    """The state with sample number `place` in it, if there is room."""
    most = len(chains.samples)
    at, room = jnp.minimum(place, most - 1), place < most
    return chains._replace(
        samples=chains.samples.at[at].set(jnp.where(room, points, chains.samples[at])),
        log_posterior=chains.log_posterior.at[at].set(jnp.where(room, values, chains.log_posterior[at])),
        accepted=chains.accepted + jnp.where(room, info.acceptance_rate, 0.0),
        divergences=chains.divergences + (room & info.is_divergent),
    )


def chain_samples(state: TrainState, prior: Prior) -> Array:
    """The rewards that `posterior_chains` kept, [C, num_samples, ...]; those not drawn yet are the point 0's."""
    rewards = jax.vmap(jax.vmap(lambda point: prior.constrain(point)[0]))(state.opt_state.samples)
    return jnp.swapaxes(rewards, 0, 1)


def import_blackjax() -> ModuleType:
    """BlackJAX, or an ImportError that says how to get it."""
    try:
        import blackjax
    except ImportError as error:
        raise ImportError('sampling by gradients needs BlackJAX: pip install "jaxalign[bayes]"') from error
    return blackjax


def _strong(tree: Any) -> Any:
    """The same numbers without weak types, which a loop's carry cannot keep."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
