"""Variational Bayesian IRL: a mean-field Gaussian with the exact tabular likelihood, and AVRIL without a model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm
from jaxalign.irl.bayesian import LogDensity, Prior, unconstrained
from jaxalign.irl.trajectories import Trajectories
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

LOG_2_PI = 1.8378770664093453


def mean_field(
    log_posterior: LogDensity,
    prior: Prior,
    optimizer: optax.GradientTransformation,
    *,
    num_samples: int = 8,
    initial_scale: ArrayLike = 0.1,
) -> Algorithm:
    """Fit q(point) = prod_d N(mean_d, exp(log_scale_d)^2) over unconstrained points; reward = constrain(point).

    loss = -elbo, elbo = E_q[log_posterior(reward) + log |det d reward / d point|] + entropy(q) <= log evidence, nats,
    by `num_samples` reparameterised draws a step; the entropy is exact.

    Args:
        log_posterior: reward [...] -> scalar, prior included; `log_posterior(mdp, ...)` of this package.
        initial_scale: of q at the start, around a draw of the prior.

    Returns an Algorithm whose params are {"mean": [D], "log_scale": [D]} and whose batch is ignored (None will do).
    Metrics: "loss" and "entropy". Draw rewards by `mean_field_samples`. Kucukelbir et al. 2017.
    """
    density = unconstrained(log_posterior, prior)

    def init(key: Key) -> Params:
        mean = prior.unconstrain(prior.sample(key))
        return {"mean": mean, "log_scale": jnp.full_like(mean, jnp.log(initial_scale))}

    def objective(params: Params, _: Any, key: Key) -> tuple[Array, Metrics]:
        points = _points(key, params, num_samples)
        entropy = jnp.sum(params["log_scale"]) + 0.5 * params["mean"].size * (1.0 + LOG_2_PI)
        return -jnp.mean(jax.vmap(density)(points)) - entropy, {"entropy": entropy}

    return gradient_algorithm(Network(init, density), objective, optimizer)


def mean_field_samples(key: Key, params: Params, prior: Prior, *, num_samples: int) -> Array:
    """Rewards [num_samples, ...] drawn from the q that `mean_field` fitted; params: {"mean": [D], "log_scale": [D]}."""
    return jax.vmap(lambda point: prior.constrain(point)[0])(_points(key, params, num_samples))


def _points(key: Key, params: Params, num_samples: int) -> Array:
    mean, scale = params["mean"], jnp.exp(params["log_scale"])
    return mean[None] + scale[None] * jax.random.normal(key, (num_samples, *mean.shape), mean.dtype)


class DemonstratedTransitions(NamedTuple):
    """Demonstrated steps, as AVRIL learns from them.

    observation, next_observation: [B, ...], what the networks take
    action, next_action: [B] int
    weight: [B], 1 for a step and 0 for padding
    continues: bool [B], the demonstration has a next step, so next_observation and next_action are real
    terminated: bool [B], the step ended the episode, so that what follows is worth 0
    """

    observation: Array
    action: Array
    next_observation: Array
    next_action: Array
    weight: Array
    continues: Array
    terminated: Array


def demonstrated_transitions(
    trajectories: Trajectories, features: Array, *, terminated: Array | None = None
) -> DemonstratedTransitions:
    """The N T steps of demonstrations with features [S, ...] as observations, padding included with weight 0.

    terminated: bool [N], whether each demonstration ended in a terminal state. None: unknown, and no last step says
    anything of what follows it.
    """
    states, actions, mask = trajectories
    num, length = states.shape
    after = lambda x: jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)  # noqa: E731
    continues = mask & after(mask)
    ended = jnp.zeros(num, bool) if terminated is None else terminated
    parts = (states, actions, after(states), after(actions), mask, continues, mask & ~continues & ended[:, None])
    state, action, next_state, next_action, real, continues, ended = (x.reshape(num * length) for x in parts)
    weight = real.astype(features.dtype)
    return DemonstratedTransitions(features[state], action, features[next_state], next_action, weight, continues, ended)


def avril(
    q_network: Network,
    reward_network: Network,
    optimizer: optax.GradientTransformation,
    *,
    beta: ArrayLike,
    discount: ArrayLike,
    constraint_weight: ArrayLike = 1.0,
    prior_mean: ArrayLike = 0.0,
    prior_scale: ArrayLike = 1.0,
) -> Algorithm:
    """Approximate variational reward imitation learning: Bayesian IRL from demonstrated steps, no dynamics needed.

    With Q = q_network(observation), q(r | s, a) = N(m, exp(l)^2), (m, l) = reward_network(observation), per step
        loss = -log_softmax(beta Q)[a]                                       the Boltzmann likelihood
               + sum_a KL(q(r | s, a) || N(prior_mean, prior_scale^2))
               - constraint_weight log q(Q[s, a] - discount Q[s', a'] | s, a)
    averaged over the batch's weight. The last term makes Q the value of the uncertain reward; it is left out where a
    demonstration breaks off, and Q[s', a'] is 0 where the episode ended.

    Args:
        q_network: apply(params, observation [B, ...]) -> [B, A].
        reward_network: apply(params, observation [B, ...]) -> [B, 2 A], all m then all l.
        beta: per unit of reward. discount: of the demonstrator.

    Returns an Algorithm with params {"q", "reward"} and DemonstratedTransitions as batches. Metrics, nats per step:
    "loss", "log_likelihood", "kl", "constraint". Chan & van der Schaar 2021, eq. 8; there KL and constraint are of the
    demonstrated states, as here.
    """

    def init(key: Key) -> Params:
        q_key, reward_key = jax.random.split(key)
        return {"q": q_network.init(q_key), "reward": reward_network.init(reward_key)}

    def objective(params: Params, batch: DemonstratedTransitions, _: Key) -> tuple[Array, Metrics]:
        at = lambda values, action: jnp.take_along_axis(values, action[:, None], axis=1)[:, 0]  # noqa: E731
        q = q_network.apply(params["q"], batch.observation)
        mean, log_scale = jnp.split(reward_network.apply(params["reward"], batch.observation), 2, axis=-1)
        log_likelihood = at(jax.nn.log_softmax(beta * q, axis=-1), batch.action)
        ratio = jnp.exp(2.0 * log_scale) + (mean - prior_mean) ** 2
        kl = jnp.sum(jnp.log(prior_scale) - log_scale + ratio / (2.0 * jnp.square(prior_scale)) - 0.5, axis=-1)
        next_q = at(q_network.apply(params["q"], batch.next_observation), batch.next_action)
        implied = at(q, batch.action) - discount * jnp.where(batch.continues, next_q, 0.0)
        m, log_s = at(mean, batch.action), at(log_scale, batch.action)
        log_density = -0.5 * ((implied - m) * jnp.exp(-log_s)) ** 2 - log_s - 0.5 * LOG_2_PI
        constraint = jnp.where(batch.continues | batch.terminated, log_density, 0.0)
        total = jnp.maximum(jnp.sum(batch.weight), 1.0)
        per_step = {"log_likelihood": log_likelihood, "kl": kl, "constraint": constraint}
        metrics = {name: jnp.sum(batch.weight * x) / total for name, x in per_step.items()}
        loss = -metrics["log_likelihood"] + metrics["kl"] - constraint_weight * metrics["constraint"]
        return loss, metrics

    return gradient_algorithm(Network(init, q_network.apply), objective, optimizer)
