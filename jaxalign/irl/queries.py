"""Questions to ask about a reward, as tables log P(answer | reward) for N hypotheses: choices, actions, demonstrations.

`rewards` are N hypotheses, each [S], [S, A] or [S, A, S]: an array [N, S], [N, S, A] or [N, S, A, S]. How a person
answers under a reward is the Boltzmann model throughout, with rationality `beta` per unit of return.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign.irl.active import expected_information_gain, update_weights
from jaxalign.irl.trajectories import Trajectories, check_trajectories
from jaxalign.mdp import TabularMDP, action_reward, dense_transition, sample_next, value_iteration
from jaxalign.types import Array, ArrayLike, Key


def trajectory_returns(mdp: TabularMDP, rewards: Array, trajectories: Trajectories) -> Array:
    """returns[n, m] = sum_t discount^t mask[m, t] r_n(states[m, t], actions[m, t]), rewards [N, ...] -> [N, M].

    A reward [S, A, S] counts in expectation over the next state. Raises ValueError as `check_trajectories`.
    """
    check_trajectories(mdp, trajectories)
    states, actions, mask = trajectories
    weights = mask * mdp.discount ** jnp.arange(states.shape[1], dtype=mdp.initial.dtype)[None, :]
    return jax.vmap(lambda reward: jnp.sum(weights * action_reward(mdp, reward)[states, actions], axis=1))(rewards)


def all_pairs(count: int) -> Array:
    """Every pair i < j of `count` items M, [M (M - 1) / 2, 2] int32."""
    return jnp.asarray(np.stack(np.triu_indices(count, 1), axis=1), jnp.int32)


def choice_log_likelihood(returns: ArrayLike, slates: ArrayLike, *, beta: ArrayLike) -> Array:
    """"Which of these K trajectories is best?": log_softmax over the slate of beta returns, [N, Q, K].

    With K = 2 it is the comparison P(i preferred to j) = sigmoid(beta (R_i - R_j)) (Bradley-Terry).

    Args:
        returns: [N, M], of each trajectory under each hypothesis (`trajectory_returns`; theta @ features.T if linear).
        slates: int [Q, K], trajectories in 0..M-1 (`all_pairs(M)` for all comparisons).

    Raises ValueError on other shapes and, outside jit, on an index outside 0..M-1.
    """
    returns, slates = jnp.asarray(returns), jnp.asarray(slates)
    if returns.ndim != 2 or slates.ndim != 2 or not jnp.issubdtype(slates.dtype, jnp.integer):
        raise ValueError(
            "choice_log_likelihood: returns must be [N, M] and slates integers [Q, K], "
            f"got {returns.shape} and {slates.dtype} {slates.shape}"
        )
    _check_index("choice_log_likelihood: slates", slates, returns.shape[1])
    return jax.nn.log_softmax(beta * returns[:, slates], axis=-1)


def action_log_likelihood(mdp: TabularMDP, rewards: Array, *, beta: ArrayLike) -> Array:
    """"What would you do in state s?": log_softmax over a of beta Q*_n(s, a), rewards [N, ...] -> [N, S, A].

    One query per state, and the policies that demonstrations are made of. In terminal states it is uniform whatever
    the reward, so asking there is worth 0.
    """
    return jax.vmap(lambda reward: jax.nn.log_softmax(beta * value_iteration(mdp, reward).q, axis=-1))(rewards)


def demonstration_log_likelihood(mdp: TabularMDP, log_policies: Array, starts: ArrayLike, *, length: int) -> Array:
    """"Show me what you would do from here": every sequence of `length` actions as an answer, [N, Q, A^length].

    log_likelihood[n, q, k] = sum_t log_policies[n, s_t, a_t], where digit t of k to the base A (the first action is the
    leading digit) is a_t and s_t follows from starts[q]: in a deterministic MDP the actions are the demonstration.
    After a terminal state the actions are uniform under every hypothesis and tell nothing.

    Args:
        log_policies: [N, S, A] (`action_log_likelihood`).
        starts: int [Q], first states.

    Exact, for short `length` only. Raises ValueError on other shapes and, outside jit, if a transition is random
    (then use `demonstration_information_gain`) or a start is not in 0..S-1.
    """
    log_policies, starts = _check_policies(mdp, log_policies, starts, "demonstration_log_likelihood")
    transition = dense_transition(mdp.transition)
    sure = (jnp.max(transition, axis=-1) > 1.0 - 1e-4) | mdp.terminal[:, None]
    if not isinstance(sure, jax.core.Tracer) and not bool(jnp.all(sure)):
        raise ValueError("demonstration_log_likelihood: a transition is random; use demonstration_information_gain")
    successor = jnp.argmax(transition, axis=-1)
    sequences = np.indices((mdp.num_actions,) * length).reshape(length, -1)  # [length, K]

    def step(carry: tuple[Array, Array], actions: Array) -> tuple[tuple[Array, Array], None]:
        states, total = carry  # [Q, K], [N, Q, K]
        actions = jnp.broadcast_to(actions[None], states.shape)
        after = jnp.where(mdp.terminal[states], states, successor[states, actions])
        return (after, total + log_policies[:, states, actions]), None

    states = jnp.broadcast_to(starts[:, None], (starts.size, sequences.shape[1]))
    total = jnp.zeros((log_policies.shape[0], *states.shape), log_policies.dtype)
    return lax.scan(step, (states, total), jnp.asarray(sequences))[0][1]


def demonstration_information_gain(
    key: Key,
    mdp: TabularMDP,
    log_policies: Array,
    log_weights: ArrayLike,
    starts: ArrayLike,
    *,
    length: int,
    num_samples: int,
) -> tuple[Array, Array]:
    """The information gain of a demonstration of `length` steps from each start, for any dynamics, by simulation.

    Known dynamics tell nothing of the reward, so by the chain rule
    gain[q] = E_{s_0, a_0, s_1, ...} sum_t I(reward; a_t | s_0, a_0, ..., s_t)
    over histories drawn from the hypotheses' mixture. Each summand is computed exactly from the posterior over all N
    hypotheses given the history; only the histories are sampled. So the estimate is nonnegative and unbiased for these
    hypotheses, exact at length 1, and varies less than the mean of log P(history | n) / P(history).

    Args:
        log_policies: [N, S, A] (`action_log_likelihood`).
        log_weights: [N].
        starts: int [Q].
        length, num_samples: static; `num_samples` >= 2 histories per start.

    Returns (gain, standard error), [Q] each, nats. One start at a time: holds num_samples * N * A numbers.
    Raises ValueError on other shapes, too few samples and, outside jit, a start not in 0..S-1.
    """
    log_policies, starts = _check_policies(mdp, log_policies, starts, "demonstration_information_gain")
    if num_samples < 2:
        raise ValueError(f"demonstration_information_gain: num_samples must be at least 2, got {num_samples}")
    prior = jax.nn.log_softmax(jnp.asarray(log_weights))

    def history(key: Key, start: Array) -> Array:
        def step(carry: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], Array]:
            state, weights = carry
            action_key, next_key = jax.random.split(key)
            policies = log_policies[:, state]
            gain = expected_information_gain(policies[:, None, :], weights)[0]
            mixture = jax.nn.logsumexp(weights[:, None] + policies, axis=0)
            action = jax.random.categorical(action_key, mixture)
            after = sample_next(next_key, mdp.transition, state, action).astype(state.dtype)
            after = jnp.where(mdp.terminal[state], state, after)
            return (after, update_weights(policies, weights, action)), gain

        return jnp.sum(lax.scan(step, (start, prior), jax.random.split(key, length))[1])

    def at_start(inputs: tuple[Key, Array]) -> tuple[Array, Array]:
        key, start = inputs
        gains = jax.vmap(history, in_axes=(0, None))(jax.random.split(key, num_samples), start)
        return jnp.mean(gains), jnp.std(gains, ddof=1) / num_samples**0.5

    return lax.map(at_start, (jax.random.split(key, starts.size), starts))


def _check_policies(mdp: TabularMDP, log_policies: Array, starts: ArrayLike, name: str) -> tuple[Array, Array]:
    """As arrays, the policies made uniform in terminal states."""
    log_policies, starts = jnp.asarray(log_policies), jnp.asarray(starts)
    if log_policies.ndim != 3 or log_policies.shape[1:] != (mdp.num_states, mdp.num_actions):
        raise ValueError(
            f"{name}: log_policies must be [N, S, A] with S={mdp.num_states}, A={mdp.num_actions}, "
            f"got {log_policies.shape}"
        )
    if starts.ndim != 1 or not jnp.issubdtype(starts.dtype, jnp.integer):
        raise ValueError(f"{name}: starts must be integers [Q], got {starts.dtype} {starts.shape}")
    _check_index(f"{name}: starts", starts, mdp.num_states)
    uniform = -np.log(mdp.num_actions)
    return jnp.where(mdp.terminal[None, :, None], uniform, log_policies), starts


def _check_index(name: str, index: Array, size: int) -> None:
    if isinstance(index, jax.core.Tracer):
        return
    if ((index < 0) | (index >= size)).any():
        raise ValueError(f"{name} must be in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")
