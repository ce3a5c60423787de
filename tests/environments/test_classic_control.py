"""Classic control by hand numbers and conservation laws; step-by-step equality with Gymnasium is in tests/peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.acrobot import AcrobotState, acrobot
from jaxalign.environments.cartpole import CartPoleState, cartpole
from jaxalign.environments.pendulum import PendulumState, pendulum

KEY = jax.random.key(0)


LIMITS = [(cartpole, "force", 500), (pendulum, "gravity", 200), (acrobot, "gravity", 500)]
CARTPOLE, PENDULUM, ACROBOT = (jax.jit(make(max_steps=None).step) for make in (cartpole, pendulum, acrobot))


def at(record, *values):
    return record(*(np.asarray(x, np.float32) for x in values))


def test_cartpole_by_hand():
    # At rest: push = 10 / 1.1, turn = -push / (0.5 (4/3 - 0.1/1.1)), acceleration = push - 0.05 turn / 1.1.
    new = CARTPOLE(KEY, at(CartPoleState, 0, 0, 0, 0), 1)
    np.testing.assert_allclose(new.observation, [0.0, 0.1951219, 0.0, -0.2926829], rtol=1e-5)
    np.testing.assert_array_equal(new.observation, jnp.stack(new.state))
    assert new.reward == 1.0
    assert not new.terminated
    left = CARTPOLE(KEY, at(CartPoleState, 0, 0, 0, 0), 0)
    np.testing.assert_allclose(left.observation, -new.observation)


@pytest.mark.parametrize(("x", "angle", "fell"), [(2.39, 0, 0), (2.41, 0, 1), (0, 0.209, 0), (0, -0.21, 1)])
def test_cartpole_terminates_beyond_its_limits(x, angle, fell):
    new = CARTPOLE(KEY, at(CartPoleState, x, 0, angle, 0), 0)
    assert bool(new.terminated) == fell
    assert not new.truncated


def test_a_cart_without_forces_rolls_on():
    step = jax.jit(cartpole(force=0.0, gravity=0.0, max_steps=None).step)
    state = at(CartPoleState, 0.0, 0.5, 0.1, 0.0)
    for _ in range(3):
        state = step(KEY, state, 1).state
    np.testing.assert_allclose(state, [0.03, 0.5, 0.1, 0.0], atol=1e-6)


def test_pendulum_by_hand():
    # angle pi/2, velocity 1, torque 2: acceleration 15 sin + 3 * 2 = 21, velocity 1 + 21/20.
    new = PENDULUM(KEY, at(PendulumState, np.pi / 2, 1), jnp.array([2.0]))
    np.testing.assert_allclose(new.state, [np.pi / 2 + 0.1025, 2.05], rtol=1e-6)
    np.testing.assert_allclose(new.reward, -(np.pi**2 / 4 + 0.1 + 0.004), rtol=1e-6)
    # A whole turn more changes nothing that is paid or seen.
    turned = PENDULUM(KEY, at(PendulumState, np.pi / 2 + 4 * np.pi, 1), jnp.array([2.0]))
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
        start = AcrobotState(*jnp.array([1.0, -0.5, 0.3, 0.2]))
        step = lambda state, _: (environment.step(KEY, state, jnp.int32(1)).state,) * 2  # noqa: E731
        _, states = jax.jit(lambda s: jax.lax.scan(step, s, length=300))(start)
    np.testing.assert_allclose(energy(states), energy(start), rtol=1e-6)
    assert np.ptp(states.angle_1) > 1.0


def test_acrobot_pays_nothing_only_where_it_gets_there():
    up = ACROBOT(KEY, at(AcrobotState, np.pi, 0.0, 0, 0), 1)
    assert up.terminated
    assert up.reward == 0.0
    down = ACROBOT(KEY, at(AcrobotState, 0.0, 0.0, 0, 0), 1)
    assert not down.terminated
    assert down.reward == -1.0
    np.testing.assert_allclose(down.observation, [1, 0, 1, 0, 0, 0], atol=1e-6)  # hanging is at rest
    assert not acrobot(goal_height=2.1, max_steps=None).step(KEY, at(AcrobotState, np.pi, 0.0, 0, 0), 1).terminated


@pytest.mark.parametrize(("factory", "name", "steps"), LIMITS)
def test_constants_and_time_limits_are_traced_and_differentiable(factory, name, steps):
    def after(value, limit, elapsed):
        environment = factory(**{name: value}, max_steps=limit)
        state = environment.reset(KEY)[1]._replace(elapsed=elapsed)
        action = jnp.ones(environment.action_space.shape, environment.action_space.dtype)
        new = environment.step(KEY, state, action)
        return new.observation.sum() + new.reward, new.truncated

    run = jax.jit(jax.vmap(jax.value_and_grad(after, has_aux=True)))
    values, elapsed = np.float32([10.0, 10.0, 12.0, 10.0 + 1e-2]), np.array([2, 3, 4, 1])
    (sums, truncated), gradients = run(values, np.array([4, 4, 4, 4]), elapsed)
    np.testing.assert_array_equal(truncated, [False, True, True, False])
    assert sums[0] == sums[1] != sums[2]
    np.testing.assert_allclose(gradients[0], (sums[3] - sums[0]) / 1e-2, rtol=0.02, atol=1e-3)
    standard = jax.jit(factory().step)
    _, state = jax.jit(factory().reset)(KEY)
    action = np.zeros(factory().action_space.shape, factory().action_space.dtype)
    for elapsed, over in ((steps - 2, False), (steps - 1, True)):
        assert standard(KEY, state._replace(elapsed=np.int32(elapsed)), action).truncated == over
