"""Any finite MDP as an environment to sample from: gridworlds, safety gridworlds, random MDPs."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.environments.protocol import Box, Discrete, Environment, Space, TimeStep, valid_action
from jaxalign.environments.wrappers import time_limit
from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.mdp.transitions import sample_next
from jaxalign.types import Array, ArrayLike, Key


def tabular_environment(
    mdp: TabularMDP,
    reward: ArrayLike,
    *,
    observe: str | ArrayLike = "one_hot",
    measures: dict[str, ArrayLike] | None = None,
    max_steps: ArrayLike | None = None,
    name: str = "tabular",
) -> Environment:
    """Step through a TabularMDP: s' ~ P(. | s, a), paid reward[s], reward[s, a] or reward[s, a, s'].

    Entering a terminal state terminates; in one (if `initial` has them) nothing is paid and nothing moves. The expected
    discounted sum of what it pays is `policy_evaluation` at the start, with or without the reward of `arrival_reward`.
    The state is its number, [] int32.

    Args:
        reward: [S], [S, A] or [S, A, S].
        observe: "one_hot" [S], "index" (Discrete(S)), or features [S, ...], whose rows are seen.
        measures: more such rewards by name, reported in info at each step and not paid: {"cost": cost[S, A]},
            {"performance": world.performance}.
        max_steps: truncate after so many; None: never.

    Raises ValueError naming a reward or `observe` of another shape.
    """
    states, actions = mdp.num_states, Discrete(mdp.num_actions)
    paid = {"reward": _checked(mdp, reward, "reward")}
    for label, measure in (measures or {}).items():
        paid[f"measure {label}"] = _checked(mdp, measure, f"measures[{label!r}]")
    features, space = _observation(observe, states)

    def seen(state: Array) -> Array:
        return state if features is None else features[state]

    def reset(key: Key) -> tuple[Array, Array]:
        state = jax.random.categorical(key, jnp.log(mdp.initial)).astype(jnp.int32)
        return seen(state), state

    def step(key: Key, state: Array, action: Array) -> TimeStep:
        valid = valid_action(name, actions, action)
        over = mdp.terminal[state]
        after = jnp.where(over, state, sample_next(key, mdp.transition, state, action)).astype(jnp.int32)
        earned = {label: jnp.where(over, 0.0, x[(state, action, after)[: x.ndim]]) for label, x in paid.items()}
        earned = {label: jnp.where(valid, x, jnp.nan) for label, x in earned.items()}
        pay = earned.pop("reward")
        info = {label.removeprefix("measure "): x for label, x in earned.items()}
        return TimeStep(seen(after), after, pay, mdp.terminal[after], jnp.zeros((), bool), info)

    environment = Environment(reset, step, space, actions, name)
    return environment if max_steps is None else time_limit(environment, max_steps)


def _checked(mdp: TabularMDP, reward: ArrayLike, label: str) -> Array:
    try:
        jax.eval_shape(lambda: action_reward(mdp, reward))
    except ValueError as error:
        raise ValueError(f"tabular_environment: {label}: {error}") from None
    return jnp.asarray(reward, jnp.promote_types(jnp.asarray(reward).dtype, mdp.initial.dtype))


def _observation(observe: str | ArrayLike, states: int) -> tuple[Array | None, Space]:
    if isinstance(observe, str):
        if observe == "index":
            return None, Discrete(states)
        if observe != "one_hot":
            raise ValueError(f"tabular_environment: observe must be 'one_hot', 'index' or an array, got {observe!r}")
        return jnp.eye(states), Box(0.0, 1.0, (states,))
    features = jnp.asarray(observe, float)
    if features.ndim < 1 or features.shape[0] != states:
        raise ValueError(f"tabular_environment: observe must be [S, ...] with S={states}, got {features.shape}")
    return features, Box(-np.inf, np.inf, features.shape[1:])
