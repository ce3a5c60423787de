"""What an environment is: two pure functions, and the spaces of what is seen and what can be done."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike, Key


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The integers 0..size-1: an action or an observation [] int32."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """()."""
        return ()

    @property
    def dtype(self) -> Any:
        """int32."""
        return jnp.int32

    def contains(self, x: ArrayLike) -> Array:
        """Whether each of `x` [...] is in 0..size-1, bool [...]."""
        return (jnp.asarray(x) >= 0) & (jnp.asarray(x) < self.size)

    def sample(self, key: Key) -> Array:
        """A member drawn uniformly, [] int32."""
        return jax.random.randint(key, (), 0, self.size)


@dataclasses.dataclass(frozen=True)
class Box:
    """Real arrays of a shape with low <= x <= high in every place; an infinite end is no limit.

    low, high: floats that hold for every place, or arrays of the space's shape [...]
    """

    low: Any
    high: Any
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def contains(self, x: ArrayLike) -> Array:
        """Whether `x` [..., *shape] is inside in every place, bool [...]; NaN is not."""
        inside = (jnp.asarray(x) >= self.low) & (jnp.asarray(x) <= self.high)
        return jnp.all(inside, axis=tuple(range(-len(self.shape), 0)))

    def sample(self, key: Key) -> Array:
        """A member drawn uniformly [*shape]. Raises ValueError for a space without limits."""
        if not np.isfinite(np.asarray(self.low)).all() or not np.isfinite(np.asarray(self.high)).all():
            raise ValueError(f"Box.sample: the space has no limits to draw between: {self.low} .. {self.high}")
        return jax.random.uniform(key, self.shape, self.dtype, self.low, self.high)


Space = Discrete | Box


class TimeStep(NamedTuple):
    """What a step gives, in the order of the protocol.

    observation: what is seen after the step, of the observation space's shape [...]
    state: the environment's, any pytree of arrays
    reward: [] float
    terminated: [] bool, the episode ended in a state worth 0 (failure, goal)
    truncated: [] bool, it was cut off (time limit): the state after it keeps its value
    info: dict of arrays. After `auto_reset`, info["final_observation"] is the true successor, where `observation` may
        already be the first of the next episode.
    """

    observation: Any
    state: Any
    reward: Array
    terminated: Array
    truncated: Array
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Environment:
    """A world to act in, as two pure functions that can be jitted and vmapped; numbers in it may be traced.

    reset: key -> (observation, state)
    step: (key, state, action) -> TimeStep(observation, state, reward, terminated, truncated, info)
    observation_space, action_space: Discrete or Box
    name: for messages
    """

    reset: Callable[[Key], tuple[Any, Any]]
    step: Callable[[Key, Any, Any], TimeStep]
    observation_space: Space
    action_space: Space
    name: str = "environment"

    def replace(self, **changes: Any) -> "Environment":
        """The same environment with some fields changed: how wrappers are written."""
        return dataclasses.replace(self, **changes)


def valid_action(environment: str, space: Space, action: ArrayLike) -> Array:
    """Whether `action` [...] is in the space, bool []. Environments pay NaN for one that is not.

    Outside jit it raises ValueError instead, naming the environment and the action; so does a wrong shape, at any time.
    """
    action = jnp.asarray(action)
    if action.shape != tuple(space.shape):
        raise ValueError(f"{environment}: an action must have shape {tuple(space.shape)}, got {action.shape}")
    if isinstance(space, Discrete) and not jnp.issubdtype(action.dtype, jnp.integer):
        raise ValueError(f"{environment}: an action must be an integer in 0..{space.size - 1}, got {action.dtype}")
    valid = space.contains(action)
    if not isinstance(valid, jax.core.Tracer) and not bool(valid):
        limits = f"0..{space.size - 1}" if isinstance(space, Discrete) else f"{space.low} .. {space.high}"
        raise ValueError(f"{environment}: action {np.asarray(action).tolist()} is not in {limits}")
    return valid


def check_environment(environment: Environment) -> None:
    """Trace `reset` and `step` once and compare what they give with the protocol; nothing runs.

    Raises ValueError naming the environment, the part that is wrong, and its shape or type: an observation that is not
    of its space, a reward that is no float scalar, flags that are not bool, a state that changes its shape in a step.
    """
    name, space = environment.name, environment.observation_space
    key = jax.eval_shape(lambda: jax.random.key(0))
    observation, state = jax.eval_shape(environment.reset, key)
    action = jax.ShapeDtypeStruct(tuple(environment.action_space.shape), environment.action_space.dtype)
    step = TimeStep(*jax.eval_shape(environment.step, key, state, action))
    for where, seen in (("reset", observation), ("step", step.observation)):
        if getattr(seen, "shape", None) != tuple(space.shape):
            found = getattr(seen, "shape", type(seen).__name__)
            raise ValueError(f"{name}: {where} gives an observation {found}, its space says {tuple(space.shape)}")
    if step.reward.shape != () or not jnp.issubdtype(step.reward.dtype, jnp.floating):
        raise ValueError(f"{name}: a reward must be a float scalar, got {step.reward.dtype}{list(step.reward.shape)}")
    for flag in ("terminated", "truncated"):
        given = getattr(step, flag)
        if given.shape != () or given.dtype != bool:
            raise ValueError(f"{name}: {flag} must be a bool scalar, got {given.dtype}{list(given.shape)}")
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, step.state))
    if before != after:
        raise ValueError(f"{name}: a step turns the state's shapes {before} into {after}")


def flat_size(space: Space) -> int:
    """How many numbers describe a member: the size of a Discrete (one-hot), the elements of a Box [...]."""
    return space.size if isinstance(space, Discrete) else math.prod(space.shape)
