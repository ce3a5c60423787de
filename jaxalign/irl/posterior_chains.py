"""Posterior sampling as an Algorithm: one step is one move of every chain, so a long run can be watched and resumed.

`bayesian_sampling.hmc` is the same in one call. Extra: `pip install "jaxalign[bayes]"`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Algorithm, TrainState
from jaxalign.irl.bayesian import Prior, unconstrained
from jaxalign.irl.bayesian_sampling import import_blackjax
from jaxalign.types import Array, ArrayLike, Key, Metrics


class ChainState(NamedTuple):
    """What the chains have learned of the posterior's scale, and their samples.

    step_size: scalar, of the next move
    dual_averaging: the state of its adaptation
    variance: [D], of points, the inverse mass of every chain
    moments: [2, D], sums of points and of their squares over all chains since the window began
    samples: [num_samples, C, D] points; those not drawn yet are 0
    """

    step_size: Array
    dual_averaging: Any
    variance: Array
    moments: Array
    samples: Array


def posterior_chains(
    log_posterior: Callable[[Array, Any], Array],
    prior: Prior,
    *,
    num_chains: int,
    num_samples: int,
    num_warmup: int,
    num_integration_steps: int = 8,
    jitter: ArrayLike = 0.3,
    target_acceptance: float = 0.8,
) -> Algorithm:
    """Hamiltonian Monte Carlo in C chains that share one adapted step size and diagonal mass.

    Steps 0..num_warmup-1 adapt: the step size at every step (dual averaging to `target_acceptance`), the mass at the
    end of each of the first three quarters, to the variance of all chains' points over that quarter. The following
    `num_samples` steps are kept; further ones move the chains and keep nothing.

    Args:
        log_posterior: (reward [...], batch) -> scalar, the prior included; batch is the step's, None if there is none.
        prior: chains start from its draws and move in its unconstrained space, points [D].
        jitter: each step's size is multiplied by U(1 - jitter, 1 + jitter), lest trajectories close on themselves.

    state.params: {"points": [C, D]}; `chain_samples(state, prior)` gives the rewards.
    Metrics: "loss" (the mean over chains of -log_posterior, nats), "acceptance", "step_size", "divergent" (a share).
    Raises ImportError without the extra `bayes`, ValueError where a count is too small (4 warm-up steps at least).
    """
    if min(num_chains, num_samples, num_integration_steps) < 1 or num_warmup < 4:
        raise ValueError(
            f"posterior_chains: needs num_chains, num_samples, num_integration_steps >= 1 and num_warmup >= 4, got "
            f"{num_chains}, {num_samples}, {num_integration_steps}, {num_warmup}"
        )
    blackjax = import_blackjax()
    kernel = blackjax.hmc.build_kernel()
    begin, adapt, averaged = blackjax.adaptation.step_size.dual_averaging_adaptation(target_acceptance)
    quarter = num_warmup // 4

    def init(key: Key) -> TrainState:
        draw_key, run_key = jax.random.split(key)
        rewards = jax.vmap(prior.sample)(jax.random.split(draw_key, num_chains))
        points = jax.vmap(prior.unconstrain)(rewards)
        size = points.shape[1]
        step_size = jnp.full((), 0.1, points.dtype)
        chains = ChainState(
            step_size,
            _strong(begin(step_size)),
            jnp.ones(size, points.dtype),
            jnp.zeros((2, size), points.dtype),
            jnp.zeros((num_samples, *points.shape), points.dtype),
        )
        return TrainState(jnp.zeros((), jnp.int32), {"points": points}, chains, run_key)

    def learn(chains: ChainState, step: Array, points: Array, acceptance: Array) -> ChainState:
        """One step of warm-up."""
        moments = chains.moments + jnp.stack([points.sum(axis=0), (points**2).sum(axis=0)])
        dual_averaging = _strong(adapt(chains.dual_averaging, acceptance))
        count = quarter * num_chains
        mean = moments[0] / count
        # Shrunk a little towards 1, the prior's own scale, as few points say little.
        variance = (count * jnp.maximum(moments[1] / count - mean**2, 0.0) + 1.0) / (count + 1.0)
        ends = ((step + 1) % quarter == 0) & (step + 1 <= 3 * quarter)
        size = jnp.exp(dual_averaging.log_step_size)
        size = jnp.where(step + 1 == num_warmup, averaged(dual_averaging), size)
        chosen = jax.tree.map(
            lambda new, old: jnp.where(ends, new, old),
            (_strong(begin(size)), variance, jnp.zeros_like(moments)),
            (dual_averaging, chains.variance, moments),
        )
        return ChainState(size, *chosen, chains.samples)

    def keep(chains: ChainState, step: Array, points: Array, acceptance: Array) -> ChainState:
        """One step after it."""
        place = step - num_warmup
        at = jnp.minimum(place, num_samples - 1)
        kept = jnp.where(place < num_samples, points, chains.samples[at])
        return chains._replace(samples=chains.samples.at[at].set(kept))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key, jitter_key, move_key = jax.random.split(state.key, 3)
        chains = state.opt_state
        density = unconstrained(lambda reward: log_posterior(reward, batch), prior)
        scale = jax.random.uniform(jitter_key, minval=1.0 - jitter, maxval=1.0 + jitter)

        def move(key: Key, point: Array) -> tuple[Array, Array, Array, Array]:
            start = blackjax.hmc.init(point, density)
            moved, info = kernel(
                key, start, density, chains.step_size * scale, chains.variance, num_integration_steps
            )
            value = moved.logdensity - prior.constrain(moved.position)[1]
            return moved.position, value, info.acceptance_rate, info.is_divergent

        moved = jax.vmap(move)(jax.random.split(move_key, num_chains), state.params["points"])
        points, values, acceptances, divergent = moved
        acceptance = jnp.mean(acceptances)
        chains = jax.lax.cond(state.step < num_warmup, learn, keep, chains, state.step, points, acceptance)
        metrics = {
            "loss": -jnp.mean(values),
            "acceptance": acceptance,
            "step_size": chains.step_size,
            "divergent": jnp.mean(divergent.astype(points.dtype)),
        }
        return state.replace(step=state.step + 1, params={"points": points}, opt_state=chains, key=key), metrics

    return Algorithm(init, step)


def chain_samples(state: TrainState, prior: Prior) -> Array:
    """The rewards that `posterior_chains` kept, [C, num_samples, ...]; those not drawn yet are the point 0's."""
    rewards = jax.vmap(jax.vmap(lambda point: prior.constrain(point)[0]))(state.opt_state.samples)
    return jnp.swapaxes(rewards, 0, 1)


def _strong(tree: Any) -> Any:
    """The same arrays with types that a loop's carry keeps."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)
