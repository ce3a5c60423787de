"""Host environments under jit, scan and vmap: a counter written by hand, and CartPole against the built-in one."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.protocol import Box, Discrete, check_environment
from jaxalign.environments.wrappers import auto_reset, batched, episode_statistics
from jaxalign.interop.gymnasium_environments import from_gymnasium

gymnasium = pytest.importorskip("gymnasium")
KEY = jax.random.key(0)
ERROR = jax.errors.JaxRuntimeError


class Counter(gymnasium.Env):
    """Sees [seed, steps]; pays the sum of its actions so far; ends after as many steps as its seed's last digit + 2."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.observation_space = gymnasium.spaces.Box(0.0, np.inf, (2,), np.float64)
        self.action_space = gymnasium.spaces.Discrete(3, start=-1)

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps, self.total = seed % 1000, 0, 0
        return np.array([self.seed, 0.0]), {}

    def step(self, action):
        self.steps += 1
        self.total += action
        ended = self.steps >= self.seed % 10 + 2
        return np.array([self.seed, self.steps]), float(self.total), ended, self.steps >= 50, {}


@pytest.fixture
def counter(request):
    Counter.made = 0
    return from_gymnasium(Counter, pool=8)


def test_spaces_and_protocol(counter):
    assert counter.name == "Counter"
    assert counter.action_space == Discrete(3)
    assert isinstance(counter.observation_space, Box)
    assert counter.observation_space.dtype == jnp.float32
    check_environment(counter)
    assert Counter.made == 1


def test_steps_under_jit_and_scan_come_in_order(counter):
    @jax.jit
    def run(key):
        _, state = counter.reset(key)

        def advance(state, action):
            new = counter.step(key, state, action)
            return new.state, (new.observation, new.reward)

        return jax.lax.scan(advance, state, jnp.array([2, 2, 0, 1, 2]))[1]

    for _ in range(3):  # as good as the first time: nothing was cached or left out
        seen, paid = run(KEY)
        np.testing.assert_array_equal(seen[:, 1], [1, 2, 3, 4, 5])
        np.testing.assert_array_equal(paid, [1, 2, 1, 1, 2])
    assert len(np.unique(seen[:, 0])) == 1
    assert run(jax.random.key(1))[0][0, 0] != seen[0, 0]


def test_a_batch_keeps_its_members_apart(counter):
    batch = batched(episode_statistics(counter), 4)

    @jax.jit
    def run(key):
        first, state = batch.reset(key)

        def advance(state, key):
            new = batch.step(key, state, jnp.array([0, 1, 2, 2]))
            return new.state, new._replace(state=None)

        return first, jax.lax.scan(advance, state, jax.random.split(key, 40))[1]

    first, steps = run(KEY)
    seed, elapsed = np.array(first[:, 0]), np.zeros(4)
    for t in range(40):
        elapsed += 1
        done = elapsed >= seed % 10 + 2
        np.testing.assert_array_equal(steps.info["final_observation"][t], np.stack([seed, elapsed], 1))
        np.testing.assert_array_equal(steps.reward[t], np.array([-1, 0, 1, 1]) * elapsed)
        np.testing.assert_array_equal(steps.terminated[t], done)
        np.testing.assert_array_equal(steps.info["episode_length"][t], elapsed)
        seed, elapsed = np.where(done, steps.observation[t, :, 0], seed), np.where(done, 0.0, elapsed)
        np.testing.assert_array_equal(steps.observation[t], np.stack([seed, elapsed], 1))
    assert steps.terminated.sum() > 10


def test_one_environment_resets_itself_and_seeds_follow_one_another(counter):
    one = auto_reset(counter)

    @jax.jit
    def run(keys):
        def lengths(key):
            def advance(state, key):
                new = one.step(key, state, 1)
                return new.state, (new.terminated, new.info["final_observation"])

            return jax.lax.scan(advance, one.reset(key)[1], jax.random.split(key, 30))[1]

        return jax.lax.map(lengths, keys)  # JAX cannot vmap a cond with a callback in it

    ended, seen = run(jax.random.split(KEY, 2))
    np.testing.assert_array_equal(ended, seen[..., 1] >= seen[..., 0] % 10 + 2)
    assert (ended.sum(1) >= 2).all()


def test_nested_vmap_and_actions_that_are_shared(counter):
    _, states = jax.vmap(jax.vmap(counter.reset))(jax.random.split(KEY, (2, 3)))
    step = jax.vmap(jax.vmap(counter.step, in_axes=(None, 0, None)), in_axes=(None, 0, 0))
    new = jax.jit(step)(KEY, states, jnp.array([0, 2]))
    np.testing.assert_array_equal(new.reward, [[-1] * 3, [1] * 3])


def test_worlds_are_recycled_the_longest_waiting_first(counter):
    states = [counter.reset(jax.random.key(i))[1] for i in range(8)]
    states[0] = counter.step(KEY, states[0], 1).state  # now 1 has waited longest
    counter.reset(KEY)
    assert Counter.made == 8
    states[0] = counter.step(KEY, states[0], 1).state
    counter.step(KEY, states[2], 1)
    with pytest.raises(ERROR, match=r"episode 1 of Counter was given up for a newer one; raise pool=8"):
        jax.block_until_ready(counter.step(KEY, states[1], 1))


def test_a_host_cannot_go_back(counter):
    _, state = counter.reset(KEY)
    new = counter.step(KEY, state, 1)
    with pytest.raises(ERROR, match="a step from after step 0 of episode 0, but is after step 1"):
        jax.block_until_ready(counter.step(KEY, state, 1))
    assert counter.step(KEY, new.state, 1).observation[1] == 2.0


def test_an_action_that_is_none_does_not_reach_the_host(counter):
    _, state = counter.reset(KEY)
    with pytest.raises(ValueError, match=r"Counter: action 3 is not in 0..2"):
        counter.step(KEY, state, 3)
    step = jax.jit(counter.step)
    wrong = step(KEY, state, 3)
    assert np.isnan(wrong.reward)
    assert wrong.observation[1] == 0.0
    assert step(KEY, wrong.state, 2).observation[1] == 1.0


def test_cartpole_equals_the_built_in_one():
    from jaxalign.environments.cartpole import CartPoleState, cartpole

    theirs, ours = from_gymnasium("CartPole-v1", pool=2), cartpole()
    assert theirs.name == "CartPole-v1"
    seen, state = theirs.reset(KEY)
    _, mine = ours.reset(KEY)
    mine = mine._replace(inner=CartPoleState(*seen))
    step = jax.jit(theirs.step)
    for action in (1, 0, 1, 1, 0):
        new, own = step(KEY, state, action), ours.step(KEY, mine, action)
        state, mine = new.state, own.state
        np.testing.assert_allclose(new.observation, own.observation, rtol=1e-5, atol=1e-6)
        assert new.reward == own.reward == 1.0


def test_real_actions_and_host_time_limits():
    environment = from_gymnasium(lambda: gymnasium.make("Pendulum-v1", max_episode_steps=3), pool=2)
    _, state = environment.reset(KEY)
    flags = []
    for _ in range(3):
        new = environment.step(KEY, state, jnp.array([0.5]))
        state = new.state
        flags.append((bool(new.terminated), bool(new.truncated)))
    assert flags == [(False, False), (False, False), (False, True)]
    assert new.reward < 0.0


def with_spaces(**spaces):
    def make():
        environment = Counter()
        for name, space in spaces.items():
            setattr(environment, name, space)
        return environment

    return make


def test_what_is_not_supported_is_named(monkeypatch):
    several = gymnasium.spaces.MultiDiscrete([2, 3])
    with pytest.raises(ValueError, match="Counter takes a MultiDiscrete space"):
        from_gymnasium(with_spaces(action_space=several))
    named = gymnasium.spaces.Dict(x=several)
    with pytest.raises(ValueError, match="Counter observes a Dict space"):
        from_gymnasium(with_spaces(observation_space=named))
    wrong = from_gymnasium(with_spaces(observation_space=gymnasium.spaces.Box(0, 1, (3,))))
    with pytest.raises(ERROR, match=r"gave an observation \[2\] of float64, its space says \[3\] of float32"):
        jax.block_until_ready(wrong.reset(KEY))
    with pytest.raises(ValueError, match="pool must be at least 1"):
        from_gymnasium(Counter, pool=0)
    monkeypatch.setitem(sys.modules, "gymnasium", types.ModuleType("none") and None)
    with pytest.raises(ImportError, match=r"jaxalign\[envs\]"):
        from_gymnasium("CartPole-v1")
