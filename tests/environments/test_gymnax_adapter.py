"""gymnax behind the protocol: its dynamics, and none of its own resets."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.cartpole import CartPoleState, cartpole
from jaxalign.environments.gymnax_adapter import from_gymnax
from jaxalign.environments.protocol import Box, Discrete, check_environment
from jaxalign.environments.wrappers import batched

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def gymnax():
    return pytest.importorskip("gymnax")


def test_cartpole_is_the_same_world(gymnax):
    theirs, ours = from_gymnax("CartPole-v1"), cartpole(max_steps=None)
    check_environment(theirs)
    observation, state = theirs.reset(KEY)
    mine = CartPoleState(*observation)
    step = jax.jit(theirs.step)
    for action in (0, 1, *[1] * 11):
        new, own = step(KEY, state, action), ours.step(KEY, mine, action)
        state, mine = new.state, own.state
        np.testing.assert_allclose(new.observation, own.observation, rtol=1e-5, atol=1e-6)
        assert bool(new.terminated) == bool(own.terminated)
    assert new.terminated  # and what is seen is where it fell, not a new start
    assert np.abs(new.observation).max() > 0.2
    assert state.time == 13


def test_time_limits_truncate_and_parameters_are_traced(gymnax):
    environment, params = gymnax.make("Pendulum-v1")

    def rewards(gravity):
        adapted = from_gymnax(environment, params.replace(g=gravity, max_steps_in_episode=2))
        state = adapted.reset(KEY)[1]
        first = adapted.step(KEY, state, jnp.ones(1))
        second = adapted.step(KEY, first.state, jnp.ones(1))
        return second.reward, jnp.stack([first.truncated, second.truncated, second.terminated])

    paid, flags = jax.jit(jax.vmap(rewards))(jnp.array([5.0, 10.0]))
    np.testing.assert_array_equal(flags, [[False, True, False]] * 2)
    assert paid[0] != paid[1]


def test_batched_gives_the_true_successor(gymnax):
    batch = batched(from_gymnax("Catch-bsuite"), 2)
    _, state = batch.reset(KEY)
    step = jax.jit(batch.step)
    for _ in range(9):
        new = step(KEY, state, jnp.ones(2, jnp.int32))
        state = new.state
    assert new.terminated.all()
    assert not np.array_equal(new.observation, new.info["final_observation"])
    assert set(np.unique(np.abs(new.reward))) <= {1.0}


def test_spaces_and_wrong_actions(gymnax):
    lake = from_gymnax("FrozenLake-misc")
    assert (lake.observation_space, lake.action_space) == (Discrete(16), Discrete(4))
    swing = from_gymnax("Pendulum-v1")
    assert isinstance(swing.action_space, Box)
    _, state = swing.reset(KEY)
    with pytest.raises(ValueError, match="Pendulum-v1: action"):
        swing.step(KEY, state, jnp.array([3.0]))
    assert np.isnan(jax.jit(swing.step)(KEY, state, jnp.array([3.0])).reward)


def test_other_spaces_are_named(gymnax):
    environment, _ = gymnax.make("CartPole-v1")

    class Pair(type(environment)):
        def observation_space(self, params):
            return gymnax.environments.spaces.Tuple((environment.action_space(params),))

    with pytest.raises(ValueError, match="CartPole-v1 observes Tuple"):
        from_gymnax(Pair())


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ImportError, match=r"jaxalign\[envs\]"):
        from_gymnax("CartPole-v1")
