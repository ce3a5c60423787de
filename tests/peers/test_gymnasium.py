"""Classic control equals Gymnasium's, step by step, from the same states with the same actions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.acrobot import AcrobotState, acrobot
from jaxalign.environments.cartpole import CartPoleState, cartpole
from jaxalign.environments.pendulum import PendulumState, pendulum

pytestmark = pytest.mark.peer

PAIRS = {
    "CartPole-v1": (cartpole, CartPoleState),
    "Pendulum-v1": (pendulum, PendulumState),
    "Acrobot-v1": (acrobot, AcrobotState),
}
STEPS = 600


def recorded(name):
    """What Gymnasium does in STEPS steps of random actions: states before, actions, and what came of them."""
    gymnasium = pytest.importorskip("gymnasium")
    peer = gymnasium.make(name, disable_env_checker=True)
    peer.action_space.seed(3)
    peer.reset(seed=5)
    rows = []
    for _ in range(STEPS):
        state, action = np.array(peer.unwrapped.state, np.float64), peer.action_space.sample()
        if action.dtype == np.float32:
            action = action.astype(np.float64)  # else Gymnasium's pendulum rounds in between
        after, reward, terminated, truncated, _ = peer.step(action)
        rows.append((state, action, after, float(np.squeeze(reward)), terminated, truncated))
        if terminated or truncated:
            peer.reset()
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    factory, record = PAIRS[request.param]
    return factory, record, recorded(request.param)


def test_whole_episodes_in_float64(pair):
    factory, record, (states, actions, after, rewards, terminated, truncated) = pair
    starts = np.concatenate([[True], (terminated | truncated)[:-1]])
    environment = factory()
    with jax.enable_x64(True):

        def advance(state, given):
            start, peer_state, action = given
            fresh = state._replace(inner=record(*peer_state), elapsed=jnp.zeros((), jnp.int32))
            state = jax.tree.map(lambda x, y: jnp.where(start, x, y), fresh, state)
            new = environment.step(jax.random.key(0), state, action)
            return new.state, (new.observation, new.reward, new.terminated, new.truncated, jnp.stack(state.inner))

        _, first = jax.eval_shape(environment.reset, jax.random.key(0))
        first = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        ours = jax.jit(lambda *xs: jax.lax.scan(advance, first, xs)[1])(starts, states, actions)
    # Rounding of the last bit grows by some thousand times in an episode of acrobot, which is chaotic.
    np.testing.assert_allclose(ours[4], states, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours[0], after, atol=2e-6)  # Gymnasium rounds observations to float32
    np.testing.assert_allclose(ours[1], rewards, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(ours[2], terminated)
    np.testing.assert_array_equal(ours[3], truncated)
    assert starts.sum() > 1
    assert (np.diff(np.flatnonzero(starts)) >= 8).all()


def test_each_step_in_float32(pair):
    factory, record, (states, actions, after, rewards, terminated, _) = pair
    environment = factory(max_steps=None)
    step = jax.jit(jax.vmap(environment.step, in_axes=(None, 0, 0)))
    start = record(*jnp.asarray(states, jnp.float32).T)
    new = step(jax.random.key(0), start, actions)
    assert new.observation.dtype == new.reward.dtype == jnp.float32
    np.testing.assert_allclose(new.observation, after, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(new.reward, rewards, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(new.terminated, terminated)


@pytest.mark.parametrize("name", PAIRS)
def test_spaces_and_starts(name):
    gymnasium = pytest.importorskip("gymnasium")
    peer, ours = gymnasium.make(name), PAIRS[name][0]()
    np.testing.assert_allclose(ours.observation_space.low, peer.observation_space.low, rtol=1e-6)
    np.testing.assert_allclose(ours.observation_space.high, peer.observation_space.high, rtol=1e-6)
    if hasattr(peer.action_space, "n"):
        assert ours.action_space.size == peer.action_space.n
    else:
        np.testing.assert_array_equal(ours.action_space.high, peer.action_space.high)
        assert ours.action_space.shape == peer.action_space.shape
    starts = jax.vmap(ours.reset)(jax.random.split(jax.random.key(1), 500))[0]
    theirs = np.stack([peer.reset(seed=i)[0] for i in range(500)])
    np.testing.assert_allclose(starts.min(0), theirs.min(0), atol=0.03)
    np.testing.assert_allclose(starts.max(0), theirs.max(0), atol=0.03)
    np.testing.assert_allclose(starts.std(0), theirs.std(0), rtol=0.1, atol=1e-3)
