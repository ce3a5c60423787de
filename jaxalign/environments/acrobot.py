"""Acrobot: a motor between two hanging rods swings the lower end above a line."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, valid_action
from jaxalign.environments.wrappers import time_limit
from jaxalign.types import Array, ArrayLike, Key


class AcrobotState(NamedTuple):
    """[] each, radians and radians per second: the upper rod from hanging, the lower rod from the upper's direction."""

    angle_1: Array
    angle_2: Array
    velocity_1: Array
    velocity_2: Array


def acrobot(
    *,
    gravity: ArrayLike = 9.8,
    mass_1: ArrayLike = 1.0,
    mass_2: ArrayLike = 1.0,
    length_1: ArrayLike = 1.0,
    length_2: ArrayLike = 1.0,
    center_1: ArrayLike = 0.5,
    center_2: ArrayLike = 0.5,
    inertia_1: ArrayLike = 1.0,
    inertia_2: ArrayLike = 1.0,
    torque: ArrayLike = 1.0,
    goal_height: ArrayLike = 1.0,
    max_velocity_1: ArrayLike = 4.0 * math.pi,
    max_velocity_2: ArrayLike = 9.0 * math.pi,
    time_step: ArrayLike = 0.2,
    max_steps: ArrayLike | None = 500,
) -> Environment:
    """Two rods with a motor at the elbow; equal step by step to Gymnasium's Acrobot-v1 (the book's equations).

    Observes [cos a1, sin a1, cos a2, sin a2, v1, v2] [6]; actions 0, 1, 2 turn with -torque, 0, torque, for one
    Runge-Kutta step of `time_step` seconds. Pays -1 a step, 0 for the one that terminates, where the lower end is more
    than goal_height above the upper hinge; truncates after max_steps (None: never). Starts uniformly within 0.1 of 0
    in all four. center_i: from a rod's hinge to its centre of mass. Every number may be traced.
    Sutton & Barto (1998), section 11.3.
    """
    limits = jnp.stack([jnp.asarray(x, jnp.float32) for x in (1.0, 1.0, 1.0, 1.0, max_velocity_1, max_velocity_2)])
    actions = Discrete(3)

    def rates(state: AcrobotState, motor: Array) -> AcrobotState:
        """The time derivative of the state under a torque `motor`."""
        a1, a2, v1, v2 = state
        sin_2, cos_2 = jnp.sin(a2), jnp.cos(a2)
        lever = mass_2 * length_1 * center_2
        d2 = mass_2 * center_2**2 + lever * cos_2 + inertia_2
        d1 = mass_1 * center_1**2 + mass_2 * length_1**2 + lever * cos_2 + d2 + inertia_1
        pull_2 = mass_2 * center_2 * gravity * jnp.sin(a1 + a2)
        pull_1 = (mass_1 * center_1 + mass_2 * length_1) * gravity * jnp.sin(a1) + pull_2
        pull_1 = pull_1 - lever * (v2**2 + 2.0 * v2 * v1) * sin_2
        bend = motor + d2 / d1 * pull_1 - lever * v1**2 * sin_2 - pull_2
        w2 = bend / (mass_2 * center_2**2 + inertia_2 - d2**2 / d1)
        return AcrobotState(v1, v2, -(d2 * w2 + pull_1) / d1, w2)

    def reset(key: Key) -> tuple[Array, AcrobotState]:
        state = AcrobotState(*jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1))
        return _observe(state), state

    def step(key: Key, state: AcrobotState, action: Array) -> TimeStep:
        valid = valid_action("acrobot", actions, action)
        motor = (jnp.asarray(action) - 1) * torque

        def after(rate: AcrobotState, time: ArrayLike) -> AcrobotState:
            return jax.tree.map(lambda x, dx: (x + time * dx).astype(x.dtype), state, rate)

        k1 = rates(state, motor)
        k2 = rates(after(k1, time_step / 2.0), motor)
        k3 = rates(after(k2, time_step / 2.0), motor)
        k4 = rates(after(k3, time_step), motor)
        mean = jax.tree.map(lambda a, b, c, d: (a + 2.0 * b + 2.0 * c + d) / 6.0, k1, k2, k3, k4)
        a1, a2, v1, v2 = after(mean, time_step)
        new = AcrobotState(
            _wrap(a1),
            _wrap(a2),
            jnp.clip(v1, -max_velocity_1, max_velocity_1).astype(v1.dtype),
            jnp.clip(v2, -max_velocity_2, max_velocity_2).astype(v2.dtype),
        )
        height = -length_1 * jnp.cos(new.angle_1) - length_2 * jnp.cos(new.angle_1 + new.angle_2)
        reached = height > goal_height
        reward = jnp.where(valid, jnp.where(reached, 0.0, -1.0), jnp.nan).astype(float)
        return TimeStep(_observe(new), new, reward, reached, jnp.zeros((), bool), {})

    environment = Environment(reset, step, Box(-limits, limits, (6,)), actions, "acrobot")
    return environment if max_steps is None else time_limit(environment, max_steps)


def _observe(state: AcrobotState) -> Array:
    a1, a2, v1, v2 = state
    return jnp.stack([jnp.cos(a1), jnp.sin(a1), jnp.cos(a2), jnp.sin(a2), v1, v2])


def _wrap(angle: Array) -> Array:
    """The angle within [-pi, pi); one that is there already does not change by a bit."""
    return angle - 2.0 * jnp.pi * jnp.floor((angle + jnp.pi) / (2.0 * jnp.pi))
