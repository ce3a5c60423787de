"""Acting: steps of many environments at once, for learning; whole episodes of one policy, for evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Environment
from jaxalign.environments.wrappers import EnvironmentBatch
from jaxalign.types import Array, Key


class Steps(NamedTuple):
    """T steps of N environments, in time order along the first axis.

    observations: [T, N, ...], what the policy saw
    actions: [T, N, ...]
    rewards: [T, N]
    next_observations: [T, N, ...], the true successors, also where an episode ended and the next one began
    terminated, truncated: bool [T, N]
    log_probs: [T, N], log pi(a | s) of the policy that acted
    info: dict of [T, N, ...]
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminated: Array
    truncated: Array
    log_probs: Array
    info: dict[str, Any]

    @property
    def done(self) -> Array:
        """Where an episode ended, for whatever reason: bool [T, N]."""
        return self.terminated | self.truncated


def collect(
    key: Key,
    environments: EnvironmentBatch,
    act: Callable[[Key, Array], tuple[Array, Array]],
    observations: Array,
    world: Any,
    *,
    num_steps: int,
) -> tuple[tuple[Array, Any], Steps]:
    """`num_steps` steps of N environments from where they stand, as one scan.

    Args:
        environments: `batched(environment, N)`.
        act: (key, observations [N, ...]) -> (actions [N, ...], log_probs [N]).
        observations, world: as `environments.reset` or the last call gave them.

    Returns ((observations, world), Steps [T, N, ...]).
    """

    def one(carry: tuple[Array, Any], keys: Array) -> tuple[tuple[Array, Any], Steps]:
        seen, world = carry
        actions, log_probs = act(keys[0], seen)
        step = environments.step(keys[1], world, actions)
        info = {name: value for name, value in step.info.items() if name != "final_observation"}
        taken = Steps(
            seen, actions, step.reward, step.info["final_observation"], step.terminated, step.truncated, log_probs, info
        )
        return (step.observation, step.state), taken

    return jax.lax.scan(one, (observations, world), jax.random.split(key, (num_steps, 2)))


class Episodes(NamedTuple):
    """E evaluated episodes.

    returns: [E], undiscounted sums of rewards
    lengths: [E] int32
    finished: bool [E], False where `max_steps` came before the end
    """

    returns: Array
    lengths: Array
    finished: Array


def evaluate(
    key: Key, environment: Environment, act: Callable[[Key, Array], Array], *, episodes: int, max_steps: int
) -> Episodes:
    """Run one policy for E = `episodes` whole episodes side by side, each from a fresh reset, until the last has ended.

    Args:
        environment: not auto-resetting.
        act: (key, observation [...]) -> action, of one environment; for greedy actions ignore the key.
        max_steps: no episode goes on longer.

    Returns Episodes, each field [E].
    """
    reset_key, run_key = jax.random.split(key)
    observations, world = jax.vmap(environment.reset)(jax.random.split(reset_key, episodes))
    zeros = jnp.zeros(episodes)
    start = (jnp.zeros((), jnp.int32), observations, world, zeros, jnp.zeros(episodes, jnp.int32), zeros > 0)

    def going(carry: Any) -> Array:
        t, *_, ended = carry
        return (t < max_steps) & ~jnp.all(ended)

    def one(carry: Any) -> Any:
        t, seen, world, returns, lengths, ended = carry
        act_keys, step_keys = jax.random.split(jax.random.fold_in(run_key, t), (2, episodes))
        actions = jax.vmap(act)(act_keys, seen)
        step = jax.vmap(environment.step)(step_keys, world, actions)
        # An ended episode is stepped on and not counted: its state may be anything.
        returns = jnp.where(ended, returns, returns + step.reward)
        lengths = lengths + ~ended
        return t + 1, step.observation, step.state, returns, lengths, ended | step.terminated | step.truncated

    _, _, _, returns, lengths, ended = jax.lax.while_loop(going, one, start)
    return Episodes(returns, lengths, ended)
