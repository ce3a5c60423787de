"""Pendulum: swing a hanging rod up and hold it there, with a motor too weak to lift it at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Box, Environment, TimeStep, valid_action
from jaxalign.environments.wrappers import time_limit
from jaxalign.types import Array, ArrayLike, Key


class PendulumState(NamedTuple):
    """[] each: radians from upright (of any number of turns), radians per second."""

    angle: Array
    velocity: Array


def pendulum(
    *,
    gravity: ArrayLike = 10.0,
    mass: ArrayLike = 1.0,
    length: ArrayLike = 1.0,
    time_step: ArrayLike = 0.05,
    max_torque: ArrayLike = 2.0,
    max_speed: ArrayLike = 8.0,
    max_steps: ArrayLike | None = 200,
) -> Environment:
    """A rod with a torque action [1] in [-max_torque, max_torque]; equal step by step to Gymnasium's Pendulum-v1.

    Observes [cos angle, sin angle, velocity] [3]. reward = -(angle^2 + 0.1 velocity^2 + 0.001 torque^2), the angle
    within (-pi, pi], of the state acted in. Never terminates; truncates after max_steps (None: never). Starts with
    angle ~ U(-pi, pi), velocity ~ U(-1, 1). Gymnasium cuts larger torques to the limit: so does `clip_actions`.
    Every number may be traced.
    """
    speed = jnp.asarray(max_speed, jnp.float32)
    high = jnp.stack([jnp.ones_like(speed), jnp.ones_like(speed), speed])
    actions = Box(-max_torque, max_torque, (1,))

    def observe(state: PendulumState) -> Array:
        return jnp.stack([jnp.cos(state.angle), jnp.sin(state.angle), state.velocity])

    def reset(key: Key) -> tuple[Array, PendulumState]:
        angle, velocity = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
        state = PendulumState(jnp.pi * angle, velocity)
        return observe(state), state

    def step(key: Key, state: PendulumState, action: Array) -> TimeStep:
        valid = valid_action("pendulum", actions, action)
        torque = jnp.clip(jnp.asarray(action, state.angle.dtype)[0], -max_torque, max_torque)
        lean = (state.angle + jnp.pi) % (2.0 * jnp.pi) - jnp.pi
        cost = lean**2 + 0.1 * state.velocity**2 + 0.001 * torque**2
        acceleration = 1.5 * gravity / length * jnp.sin(state.angle) + 3.0 / (mass * length**2) * torque
        velocity = jnp.clip(state.velocity + acceleration * time_step, -max_speed, max_speed)
        velocity = velocity.astype(state.velocity.dtype)
        new = PendulumState((state.angle + velocity * time_step).astype(state.angle.dtype), velocity)
        never = jnp.zeros((), bool)
        return TimeStep(observe(new), new, jnp.where(valid, -cost, jnp.nan), never, never, {})

    environment = Environment(reset, step, Box(-high, high, (3,)), actions, "pendulum")
    return environment if max_steps is None else time_limit(environment, max_steps)
