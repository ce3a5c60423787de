"""DQN finds the optimal values of a small MDP through time limits, keeps its buffer in place, and learns CartPole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, train
from jaxalign.environments.cartpole import cartpole
from jaxalign.environments.pendulum import pendulum
from jaxalign.environments.tabular import tabular_environment
from jaxalign.mdp.gridworlds import gridworld
from jaxalign.mdp.planning import value_iteration
from jaxalign.rl.dqn import (
    Transitions,
    double_q_targets,
    dqn,
    empty_replay,
    epsilon_greedy,
    greedy,
    q_network,
    recall,
    remember,
)
from jaxalign.rl.rollout import evaluate

DISCOUNT = 0.8
SIZES = {"num_envs": 4, "num_steps": 8, "num_updates": 8, "replay_size": 512, "warmup": 256}


def grid():
    """A 2 x 3 grid whose moves cost 1 until the goal, cut off after 3 steps, which do not reach it from everywhere."""
    mdp = gridworld(2, 3, goal=5, discount=DISCOUNT)
    reward = -jnp.ones((6, 5))
    return mdp, reward, tabular_environment(mdp, reward, observe="index", max_steps=3)


def table(states, actions):
    return Network(lambda key: {"q": jnp.zeros((states, actions))}, lambda params, seen: params["q"][seen])


@pytest.fixture(scope="module")
def learner():
    """DQN on the grid: the algorithm, its jitted init, and its step, which is given the state for good."""
    algorithm = dqn(
        grid()[2], table(6, 5), optax.adam(0.05), **SIZES, discount=DISCOUNT, epsilon_end=0.5, epsilon_steps=64 * 32,
        target_rate=0.05,
    )  # fmt: skip
    return algorithm, jax.jit(algorithm.init), jax.jit(algorithm.step, donate_argnums=0)


def test_finds_the_optimal_values_through_truncation(learner):
    _, init, step = learner
    state, history = init(jax.random.key(0)), []
    for _ in range(200):
        state, metrics = step(state, None)
        history.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    mdp, reward, _ = grid()
    plan = value_iteration(mdp, reward)
    # Three steps cost 2.44: what lies beyond is only found if the cut is not taken for an end.
    assert plan.q.min() < -2.9
    np.testing.assert_allclose(state.params["q"][:5], plan.q[:5], atol=1e-3)
    history = {name: np.array([metrics[name] for metrics in history]) for name in history[0]}
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < 1e-4 < history["loss"][0]
    assert history["episodes"].sum() > 1000
    np.testing.assert_allclose(history["epsilon"][[0, 32, 64, 199]], [1.0, 0.75, 0.5, 0.5], rtol=1e-6)


def test_the_buffer_is_written_in_place(learner):
    _, init, step = learner
    state = init(jax.random.key(0))
    assert state.replay.written == SIZES["warmup"]
    before, place = np.array(state.replay.rows.observations), state.replay.rows.observations.unsafe_buffer_pointer()
    state, _ = step(state, None)
    assert state.replay.written == SIZES["warmup"] + 32
    assert state.replay.rows.observations.unsafe_buffer_pointer() == place
    changed = np.flatnonzero(state.replay.rows.observations != before)
    assert len(changed) > 10
    assert (changed // 32 == SIZES["warmup"] // 32).all()


def test_the_state_keeps_its_type_and_seeds_differ(learner):
    algorithm, init, _ = learner
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    new, metrics = jax.eval_shape(algorithm.step, state, None)
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)] for tree in (state, new)]
    assert types[0] == types[1]
    assert not any(weak for _, _, weak in types[0])
    assert all(x.shape == () for x in metrics.values())
    a, b = (np.asarray(init(jax.random.key(seed)).replay.rows.actions) for seed in (0, 1))
    assert (a != b).any()


def test_replay_is_a_ring_and_only_what_was_written_is_drawn():
    def rows(start):
        x = jnp.arange(start, start + 2.0)
        return Transitions(x[:, None], x.astype(int), x, x[:, None], x > 2)

    replay = empty_replay(rows(1), 6)
    write, draw = jax.jit(remember), jax.jit(recall, static_argnums=2)
    for start in (1.0, 3.0):
        replay = write(replay, rows(start))
    np.testing.assert_array_equal(np.unique(draw(jax.random.key(0), replay, 100).rewards), [1, 2, 3, 4])
    for start in (5.0, 7.0):
        replay = write(replay, rows(start))
    np.testing.assert_array_equal(replay.rows.rewards, [7, 8, 3, 4, 5, 6])
    for start in range(9, 37, 2):
        replay = write(replay, rows(start))
    assert 6 <= replay.written < 12
    np.testing.assert_array_equal(replay.rows.rewards, [31, 32, 33, 34, 35, 36])
    drawn = draw(jax.random.key(0), replay, 100)
    np.testing.assert_array_equal(np.unique(drawn.rewards), np.arange(31, 37))
    np.testing.assert_array_equal(drawn.observations[:, 0], drawn.rewards)
    np.testing.assert_array_equal(drawn.terminated, drawn.rewards > 2)


def test_epsilon_greedy_says_how_likely_its_actions_were():
    network = Network(lambda key: (), lambda params, seen: jnp.outer(seen, jnp.array([0.0, 2.0, 1.0])))
    act = epsilon_greedy(network, (), epsilon=0.3, num_actions=3)
    actions, log_probs = jax.jit(act)(jax.random.key(0), jnp.ones(10_000))
    np.testing.assert_allclose(np.bincount(actions) / 10_000, [0.1, 0.8, 0.1], atol=0.015)
    np.testing.assert_allclose(np.exp(log_probs), np.where(actions == 1, 0.8, 0.1), rtol=1e-5)
    assert greedy(network, ())(jax.random.key(0), jnp.ones(())) == 1


def test_double_q_targets():
    q, target_q = np.array([[0.0, 1.0], [3.0, 2.0]]), np.array([[9.0, 4.0], [5.0, 8.0]])
    rewards, terminated = np.array([1.0, 1.0]), np.array([False, True])
    targets = jax.jit(double_q_targets)
    np.testing.assert_allclose(targets(rewards, terminated, q, target_q, discount=0.5), [3.0, 1.0])
    # With one network it is plain Q-learning.
    np.testing.assert_allclose(targets(rewards, 0 * rewards, target_q, target_q, discount=0.5), [5.5, 5.0])
    assert np.isfinite(targets(rewards, np.array([0, 1]), q, target_q * [[1], [np.nan]], discount=0.5)).all()


def test_what_does_not_fit_is_named():
    environment = grid()[2]
    with pytest.raises(ValueError, match="warmup=100"):
        dqn(environment, table(6, 5), optax.sgd(0.1), **{**SIZES, "warmup": 100})
    with pytest.raises(ValueError, match="warmup"):
        dqn(environment, table(6, 5), optax.sgd(0.1), **{**SIZES, "warmup": 1024})
    for make in (q_network, lambda e: dqn(e, table(6, 5), optax.sgd(0.1), **SIZES)):
        with pytest.raises(ValueError, match="Discrete"):
            make(pendulum())


@pytest.mark.slow
def test_learns_cartpole():
    environment = cartpole()
    network = q_network(environment, hidden=(128, 128))
    algorithm = dqn(environment, network, optax.adam(5e-4), epsilon_steps=8_000)
    state, _ = jax.jit(functools.partial(train, algorithm, length=400))(jax.random.key(0), None)
    act = greedy(network, state.params)
    episodes = evaluate(jax.random.key(1), environment, act, episodes=32, max_steps=500)
    assert episodes.returns.mean() > 300
