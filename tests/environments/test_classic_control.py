"""Classic control by hand numbers and conservation laws; step-by-step equality with Gymnasium is in tests/peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.acrobot import AcrobotState, acrobot
from jaxalign.environments.cartpole import CartPoleState, cartpole
from jaxalign.environments.pendulum import PendulumState, pendulum

KEY = jax.random.key(0)


def at(record, *values):
    return record(*(jnp.asarray(x, float) for x in values))


def test_cartpole_by_hand():
    # At rest: push = 10 / 1.1, turn = -push / (0.5 (4/3 - 0.1/1.1)), acceleration = push - 0.05 turn / 1.1.
    new = cartpole(max_steps=None).step(KEY, at(CartPoleState, 0, 0, 0, 0), 1)
    np.testing.assert_allclose(new.observation, [0.0, 0.1951219, 0.0, -0.2926829], rtol=1e-5)
    np.testing.assert_array_equal(new.observation, jnp.stack(new.state))
    assert new.reward == 1.0
    assert not new.terminated
    left = cartpole(max_steps=None).step(KEY, at(CartPoleState, 0, 0, 0, 0), 0)
    np.testing.assert_allclose(left.observation, -new.observation)


@pytest.mark.parametrize(("place", "fell"), [((2.39, 0), False), ((2.41, 0), True), ((0, 0.209), False), ((0, -0.21), True)])
def test_cartpole_terminates_beyond_its_limits(place, fell):
    new = cartpole().step(KEY, cartpole().reset(KEY)[1]._replace(inner=at(CartPoleState, place[0], 0, place[1], 0)), 0)
    assert bool(new.terminated) == fell
    assert not new.truncated


def test_a_cart_without_forces_rolls_on():
    environment = cartpole(force=0.0, gravity=0.0, max_steps=None)
    state = at(CartPoleState, 0.0, 0.5, 0.1, 0.0)
    for _ in range(3):
        state = environment.step(KEY, state, 1).state
    np.testing.assert_allclose(state, [0.03, 0.5, 0.1, 0.0], atol=1e-6)


def test_pendulum_by_hand():
    # angle pi/2, velocity 1, torque 2: acceleration 15 sin + 3 * 2 = 21, velocity 1 + 21/20.
    new = pendulum().step(KEY, pendulum().reset(KEY)[1]._replace(inner=at(PendulumState, np.pi / 2, 1)), jnp.array([2.0]))
    np.testing.assert_allclose(new.state.inner.velocity, 2.05, rtol=1e-6)
    np.testing.assert_allclose(new.state.inner.angle, np.pi / 2 + 0.1025, rtol=1e-6)
    np.testing.assert_allclose(new.reward, -(np.pi**2 / 4 + 0.1 + 0.004), rtol=1e-6)
    # A whole turn more changes nothing that is paid or seen.
    turned = pendulum(max_steps=None).step(KEY, at(PendulumState, np.pi / 2 + 4 * np.pi, 1), jnp.array([2.0]))
    np.testing.assert_allclose(turned.reward, new.reward, rtol=1e-5)
    np.testing.assert_allclose(turned.observation, new.observation, atol=1e-5)
    fast = pendulum(max_steps=None, gravity=1e3).step(KEY, at(PendulumState, 1.0, 7.0), jnp.zeros(1))
    assert fast.observation[2] == 8.0


def energy(state: AcrobotState) -> float:
    """Kinetic and potential energy of two rods of mass and inertia 1, centres at 0.5, under gravity 9.8."""
    a1, a2, v1, v2 = (np.asarray(x, np.float64) for x in state)
    w = v1 + v2
    moving = 0.5 * (0.25 + 1.0 + 1.0) * v1**2 + 0.5 * (0.25 + 1.0) * w**2 + 0.5 * np.cos(a2) * v1 * w
    return moving - 9.8 * (1.5 * np.cos(a1) + 0.5 * np.cos(a1 + a2))


def test_an_acrobot_left_alone_keeps_its_energy():
    with jax.enable_x64(True):
        environment = acrobot(time_step=0.01, max_steps=None)
        start = at(AcrobotState, 1.0, -0.5, 0.3, 0.2)
        step = lambda state, _: (environment.step(KEY, state, jnp.int32(1)).state,) * 2  # noqa: E731
        _, states = jax.jit(lambda s: jax.lax.scan(step, s, length=300))(start)
    np.testing.assert_allclose(energy(states), energy(start), rtol=1e-6)
    assert np.ptp(states.angle_1) > 1.0


def test_acrobot_pays_nothing_only_where_it_gets_there():
    environment = acrobot(max_steps=None)
    up = environment.step(KEY, at(AcrobotState, np.pi, 0.0, 0, 0), 1)
    assert up.terminated
    assert up.reward == 0.0
    down = environment.step(KEY, at(AcrobotState, 0.0, 0.0, 0, 0), 1)
    assert not down.terminated
    assert down.reward == -1.0
    np.testing.assert_allclose(down.observation, [1, 0, 1, 0, 0, 0], atol=1e-6)  # hanging is at rest
    assert not acrobot(goal_height=2.1, max_steps=None).step(KEY, at(AcrobotState, np.pi, 0.0, 0, 0), 1).terminated


@pytest.mark.parametrize(("factory", "steps"), [(cartpole, 500), (pendulum, 200), (acrobot, 500)])
def test_standard_time_limits(factory, steps):
    environment = factory()
    _, state = environment.reset(KEY)
    action = jnp.zeros(environment.action_space.shape, environment.action_space.dtype)
    step = jax.jit(lambda elapsed: environment.step(KEY, state._replace(elapsed=elapsed), action).truncated)
    assert not step(steps - 2)
    assert step(steps - 1)


@pytest.mark.parametrize(("factory", "name"), [(cartpole, "force"), (pendulum, "max_torque"), (acrobot, "torque")])
def test_constants_are_traced_and_differentiable(factory, name):
    def after(value):
        environment = factory(**{name: value}, max_steps=value * 100)
        _, state = environment.reset(KEY)
        action = jnp.ones(environment.action_space.shape, environment.action_space.dtype)
        new = environment.step(KEY, state, action)
        return new.observation.sum(), new.truncated

    values = jnp.array([1.0, 1.5])
    together, truncated = jax.jit(jax.vmap(after))(values)
    np.testing.assert_allclose(together, [after(x)[0] for x in values], rtol=1e-5)
    assert not truncated.any()
    gradient = jax.grad(lambda x: after(x)[0])(1.5)
    assert np.isfinite(gradient)
    assert gradient != 0.0 or factory is not cartpole
