"""Contextual bandits: one step, a context to see, an arm to pull, and a regret that is known exactly."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, valid_action
from jaxalign.types import Array, ArrayLike, Key


def linear_bandit(contexts: ArrayLike, weights: ArrayLike, *, noise: ArrayLike = 0.1) -> Environment:
    """One of C contexts, uniformly, seen as contexts[c] [D]; arm a pays weights[a] . contexts[c] + noise N(0, 1).

    contexts: [C, D]; weights: [A, D]; noise: the standard deviation, >= 0.
    Every step terminates. info["regret"] [] is the expected reward of the best arm less that of the one pulled.
    Raises ValueError unless contexts and weights are matrices of the same width D.
    """
    contexts, weights = jnp.asarray(contexts, float), jnp.asarray(weights, float)
    if contexts.ndim != 2 or weights.ndim != 2 or contexts.shape[1] != weights.shape[1]:
        raise ValueError(
            f"linear_bandit: contexts must be [C, D] and weights [A, D], got {contexts.shape} and {weights.shape}"
        )

    def pay(key: Key, mean: Array) -> Array:
        return mean + noise * jax.random.normal(key, mean.shape, mean.dtype)

    return _bandit("linear_bandit", contexts @ weights.T, pay, contexts)


def bernoulli_bandit(probability: ArrayLike) -> Environment:
    """One of C contexts, uniformly, seen as its number (Discrete(C)); arm a pays 1 with probability[c, a], else 0.

    probability: [C, A]. Every step terminates. info["regret"] [] is the expected reward of the best arm less that of
    the one pulled. Raises ValueError unless it is a matrix and, outside jit, its entries are in [0, 1].
    """
    probability = jnp.asarray(probability, float)
    if probability.ndim != 2:
        raise ValueError(f"bernoulli_bandit: probability must be [C, A], got {probability.shape}")
    if not isinstance(probability, jax.core.Tracer):
        values = np.asarray(probability)
        if not ((values >= 0.0) & (values <= 1.0)).all():
            raise ValueError(f"bernoulli_bandit: probability must be in [0, 1], got {values.min()}..{values.max()}")

    def pay(key: Key, mean: Array) -> Array:
        return jax.random.bernoulli(key, mean).astype(mean.dtype)

    return _bandit("bernoulli_bandit", probability, pay, None)


def bandit_regret(means: ArrayLike, policy: ArrayLike) -> Array:
    """mean_c ( max_a means[c, a] - sum_a policy[c, a] means[c, a] ), []: means, policy [C, A], rows of policy sum to 1.

    Expected rewards are `contexts @ weights.T` of a `linear_bandit`, `probability` of a `bernoulli_bandit`.

    >>> float(bandit_regret([[1.0, 0.5]], [[0.5, 0.5]]))
    0.25
    """
    means, policy = jnp.asarray(means), jnp.asarray(policy)
    if means.ndim != 2 or means.shape != policy.shape:
        raise ValueError(f"bandit_regret: means and policy must both be [C, A], got {means.shape} and {policy.shape}")
    return jnp.mean(jnp.max(means, axis=1) - jnp.sum(policy * means, axis=1))


def _bandit(name: str, means: Array, pay: Callable[[Key, Array], Array], features: Array | None) -> Environment:
    count, arms = Discrete(means.shape[0]), Discrete(means.shape[1])

    def observe(context: Array) -> Array:
        return context if features is None else features[context]

    def reset(key: Key) -> tuple[Array, Array]:
        context = count.sample(key)
        return observe(context), context

    def step(key: Key, context: Array, action: Array) -> TimeStep:
        valid = valid_action(name, arms, action)
        row = means[context]
        reward = jnp.where(valid, pay(key, row[action]), jnp.nan)
        info = {"regret": jnp.where(valid, jnp.max(row) - row[action], jnp.nan)}
        return TimeStep(observe(context), context, reward, jnp.ones((), bool), jnp.zeros((), bool), info)

    seen = count if features is None else Box(-np.inf, np.inf, features.shape[1:])
    return Environment(reset, step, seen, arms, name)
