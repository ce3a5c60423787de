"""CartPole: push a cart left or right so that the pole on it does not fall."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, valid_action
from jaxalign.environments.wrappers import time_limit
from jaxalign.types import Array, ArrayLike, Key


class CartPoleState(NamedTuple):
    """[] each: metres, metres per second, radians from upright, radians per second. Observed as [4] in this order."""

    position: Array
    velocity: Array
    angle: Array
    angular_velocity: Array


def cartpole(
    *,
    gravity: ArrayLike = 9.8,
    cart_mass: ArrayLike = 1.0,
    pole_mass: ArrayLike = 0.1,
    half_length: ArrayLike = 0.5,
    force: ArrayLike = 10.0,
    time_step: ArrayLike = 0.02,
    max_position: ArrayLike = 2.4,
    max_angle: ArrayLike = 12 * 2 * math.pi / 360,
    max_steps: ArrayLike | None = 500,
) -> Environment:
    """The cart and pole of Barto, Sutton & Anderson (1983), equal step by step to Gymnasium's CartPole-v1.

    Observes [4] (CartPoleState); action 0 pushes left, 1 right, with `force` newtons for `time_step` seconds. Pays 1 a
    step. Terminates where |position| > max_position or |angle| > max_angle; truncates after max_steps (None: never).
    Starts uniformly within 0.05 of 0 in all four. Every number may be traced.
    """
    high = jnp.stack([jnp.asarray(x, jnp.float32) for x in (2 * max_position, np.inf, 2 * max_angle, np.inf)])
    actions = Discrete(2)

    def reset(key: Key) -> tuple[Array, CartPoleState]:
        start = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return start, CartPoleState(*start)

    def step(key: Key, state: CartPoleState, action: Array) -> TimeStep:
        valid = valid_action("cartpole", actions, action)
        x, v, angle, spin = state
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        mass = cart_mass + pole_mass
        push = (jnp.where(jnp.asarray(action) == 1, force, -force) + pole_mass * half_length * spin**2 * sin) / mass
        turn = (gravity * sin - cos * push) / (half_length * (4.0 / 3.0 - pole_mass * cos**2 / mass))
        acceleration = push - pole_mass * half_length * turn * cos / mass
        new = CartPoleState(
            x + time_step * v, v + time_step * acceleration, angle + time_step * spin, spin + time_step * turn
        )
        new = CartPoleState(*(after.astype(before.dtype) for after, before in zip(new, state, strict=True)))
        fell = (jnp.abs(new.position) > max_position) | (jnp.abs(new.angle) > max_angle)
        reward = jnp.where(valid, 1.0, jnp.nan).astype(float)
        return TimeStep(jnp.stack(new), new, reward, fell, jnp.zeros((), bool), {})

    environment = Environment(reset, step, Box(-high, high, (4,)), actions, "cartpole")
    return environment if max_steps is None else time_limit(environment, max_steps)
