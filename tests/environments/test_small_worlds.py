"""Bandits, token sequences and sparse rewards, whose best returns and regrets are known."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments import bandit
from jaxalign.environments.bandit import bandit_regret, bernoulli_bandit, linear_bandit
from jaxalign.environments.sparse_reward import deep_sea, key_door
from jaxalign.environments.token_mdp import one_hot_tokens, token_mdp

KEY = jax.random.key(0)
CONTEXTS, WEIGHTS = np.array([[1.0, 0.0], [0.5, 2.0]]), np.array([[1.0, -1.0], [0.0, 0.5], [0.25, 0.0]])
MEANS = CONTEXTS @ WEIGHTS.T  # [[1, 0, .25], [-1.5, 1, .125]]


def follow(environment, actions):
    """TimeSteps [T] of a fixed list of actions, without resets."""

    @jax.jit
    def run(actions):
        def advance(state, action):
            new = environment.step(KEY, state, action)
            return new.state, new._replace(state=None)

        return jax.lax.scan(advance, environment.reset(KEY)[1], actions)[1]

    return run(jnp.asarray(actions, jnp.int32))


def pulls(environment, count, arms):
    """What `count` episodes with uniformly random arms give: observation, arm, reward, regret, [count] each."""

    def one(key):
        reset_key, arm_key, step_key = jax.random.split(key, 3)
        seen, state = environment.reset(reset_key)
        arm = jax.random.randint(arm_key, (), 0, arms)
        new = environment.step(step_key, state, arm)
        return seen, arm, new.reward, new.info["regret"], new.terminated

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, count))


def test_linear_bandit_pays_its_means_and_knows_its_regret():
    seen, arm, reward, regret, ended = pulls(linear_bandit(CONTEXTS, WEIGHTS, noise=0.5), 20_000, 3)
    assert ended.all()
    context = (np.asarray(seen)[:, 1] > 0).astype(int)
    for c, a in itertools.product(range(2), range(3)):
        here = (context == c) & (np.asarray(arm) == a)
        error = 0.5 / np.sqrt(here.sum())
        np.testing.assert_allclose(np.asarray(reward)[here].mean(), MEANS[c, a], atol=4 * error)
        np.testing.assert_allclose(np.asarray(reward)[here].std(), 0.5, rtol=0.06)
        np.testing.assert_allclose(np.asarray(regret)[here], MEANS[c].max() - MEANS[c, a], atol=1e-6)
    uniform = bandit_regret(MEANS, np.full((2, 3), 1 / 3))
    np.testing.assert_allclose(regret.mean(), uniform, atol=4 * regret.std() / np.sqrt(20_000))
    best = np.eye(3)[MEANS.argmax(1)]
    assert bandit_regret(MEANS, best) == 0.0
    assert doctest.testmod(bandit).failed == 0


def test_bernoulli_bandit_pays_one_as_often_as_it_should():
    probability = np.array([[0.0, 1.0], [0.3, 0.6]])
    seen, arm, reward, _, _ = pulls(bernoulli_bandit(probability), 20_000, 2)
    assert set(np.unique(reward)) == {0.0, 1.0}
    for c, a in itertools.product(range(2), range(2)):
        here = (np.asarray(seen) == c) & (np.asarray(arm) == a)
        p = probability[c, a]
        error = np.sqrt(p * (1 - p) / here.sum())
        np.testing.assert_allclose(np.asarray(reward)[here].mean(), p, atol=4 * error)


def test_bandits_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"contexts must be \[C, D\]"):
        linear_bandit(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        bernoulli_bandit([[0.5, 1.5]])
    with pytest.raises(ValueError, match=r"\[C, A\]"):
        bernoulli_bandit([0.5])
    with pytest.raises(ValueError, match="policy"):
        bandit_regret(MEANS, np.zeros((3, 2)))


def score(tokens, mask):
    return jnp.sum(jnp.where(mask, tokens, 0)) / 10.0 + jnp.sum(mask)


def test_tokens_are_paid_for_at_the_end_token():
    steps = follow(token_mdp(score, vocabulary=5, length=4, eos=0), [3, 2, 0])
    np.testing.assert_array_equal(steps.observation, [[3, 5, 5, 5], [3, 2, 5, 5], [3, 2, 0, 5]])
    np.testing.assert_allclose(steps.reward, [0.0, 0.0, 3.5])
    np.testing.assert_array_equal(steps.terminated, [False, False, True])
    assert not steps.truncated.any()


def test_tokens_end_with_the_last_place():
    steps = follow(token_mdp(score, vocabulary=5, length=3), [0, 4, 4])
    np.testing.assert_array_equal(steps.terminated, [False, False, True])
    np.testing.assert_allclose(steps.reward, [0.0, 0.0, 3.8], rtol=1e-6)


def test_every_sequence_gets_its_score():
    environment = token_mdp(score, vocabulary=3, length=3)
    sequences = jnp.array(list(itertools.product(range(3), repeat=3)))

    def total(tokens):
        state = environment.reset(KEY)[1]
        return jax.lax.scan(lambda s, a: environment.step(KEY, s, a)[1:3], state, tokens)[1].sum()

    expected = 3.0 + np.asarray(sequences).sum(1) / 10.0
    np.testing.assert_allclose(jax.jit(jax.vmap(total))(sequences), expected, rtol=1e-6)


def test_one_hot_tokens():
    environment = one_hot_tokens(token_mdp(score, vocabulary=3, length=2, eos=0))
    assert environment.observation_space.shape == (2, 3)
    assert not environment.reset(KEY)[0].any()
    np.testing.assert_array_equal(follow(environment, [2]).observation[0], [[0, 0, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="eos must be in"):
        token_mdp(score, vocabulary=3, length=2, eos=3)


def test_deep_sea_pays_one_path_of_two_to_the_n():
    size = 4
    right = jax.random.bernoulli(jax.random.key(2), shape=(size, size))
    paths = jnp.array(list(itertools.product(range(2), repeat=size)))
    for environment in (deep_sea(size), deep_sea(size, right=right)):

        def total(actions, environment=environment):
            state = environment.reset(KEY)[1]
            return jax.lax.scan(lambda s, a: environment.step(KEY, s, a)[1:3], state, actions)[1].sum()

        returns = np.asarray(jax.jit(jax.vmap(total))(paths))
        assert (returns > 0).sum() == 1
        np.testing.assert_allclose(returns.max(), 0.99, rtol=1e-6)
        np.testing.assert_allclose(np.sort(returns)[:1], -0.0075, rtol=1e-5)  # three of four to the right
        # each path is equally likely under random actions: the treasure once in 16, half of the moves to the right
        np.testing.assert_allclose(returns.mean(), 1 / 16 - 0.005, rtol=1e-4)


def test_deep_sea_by_hand():
    steps = follow(deep_sea(3), [1, 0, 1])
    np.testing.assert_array_equal(np.argwhere(steps.observation), [[0, 1, 1], [1, 2, 0]])  # empty at the end
    np.testing.assert_array_equal(steps.terminated, [False, False, True])
    np.testing.assert_allclose(steps.reward, [-0.01 / 3, 0.0, -0.01 / 3], rtol=1e-6)
    with pytest.raises(ValueError, match="right must be"):
        deep_sea(3, right=np.ones(3))


def test_key_door_needs_the_key():
    length = 5
    away = follow(key_door(length), [1, 1, 1])
    assert not away.reward.any()
    there = follow(key_door(length), [0, 0, 1, 1, 1, 1])  # L // 2 + L - 1 steps
    np.testing.assert_array_equal(there.reward, [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(there.terminated, [False] * 5 + [True])
    places = [[0, 1], [1, 0], [1, 1], [1, 2], [1, 3], [1, 4]]  # has key, cell
    np.testing.assert_array_equal(np.argwhere(there.observation)[:, 1:], places)
    idle = follow(key_door(length), [1, 0] * 8)
    np.testing.assert_array_equal(idle.truncated, [False] * 14 + [True, True])
    with pytest.raises(ValueError, match="length"):
        key_door(2)


def test_random_walks_do_not_open_the_door():
    environment = key_door(40)

    @jax.jit
    @jax.vmap
    def opened(key):
        def advance(state, key):
            action_key, step_key = jax.random.split(key)
            new = environment.step(step_key, state, environment.action_space.sample(action_key))
            return new.state, new.reward

        return jax.lax.scan(advance, environment.reset(key)[1], jax.random.split(key, 120))[1].sum()

    assert opened(jax.random.split(KEY, 2000)).sum() == 0.0
