"""Functions from an environment to an environment: limits, resets, statistics, normalisation.

The order, from the inside out:

    batch = batched(episode_statistics(time_limit(rescale_actions(environment), 500)), 16)
    batch = normalize_rewards(normalize_observations(batch), discount=0.99)

- `time_limit` inside what resets: a reset answers to `truncated`, and the limit is counted anew. (The built-in
  environments have theirs already.)
- `episode_statistics` inside `normalize_rewards`, so that it adds up what the environment pays.
- `normalize_observations` and `normalize_rewards` outside `auto_reset` or `batched`: a reset makes a new state, and
  running moments kept inside it would start again with every episode. Around `batched` all environments share them.
- `batched` instead of `jax.vmap(auto_reset(environment).step)`, which makes a new start at every step of every
  environment because a vmapped `cond` computes both sides.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign.environments.protocol import Box, Discrete, Environment, Space, TimeStep, valid_action
from jaxalign.environments.running_moments import (
    EPSILON,
    RunningMoments,
    init_moments,
    normalize,
    update_moments,
)
from jaxalign.types import Array, ArrayLike, Key


@dataclasses.dataclass(frozen=True)
class EnvironmentBatch:
    """`num` environments that step together and reset themselves: made by `batched`.

    reset: key -> (observations [N, ...], state)
    step: (key, state, actions [N, ...]) -> TimeStep, every leaf [N, ...], with info["final_observation"] [N, ...]
    observation_space, action_space: of one of them
    """

    reset: Callable[[Key], tuple[Any, Any]]
    step: Callable[[Key, Any, Any], TimeStep]
    observation_space: Space
    action_space: Space
    num: int
    name: str = "environment"

    def replace(self, **changes: Any) -> "EnvironmentBatch":
        """The same batch with some fields changed."""
        return dataclasses.replace(self, **changes)


Resetting = TypeVar("Resetting", Environment, EnvironmentBatch)


class Timed(NamedTuple):
    """The state of `time_limit`. elapsed: [] int32, steps since the reset."""

    inner: Any
    elapsed: Array


def time_limit(environment: Environment, steps: ArrayLike) -> Environment:
    """Truncate after `steps` steps (may be traced): truncated [] also where the environment terminates just then."""

    def reset(key: Key) -> tuple[Any, Timed]:
        observation, inner = environment.reset(key)
        return observation, Timed(inner, jnp.zeros((), jnp.int32))

    def step(key: Key, state: Timed, action: Any) -> TimeStep:
        new = environment.step(key, state.inner, action)
        elapsed = state.elapsed + 1
        return new._replace(state=Timed(new.state, elapsed), truncated=new.truncated | (elapsed >= steps))

    return environment.replace(reset=reset, step=step)


def auto_reset(environment: Environment) -> Environment:
    """Begin a new episode in the step that ends one.

    terminated, truncated and reward are those of the step; where it ended an episode, observation [...] and state are
    the new start's, and info["final_observation"] is always the successor itself.
    Raises ValueError where the environment has an info["final_observation"] already, so resets of its own.
    """

    def step(key: Key, state: Any, action: Any) -> TimeStep:
        step_key, reset_key = jax.random.split(key)
        new = _unreset(environment, environment.step(step_key, state, action))
        observation, state = lax.cond(
            new.terminated | new.truncated,
            lambda: environment.reset(reset_key),
            lambda: (new.observation, new.state),
        )
        return new._replace(observation=observation, state=state)

    return environment.replace(step=step)


def batched(environment: Environment, num: int) -> EnvironmentBatch:
    """`num` environments that step together, each beginning a new episode in the step that ends one, as `auto_reset`.

    New starts are drawn only in a step in which some episode ends: one `cond` around the vmapped reset, where vmapping
    `auto_reset` would draw [N] of them in every step.
    Raises ValueError where the environment has an info["final_observation"] already, so resets of its own.
    """

    def reset(key: Key) -> tuple[Any, Any]:
        return jax.vmap(environment.reset)(jax.random.split(key, num))

    def step(key: Key, state: Any, actions: Any) -> TimeStep:
        step_key, reset_key = jax.random.split(key)
        new = jax.vmap(environment.step)(jax.random.split(step_key, num), state, actions)
        new = _unreset(environment, new)
        done = new.terminated | new.truncated

        def restart() -> tuple[Any, Any]:
            def choose(start: Array, kept: Array) -> Array:
                return jnp.where(done.reshape(num, *(1,) * (kept.ndim - 1)), start, kept)

            return jax.tree.map(choose, reset(reset_key), (new.observation, new.state))

        observation, state = lax.cond(jnp.any(done), restart, lambda: (new.observation, new.state))
        return new._replace(observation=observation, state=state)

    return EnvironmentBatch(
        reset, step, environment.observation_space, environment.action_space, num, environment.name
    )


def _unreset(environment: Environment, new: TimeStep) -> TimeStep:
    """The step with info["final_observation"]; ValueError if it has one."""
    if "final_observation" in new.info:
        raise ValueError(f"{environment.name} resets itself already: wrap it before its `auto_reset`")
    return new._replace(info={**new.info, "final_observation": new.observation})


class Counted(NamedTuple):
    """The state of `episode_statistics`. episode_return: [] float; episode_length: [] int32; of the steps so far."""

    inner: Any
    episode_return: Array
    episode_length: Array


def episode_statistics(environment: Environment) -> Environment:
    """info["episode_return"] [] and info["episode_length"] []: the undiscounted sum and number of the episode's rewards
    up to and with this step, so those of the whole episode where terminated | truncated."""

    def reset(key: Key) -> tuple[Any, Counted]:
        observation, inner = environment.reset(key)
        return observation, Counted(inner, jnp.zeros(()), jnp.zeros((), jnp.int32))

    def step(key: Key, state: Counted, action: Any) -> TimeStep:
        new = environment.step(key, state.inner, action)
        total = state.episode_return + new.reward.astype(state.episode_return.dtype)
        length = state.episode_length + 1
        # Begins again by itself, so that it is right outside `auto_reset` too.
        done = new.terminated | new.truncated
        counted = Counted(new.state, jnp.where(done, 0.0, total), jnp.where(done, 0, length))
        info = {**new.info, "episode_return": total, "episode_length": length}
        return new._replace(state=counted, info=info)

    return environment.replace(reset=reset, step=step)


class Normalized(NamedTuple):
    """The state of `normalize_observations`. moments: of all observations so far."""

    inner: Any
    moments: RunningMoments


def normalize_observations(environment: Resetting, *, clip: ArrayLike = 10.0) -> Resetting:
    """Observations [...] less their running mean, over their running standard deviation, cut to [-clip, clip].

    For an auto-resetting environment or a batch of them (which then share the moments): see the module's docstring.
    info["final_observation"] is normalised alike. Raises ValueError for Discrete observations.
    """
    space = environment.observation_space
    if isinstance(space, Discrete):
        raise ValueError(f"normalize_observations: {environment.name} observes integers, which have no mean")

    def reset(key: Key) -> tuple[Any, Normalized]:
        observation, inner = environment.reset(key)
        moments = update_moments(init_moments(tuple(space.shape)), observation)
        return normalize(moments, observation, clip=clip), Normalized(inner, moments)

    def step(key: Key, state: Normalized, action: Any) -> TimeStep:
        new = environment.step(key, state.inner, action)
        moments = update_moments(state.moments, new.observation)
        info = dict(new.info)
        if "final_observation" in info:
            info["final_observation"] = normalize(moments, info["final_observation"], clip=clip)
        observation = normalize(moments, new.observation, clip=clip)
        return new._replace(observation=observation, state=Normalized(new.state, moments), info=info)

    return environment.replace(reset=reset, step=step, observation_space=Box(-clip, clip, space.shape, space.dtype))


class Scaled(NamedTuple):
    """The state of `normalize_rewards`. discounted: the discounted sum of the episode's rewards so far, [] or [N]."""

    inner: Any
    discounted: Array
    moments: RunningMoments


def normalize_rewards(environment: Resetting, *, discount: ArrayLike, clip: ArrayLike = 10.0) -> Resetting:
    """Rewards [] over the running standard deviation of R <- discount R + reward, cut to [-clip, clip]; not centred,
    which would change what is best. Engstrom et al., arXiv:2005.12729, section 3.

    For an auto-resetting environment or a batch of them (which then share the moments): see the module's docstring.
    A reward that is not a number stays so and does not enter the moments.
    """

    def reset(key: Key) -> tuple[Any, Scaled]:
        observation, inner = environment.reset(key)
        several = (environment.num,) if isinstance(environment, EnvironmentBatch) else ()
        return observation, Scaled(inner, jnp.zeros(several), init_moments())

    def step(key: Key, state: Scaled, action: Any) -> TimeStep:
        new = environment.step(key, state.inner, action)
        discounted = discount * state.discounted + new.reward.astype(state.discounted.dtype)
        moments = update_moments(state.moments, discounted, jnp.isfinite(discounted))
        reward = jnp.clip(new.reward / jnp.sqrt(moments.variance + EPSILON), -clip, clip)
        discounted = jnp.where(new.terminated | new.truncated, 0.0, discounted)
        return new._replace(reward=reward, state=Scaled(new.state, discounted, moments))

    return environment.replace(reset=reset, step=step)


def clip_actions(environment: Environment) -> Environment:
    """Any real action [...] is taken, cut to the limits of the action space. Raises ValueError for Discrete actions."""
    space = _box("clip_actions", environment)

    def step(key: Key, state: Any, action: Any) -> TimeStep:
        return environment.step(key, state, jnp.clip(jnp.asarray(action), space.low, space.high))

    return environment.replace(step=step, action_space=Box(-np.inf, np.inf, space.shape, space.dtype))


def rescale_actions(environment: Environment, low: ArrayLike = -1.0, high: ArrayLike = 1.0) -> Environment:
    """Actions [...] in [low, high], mapped linearly onto the limits of the environment's action space.

    Raises ValueError for Discrete actions or a space without limits.
    """
    space = _box("rescale_actions", environment)
    limits = [x for x in (space.low, space.high) if not isinstance(x, jax.core.Tracer)]
    if not all(np.isfinite(np.asarray(x)).all() for x in limits):
        raise ValueError(f"rescale_actions: {environment.name} takes actions without limits: {space.low}..{space.high}")
    given = Box(low, high, space.shape, space.dtype)

    def step(key: Key, state: Any, action: Any) -> TimeStep:
        valid = valid_action(environment.name, given, action)
        inner = space.low + (jnp.asarray(action) - low) / (high - low) * (space.high - space.low)
        # Rounding must not carry an action at a limit beyond it; one that was not valid must not become so.
        inner = jnp.where(valid, jnp.clip(inner, space.low, space.high), jnp.nan)
        return environment.step(key, state, inner)

    return environment.replace(step=step, action_space=given)


def _box(wrapper: str, environment: Environment) -> Box:
    if not isinstance(environment.action_space, Box):
        raise ValueError(f"{wrapper}: {environment.name} takes integer actions, not real ones")
    return environment.action_space
