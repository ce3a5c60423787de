"""Demonstrations as padded arrays: sampled from a policy, gathered from files, checked, and counted."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp import TabularMDP, sample_next
from jaxalign.types import Array, ArrayLike, Key


class Trajectories(NamedTuple):
    """N demonstrations of at most T steps; what stands where `mask` is False is padding.

    states: [N, T] int, the state in which each action was taken
    actions: [N, T] int
    mask: [N, T] bool
    """

    states: Array
    actions: Array
    mask: Array


def sample_trajectories(key: Key, mdp: TabularMDP, log_policy: Array, *, num: int, length: int) -> Trajectories:
    """Follow a policy [S, A] (or one that changes with time, [length, S, A]) `num` times for up to `length` steps.

    A trajectory ends on entering a terminal state. Returns arrays [num, length]; jit with `num` and `length` static.
    Raises ValueError if `log_policy` is of another shape.
    """
    stationary, timed = (mdp.num_states, mdp.num_actions), (length, mdp.num_states, mdp.num_actions)
    if log_policy.shape not in (stationary, timed):
        raise ValueError(f"sample_trajectories: log_policy must be {stationary} or {timed}, got {log_policy.shape}")

    def one(key: Key) -> Trajectories:
        start_key, step_key = jax.random.split(key)
        start = jax.random.categorical(start_key, jnp.log(mdp.initial)).astype(jnp.int32)

        def step(state: Array, inputs: tuple[Array, Key]) -> tuple[Array, Trajectories]:
            time, key = inputs
            action_key, next_key = jax.random.split(key)
            logits = log_policy[state] if log_policy.ndim == 2 else log_policy[time, state]
            action = jax.random.categorical(action_key, logits).astype(jnp.int32)
            ended = mdp.terminal[state]
            after = sample_next(next_key, mdp.transition, state, action).astype(jnp.int32)
            return jnp.where(ended, state, after), Trajectories(state, action, ~ended)

        inputs = (jnp.arange(length), jax.random.split(step_key, length))
        return jax.lax.scan(step, start, inputs)[1]

    return jax.vmap(one)(jax.random.split(key, num))


def pad_trajectories(demonstrations: Sequence[tuple[ArrayLike, ArrayLike]]) -> Trajectories:
    """Demonstrations (states [T_i], actions [T_i]) of any lengths T_i as one Trajectories [N, max T_i].

    Raises ValueError naming the demonstration that is empty or whose states and actions differ in length.
    """
    pairs = [(np.asarray(states), np.asarray(actions)) for states, actions in demonstrations]
    if not pairs:
        raise ValueError("demonstrations: there are none")
    for i, (states, actions) in enumerate(pairs):
        if states.ndim != 1 or states.shape != actions.shape or not states.size:
            raise ValueError(
                f"demonstrations[{i}]: states and actions must be two equally long, non-empty rows, "
                f"got {states.shape} and {actions.shape}"
            )
        if not all(np.issubdtype(x.dtype, np.integer) for x in (states, actions)):
            raise ValueError(f"demonstrations[{i}]: states and actions must be integers")
    length = max(states.size for states, _ in pairs)
    padded = [[np.pad(x, (0, length - x.size)) for x in column] for column in zip(*pairs, strict=True)]
    mask = [np.arange(length) < states.size for states, _ in pairs]
    states, actions = (jnp.asarray(np.stack(column), jnp.int32) for column in padded)
    return Trajectories(states, actions, jnp.asarray(np.stack(mask)))


def check_trajectories(mdp: TabularMDP, trajectories: Trajectories) -> None:
    """Raise ValueError unless all arrays are [N, T] and, outside jit, hold a step and valid states and actions."""
    _check_ranges(trajectories, {"states": mdp.num_states, "actions": mdp.num_actions})


def _check_ranges(trajectories: Trajectories, sizes: dict[str, int]) -> None:
    shapes = [x.shape for x in trajectories]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"trajectories: states, actions and mask must all be [N, T], got {shapes}")
    integers = all(jnp.issubdtype(x.dtype, jnp.integer) for x in trajectories[:2])
    if not integers or trajectories.mask.dtype != bool:
        dtypes = [str(x.dtype) for x in trajectories]
        raise ValueError(f"trajectories: states and actions must be integers and mask bool, got {dtypes}")
    if any(isinstance(x, jax.core.Tracer) for x in trajectories):
        return
    mask = np.asarray(trajectories.mask)
    if not mask.any():
        raise ValueError("trajectories: there is no step in them (empty demonstrations)")
    for name, size in sizes.items():
        values = np.asarray(getattr(trajectories, name))
        wrong = mask & ((values < 0) | (values >= size))
        if wrong.any():
            i, t = (int(x) for x in np.argwhere(wrong)[0])
            raise ValueError(f"trajectories: {name}[{i}, {t}] is {values[i, t]}, not in 0..{size - 1}")


def visit_counts(mdp: TabularMDP, trajectories: Trajectories, *, discount: ArrayLike = 1.0) -> Array:
    """counts[s, a] = (1 / N) sum_n sum_t discount^t 1[s_nt = s, a_nt = a, mask_nt], [S, A]; terminal states count 0.

    With the MDP's discount this is the demonstrations' estimate of `occupancy_measure`; with 1, what a log-likelihood
    is weighted by. Raises ValueError as `check_trajectories`.
    """
    check_trajectories(mdp, trajectories)
    states, actions, mask = trajectories
    weights = mask * jnp.asarray(discount) ** jnp.arange(states.shape[1], dtype=mdp.initial.dtype)[None, :]
    counts = jnp.zeros((mdp.num_states, mdp.num_actions), weights.dtype)
    counts = counts.at[states, actions].add(weights) / states.shape[0]
    return jnp.where(mdp.terminal[:, None], 0.0, counts)


def timed_visit_counts(mdp: TabularMDP, trajectories: Trajectories, *, horizon: int) -> Array:
    """counts[t, s, a] = (1 / N) sum_n 1[s_nt = s, a_nt = a, mask_nt], [H, S, A]; terminal states count 0.

    Raises ValueError as `check_trajectories`, or if the trajectories are longer than the horizon.
    """
    check_trajectories(mdp, trajectories)
    states, actions, mask = trajectories
    if states.shape[1] > horizon:
        raise ValueError(f"trajectories: they have {states.shape[1]} steps, more than horizon={horizon}")
    counts = jnp.zeros((horizon, mdp.num_states, mdp.num_actions), mdp.initial.dtype)
    time = jnp.broadcast_to(jnp.arange(states.shape[1])[None, :], states.shape)
    counts = counts.at[time, states, actions].add(mask.astype(counts.dtype)) / states.shape[0]
    return jnp.where(mdp.terminal[None, :, None], 0.0, counts)


def feature_expectations(features: Array, trajectories: Trajectories, *, discount: ArrayLike) -> Array:
    """(1 / N) sum_n sum_t discount^t mask_nt features[s_nt], features [S, F] -> [F].

    Raises ValueError as `check_trajectories`, whose S is that of `features`.
    """
    _check_ranges(trajectories, {"states": features.shape[0]})
    states, _, mask = trajectories
    weights = mask * jnp.asarray(discount) ** jnp.arange(states.shape[1], dtype=features.dtype)[None, :]
    return jnp.einsum("nt,ntf->f", weights, features[states]) / states.shape[0]
