"""A point mass that is to reach a goal behind a hazard: a world where a learned reward can be over-optimised."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Box, Environment, TimeStep, valid_action
from jaxalign.types import Array, ArrayLike, Key

TIME_STEP, FRICTION = 0.25, 0.1


class PointMassState(NamedTuple):
    """position, velocity: [2]; elapsed: [] int32, steps so far."""

    position: Array
    velocity: Array
    elapsed: Array


def point_mass(
    *,
    horizon: int = 24,
    goal: tuple[float, float] = (2.0, 0.0),
    hazard: tuple[float, float] = (1.0, 0.0),
    hazard_radius: ArrayLike = 0.5,
    hazard_cost: ArrayLike = 3.0,
    effort_cost: ArrayLike = 0.02,
    max_force: ArrayLike = jnp.inf,
) -> Environment:
    """A mass pushed by a force action [2] within [-max_force, max_force], from near the origin, for `horizon` steps.

    velocity <- 0.9 velocity + 0.25 force;  position <- position + 0.25 velocity
    reward = -|position - goal| - hazard_cost [|position - hazard| < hazard_radius] - effort_cost |force|^2

    The reward is of the position after the step. Observes position, velocity, and the fraction of the horizon gone,
    [5]; the last step terminates, so a return is the plain sum of rewards.
    """
    target, danger = jnp.array(goal), jnp.array(hazard)
    actions = Box(-max_force, max_force, (2,))

    def observe(state: PointMassState) -> Array:
        return jnp.concatenate([state.position, state.velocity, state.elapsed[None] / horizon])

    def reset(key: Key) -> tuple[Array, PointMassState]:
        state = PointMassState(0.2 * jax.random.normal(key, (2,)), jnp.zeros(2), jnp.zeros((), jnp.int32))
        return observe(state), state

    def step(key: Key, state: PointMassState, action: Array) -> TimeStep:
        valid = valid_action("point mass", actions, action)
        force = jnp.clip(jnp.asarray(action, state.velocity.dtype), -max_force, max_force)
        velocity = (1.0 - FRICTION) * state.velocity + TIME_STEP * force
        new = PointMassState(state.position + TIME_STEP * velocity, velocity, state.elapsed + 1)
        in_hazard = jnp.linalg.norm(new.position - danger) < hazard_radius
        reward = -jnp.linalg.norm(new.position - target) - effort_cost * jnp.sum(force**2)
        reward = jnp.where(in_hazard, reward - hazard_cost, reward)
        reward = jnp.where(valid, reward, jnp.nan)
        return TimeStep(observe(new), new, reward, new.elapsed >= horizon, jnp.zeros((), bool), {})

    return Environment(reset, step, Box(-jnp.inf, jnp.inf, (5,)), actions, "point mass")
