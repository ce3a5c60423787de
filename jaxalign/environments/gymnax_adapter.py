"""Environments of gymnax behind the protocol."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Box, Discrete, Environment, Space, TimeStep, check_environment, valid_action
from jaxalign.types import Key


def from_gymnax(environment: Any, params: Any = None) -> Environment:
    """A gymnax (1.0 or later) environment, or the name of one, as an Environment that does not reset itself.

    Args:
        environment: "Breakout-MinAtar", or a gymnax Environment.
        params: its parameters, which may be traced; None: the defaults. Time limits are theirs.

    Dynamics, `terminated` and `truncated` are gymnax's `step_env` and `is_truncated`; its own resets (in `step`, which
    always makes a new start) are left out: use `auto_reset` or `batched`. info is the environment's.
    Raises ImportError where a name is given and gymnax is missing; ValueError naming a space that is neither discrete
    nor a box [...], or whatever else is not as the protocol says.
    """
    if isinstance(environment, str):
        try:
            import gymnax
        except ImportError as error:
            raise ImportError('from_gymnax needs gymnax: pip install "jaxalign[envs]"') from error
        environment, defaults = gymnax.make(environment)
    else:
        defaults = environment.default_params
    params = defaults if params is None else params
    name = environment.name
    seen = _space(name, "observes", environment.observation_space(params))
    actions = _space(name, "takes", environment.action_space(params))
    state_types = jax.eval_shape(lambda: environment.reset_env(jax.random.key(0), params)[1])

    def settled(state: Any) -> Any:
        """The state with the types of the reset's: gymnax counts time in Python's integers, whose type is weak."""
        return jax.tree.map(lambda x, kind: jnp.asarray(x, kind.dtype), state, state_types)

    def reset(key: Key) -> tuple[Any, Any]:
        observation, state = environment.reset_env(key, params)
        return jnp.asarray(observation, seen.dtype), settled(state)

    def step(key: Key, state: Any, action: Any) -> TimeStep:
        valid = valid_action(name, actions, action)
        observation, new, reward, terminated, info = environment.step_env(key, state, action, params)
        truncated = jnp.asarray(environment.is_truncated(new, params), bool)
        reward = jnp.where(valid, jnp.asarray(reward, float), jnp.nan)
        terminated = jnp.asarray(terminated, bool)
        return TimeStep(jnp.asarray(observation, seen.dtype), settled(new), reward, terminated, truncated, info)

    adapted = Environment(reset, step, seen, actions, name)
    check_environment(adapted)
    return adapted


def _space(name: str, what: str, space: Any) -> Space:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "low"):
        return Box(space.low, space.high, tuple(space.shape), space.dtype)
    raise ValueError(f"from_gymnax: {name} {what} {space!r}; only discrete spaces and boxes are supported")
