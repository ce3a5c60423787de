"""Rewards as networks, and the measures by which learned rewards are judged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Network
from jaxalign.irl import evaluate_reward, expected_value_difference, linear_reward, policy_divergence
from jaxalign.mdp import TabularMDP, occupancy_measure, random_mdp, soft_value_iteration, value_iteration


def two_actions():
    """One state; the first action earns 1."""
    return TabularMDP(jnp.ones((1, 2, 1)), jnp.ones(1), jnp.zeros(1, bool), 0.5), jnp.array([[1.0, 0.0]])


def test_value_difference_by_hand():
    mdp, reward = two_actions()
    always = lambda action: jnp.log(jax.nn.one_hot(jnp.array([action]), 2))  # noqa: E731
    np.testing.assert_allclose(expected_value_difference(mdp, reward, always(0)), 0.0, atol=1e-5)
    np.testing.assert_allclose(expected_value_difference(mdp, reward, always(1)), 2.0, rtol=1e-5)
    uniform = jnp.full((1, 2), -np.log(2.0))
    np.testing.assert_allclose(expected_value_difference(mdp, reward, uniform), 1.0, rtol=1e-5)
    np.testing.assert_allclose(expected_value_difference(mdp, reward, always(1), horizon=2), 1.5, rtol=1e-5)


def test_value_difference_is_the_occupancy_difference():
    mdp = random_mdp(jax.random.key(0), 6, 3)
    reward = jax.random.normal(jax.random.key(1), (6, 3))
    log_policy = soft_value_iteration(mdp, reward, temperature=0.5).log_policy
    best = occupancy_measure(mdp, jnp.log(value_iteration(mdp, reward).policy))
    gap = jnp.sum((best - occupancy_measure(mdp, log_policy)) * reward)
    np.testing.assert_allclose(expected_value_difference(mdp, reward, log_policy), gap, rtol=1e-3)
    assert gap > 0.0


def test_policy_divergence_by_hand_and_its_limits():
    mdp, _ = two_actions()
    p, q = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.75]]))
    np.testing.assert_allclose(policy_divergence(mdp, p, q), 0.5 * np.log(2.0) + 0.5 * np.log(2.0 / 3.0), rtol=1e-5)
    np.testing.assert_allclose(policy_divergence(mdp, p, p), 0.0, atol=1e-7)
    first = jnp.log(jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(policy_divergence(mdp, first, p), np.log(2.0), rtol=1e-5)
    assert np.isposinf(policy_divergence(mdp, p, first))


def test_policy_divergence_against_numpy_and_under_vmap():
    mdp = random_mdp(jax.random.key(2), 5, 3, discount=0.7)
    logits = jax.random.normal(jax.random.key(3), (2, 4, 5, 3))
    p, q = jax.nn.log_softmax(logits, axis=-1)
    together = jax.jit(jax.vmap(lambda p, q: policy_divergence(mdp, p, q)))(p, q)
    transition, initial = np.asarray(mdp.transition, np.float64), np.asarray(mdp.initial, np.float64)
    for i in range(4):
        policy = np.exp(np.asarray(p[i], np.float64))
        between = np.einsum("sa,saz->sz", policy, transition)
        visits = np.linalg.solve(np.eye(5) - 0.7 * between.T, initial)
        kl = (policy * np.asarray(p[i] - q[i], np.float64)).sum(axis=1)
        np.testing.assert_allclose(together[i], (visits * kl).sum() / visits.sum(), rtol=1e-4)


def test_a_linear_reward_and_its_shapes():
    network = linear_reward(3)
    params = {"weights": jnp.array([1.0, 2.0, -1.0])}
    features = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 1.0]])
    np.testing.assert_allclose(evaluate_reward(network, params, features), [1.0, 0.5])
    np.testing.assert_allclose(evaluate_reward(network, params, jnp.stack([features, features], 1)).shape, (2, 2))
    assert network.init(jax.random.key(0))["weights"].shape == (3,)
    column = Network(network.init, lambda params, x: network.apply(params, x)[:, None])
    np.testing.assert_allclose(evaluate_reward(column, params, features), [1.0, 0.5])
    with pytest.raises(ValueError, match="reward network"):
        evaluate_reward(Network(network.init, lambda params, x: jnp.zeros((3, 1))), params, features)
