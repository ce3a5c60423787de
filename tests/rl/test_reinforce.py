"""REINFORCE has the exact policy gradient on average, and learns a bandit and CartPole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import train
from jaxalign.environments.bandit import bandit_regret, bernoulli_bandit
from jaxalign.environments.cartpole import cartpole
from jaxalign.environments.tabular import tabular_environment
from jaxalign.mdp.gridworlds import gridworld
from jaxalign.mdp.planning import occupancy_measure
from jaxalign.rl import policies
from jaxalign.rl.actor_critic import ActorCritic, act_with, actor_critic
from jaxalign.rl.group_relative import grpo_advantages, rloo_advantages
from jaxalign.rl.reinforce import reinforce
from jaxalign.rl.rollout import evaluate

OPTIMIZED = True


def table(start):
    """A policy with one logit for each state (seen as its number) and action, from `start` [S, A]."""
    return ActorCritic(
        lambda key: {"logits": jnp.asarray(start, jnp.float32)},
        lambda params, states: policies.categorical(params["logits"][states]),
        lambda params, states: jnp.zeros(states.shape),
    )


@pytest.mark.parametrize("advantages", [rloo_advantages, pytest.param(None, marks=pytest.mark.slow)])
def test_a_step_follows_the_exact_gradient(advantages):
    # Episodes of at most 3 steps; some end sooner, in the goal, and the columns go on with others after that.
    mdp = gridworld(2, 2, goal=3, discount=1.0, stay=False)
    rng = np.random.default_rng(0)
    reward, start = 2 * rng.normal(size=(4, 4)), jnp.asarray(0.5 * rng.normal(size=(4, 4)), jnp.float32)
    algorithm = reinforce(
        tabular_environment(mdp, reward, observe="index"), table(start), optax.sgd(1.0), num_steps=3, num_starts=4096,
        group_size=4, advantages=advantages,
    )  # fmt: skip
    state, metrics = jax.jit(lambda key: algorithm.step(algorithm.init(key), None))(jax.random.key(0))

    def value(logits):
        return jnp.sum(occupancy_measure(mdp, jax.nn.log_softmax(logits), horizon=3) * reward)

    expected, gradient = jax.jit(jax.value_and_grad(value))(start)
    assert np.abs(gradient).max() > 0.2
    np.testing.assert_allclose(state.params["logits"] - start, gradient, atol=0.03)
    np.testing.assert_allclose(metrics["episode/return"], expected, atol=0.08)
    assert 1.0 < metrics["episode/length"] < 3.0
    assert 0.0 < metrics["episode/finished"] < 1.0


def test_learns_the_best_arms_of_a_bandit_unless_entropy_pays_more():
    probability = np.array([[0.2, 0.8, 0.5], [0.9, 0.1, 0.3]])

    @jax.jit
    def learn(entropy_coefficient):
        algorithm = reinforce(
            bernoulli_bandit(probability), table(np.zeros((2, 3))), optax.adam(0.1), num_steps=1,
            advantages=grpo_advantages, entropy_coefficient=entropy_coefficient,
        )  # fmt: skip
        return train(algorithm, jax.random.key(1), None, length=150)

    state, metrics = learn(0.0)
    assert bandit_regret(probability, jax.nn.softmax(state.params["logits"])) < 0.05
    assert all(np.isfinite(x).all() and x.shape == (150,) for x in metrics.values())
    np.testing.assert_array_equal(metrics["episode/length"], 1.0)
    np.testing.assert_allclose(metrics["entropy"][0], np.log(3), rtol=1e-5)
    state, _ = learn(100.0)
    np.testing.assert_allclose(jax.nn.softmax(state.params["logits"]), 1 / 3, atol=0.05)


def test_groups_of_one_have_no_others():
    bandit = bernoulli_bandit(np.ones((1, 2)))
    algorithm = reinforce(bandit, table(np.zeros((1, 2))), optax.sgd(1.0), num_steps=1, group_size=1)
    with pytest.raises(ValueError, match="at least two"):
        jax.eval_shape(lambda key: algorithm.step(algorithm.init(key), None), jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages, None])
def test_learns_cartpole(advantages):
    environment = cartpole(max_steps=200)
    model = actor_critic(environment, hidden=(32,))
    algorithm = reinforce(environment, model, optax.adam(1e-2), num_steps=200, advantages=advantages)
    state, _ = jax.jit(functools.partial(train, algorithm, length=100))(jax.random.key(0), None)
    run = functools.partial(evaluate, episodes=32, max_steps=200)
    episodes = run(jax.random.key(1), environment, act_with(model, state.params, greedy=True))
    assert episodes.returns.mean() > 190
