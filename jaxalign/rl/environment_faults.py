"""Environments that fail now and then: actions replaced or late, sensors and rewards that lie.

Wrappers Environment -> Environment, pure, with rates that may be traced. In each step a fault begins with probability
`rate`, and goes on from the step before with probability `persistence` (1: until the episode ends), so

    Pr(fault now) = rate + (1 - rate) persistence 1[fault in the step before].

Given one key, a higher rate strikes wherever a lower one does. Put them inside `auto_reset` or `batched`: a new episode
begins repaired.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Environment, Space, TimeStep, valid_action
from jaxalign.rl.faults import checked_rate
from jaxalign.types import Array, ArrayLike, Key

Reading = Callable[[Key, Array, Array], Array]  # (key, what is true, what was shown last) -> what is shown


class Faulty(NamedTuple):
    """The state of a faulty environment. inner: of the one inside; fault: bool [], now; shown: the last reading."""

    inner: Any
    fault: Array
    shown: Any = ()


def faulty_actions(
    environment: Environment,
    *,
    rate: ArrayLike,
    replacement: Callable[[Key], Any] | ArrayLike | None = None,
    persistence: ArrayLike = 0.0,
) -> Environment:
    """Another action is executed now and then; info["action_fault"], bool [], says when (also if it is the same one).

    Args:
        rate, persistence: in [0, 1].
        replacement: an action [...] to be stuck at; a function of a key that draws one; None: any action, uniformly.

    An action that is not in the action space is left to the environment. Raises ValueError outside jit on a rate or
    persistence outside [0, 1], or a replacement that is not in the space.
    """
    space, breaks = environment.action_space, _breaks("faulty_actions", rate, persistence)
    draw = _action_source(environment, replacement)

    def reset(key: Key) -> tuple[Any, Faulty]:
        observation, inner = environment.reset(key)
        return observation, Faulty(inner, jnp.zeros((), bool))

    def step(key: Key, state: Faulty, action: Any) -> TimeStep:
        step_key, fault_key, draw_key = jax.random.split(key, 3)
        fault = breaks(fault_key, state.fault) & valid_action(environment.name, space, action)
        action = jnp.where(fault, draw(draw_key), action)
        new = environment.step(step_key, state.inner, action)
        return new._replace(state=state._replace(inner=new.state, fault=fault), info=new.info | {"action_fault": fault})

    return environment.replace(reset=reset, step=step)


def faulty_sensors(
    environment: Environment, *, rate: ArrayLike, reading: Reading | None = None, persistence: ArrayLike = 0.0
) -> Environment:
    """The whole observation is misread now and then; info["sensor_fault"], bool [], says when.

    The first observation of an episode is true. info["true_observation"] is what a sound sensor would show.

    Args:
        rate, persistence: in [0, 1]. `last_reading` with persistence 1 is a sensor that sticks.
        reading: `last_reading` (None), `fixed_reading`, `noisy_reading`, `random_reading`, or a function like them.

    Raises ValueError outside jit on a rate or persistence outside [0, 1].
    """
    breaks, read = _breaks("faulty_sensors", rate, persistence), last_reading if reading is None else reading

    def reset(key: Key) -> tuple[Any, Faulty]:
        observation, inner = environment.reset(key)
        return observation, Faulty(inner, jnp.zeros((), bool), observation)

    def step(key: Key, state: Faulty, action: Any) -> TimeStep:
        step_key, fault_key, read_key = jax.random.split(key, 3)
        new = environment.step(step_key, state.inner, action)
        fault = breaks(fault_key, state.fault)
        shown = jnp.where(fault, read(read_key, new.observation, state.shown), new.observation)
        info = new.info | {"sensor_fault": fault, "true_observation": new.observation}
        return new._replace(observation=shown, state=Faulty(new.state, fault, shown), info=info)

    return environment.replace(reset=reset, step=step)


def faulty_rewards(
    environment: Environment, *, rate: ArrayLike, reading: Reading, persistence: ArrayLike = 0.0
) -> Environment:
    """The reward is misread now and then; info["reward_fault"], bool [], says when.

    info["true_reward"] is what was earned. The arguments and errors are those of `faulty_sensors`; the last reading
    before an episode's first step is 0. After Everitt et al. (2017), "Reinforcement learning with a corrupted reward
    channel", arXiv:1705.08417.
    """
    breaks = _breaks("faulty_rewards", rate, persistence)

    def reset(key: Key) -> tuple[Any, Faulty]:
        observation, inner = environment.reset(key)
        return observation, Faulty(inner, jnp.zeros((), bool), jnp.zeros(()))

    def step(key: Key, state: Faulty, action: Any) -> TimeStep:
        step_key, fault_key, read_key = jax.random.split(key, 3)
        new = environment.step(step_key, state.inner, action)
        fault = breaks(fault_key, state.fault)
        shown = jnp.where(fault, reading(read_key, new.reward, state.shown), new.reward).astype(new.reward.dtype)
        info = new.info | {"reward_fault": fault, "true_reward": new.reward}
        after = Faulty(new.state, fault, shown.astype(state.shown.dtype))
        return new._replace(reward=shown, state=after, info=info)

    return environment.replace(reset=reset, step=step)


class Delayed(NamedTuple):
    """The state of `delayed_actions`. inner: of the environment inside; pending: [steps, ...], the oldest first."""

    inner: Any
    pending: Array


def delayed_actions(environment: Environment, steps: int, *, first: ArrayLike = 0) -> Environment:
    """Each action is executed `steps` steps after it was chosen; until then `first`, in every place of an action [...].

    Raises ValueError if `steps` < 1, or where `first` is not in the action space.
    """
    if steps < 1:
        raise ValueError(f"delayed_actions: steps must be at least 1, got {steps}")
    name, space = environment.name, environment.action_space
    idle = jnp.broadcast_to(jnp.asarray(first, space.dtype), space.shape)
    valid_action(f"delayed_actions({name}): first", space, idle)

    def reset(key: Key) -> tuple[Any, Delayed]:
        observation, inner = environment.reset(key)
        return observation, Delayed(inner, jnp.broadcast_to(idle, (steps, *space.shape)))

    def step(key: Key, state: Delayed, action: Any) -> TimeStep:
        valid_action(name, space, action)
        new = environment.step(key, state.inner, state.pending[0])
        pending = jnp.concatenate([state.pending[1:], jnp.asarray(action, space.dtype)[None]])
        return new._replace(state=Delayed(new.state, pending))

    return environment.replace(reset=reset, step=step)


def last_reading(key: Key, true: Array, shown: Array) -> Array:
    """What was shown last, [...]: the sensor holds its value."""
    return shown


def fixed_reading(value: ArrayLike) -> Reading:
    """Always `value`, a number or [...]: the sensor drops out (0) or saturates."""
    return lambda key, true, shown: jnp.broadcast_to(jnp.asarray(value, true.dtype), true.shape)


def noisy_reading(scale: ArrayLike) -> Reading:
    """The truth and Gaussian noise of standard deviation `scale`, a number or [...]; for floats only."""

    def read(key: Key, true: Array, shown: Array) -> Array:
        if not jnp.issubdtype(true.dtype, jnp.floating):
            raise ValueError(f"noisy_reading: what is read is {true.dtype}; use random_reading")
        return true + jnp.broadcast_to(scale, true.shape) * jax.random.normal(key, true.shape, true.dtype)

    return read


def random_reading(space: Space) -> Reading:
    """Anything in the space [...], uniformly."""
    return lambda key, true, shown: space.sample(key)


def _breaks(name: str, rate: ArrayLike, persistence: ArrayLike) -> Callable[[Key, Array], Array]:
    """(key, fault in the step before) -> fault now."""
    rate, persistence = checked_rate(name, rate), checked_rate(f"{name}, persistence", persistence)
    return lambda key, before: jax.random.uniform(key) < rate + (1.0 - rate) * persistence * before


def _action_source(environment: Environment, replacement: Any) -> Callable[[Key], Any]:
    space = environment.action_space
    if replacement is None:
        return space.sample
    if callable(replacement):
        return replacement
    valid_action(f"faulty_actions({environment.name}): replacement", space, replacement)
    stuck = jnp.asarray(replacement, space.dtype)
    return lambda key: stuck
