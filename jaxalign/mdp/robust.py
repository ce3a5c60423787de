"""Robust MDPs: plan against the worst transition probabilities near the nominal ones.

The adversary chooses for every state and action apart ((s, a)-rectangular), knowing the value:
q[s, a] = min over p in the set around P(. | s, a) of sum_z p[z] (r(s, a, z) + discount value[z]).
Iyengar (2005), "Robust dynamic programming"; Nilim & El Ghaoui (2005), "Robust control of Markov decision processes".
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxalign.mdp.fixed_point import fixed_point
from jaxalign.mdp.planning import Plan, check_time, max_over_actions
from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.mdp.transitions import GridTransition, SparseTransition, sparse_transition
from jaxalign.mdp.worst_case import LARGEST, Uncertainty, check_number
from jaxalign.types import Array, ArrayLike


def robust_value_iteration(
    mdp: TabularMDP,
    reward: ArrayLike,
    uncertainty: Uncertainty,
    *,
    horizon: int | None = None,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Plan:
    """The best policy against the worst transitions: value[s] = max_a q[s, a],
    q[s, a] = min over p of sum_z p[z] (r(s, a, z) + discount value[z]), p in the set around P(. | s, a).

    Args:
        reward: [S], [S, A] or [S, A, S]; with [S, A, S] the adversary minds the reward of the transition too.
        uncertainty: L1Ball, KLBall, Contamination or CVaR. Its number may be traced and batched by vmap.
        horizon, tolerance, max_iterations: as in `value_iteration`.

    Returns Plan. Its gradient with respect to reward and the set's number is that of the optimal policy's value under
    the worst transitions, implicit at the fixed point. A sparse transition stays sparse and a grid becomes one; a
    successor listed twice counts as one.
    Raises ValueError as `value_iteration`, and if the set's number is out of its range (outside jit) or no [S, A];
    TypeError on another `uncertainty`.
    """
    check_time(mdp, horizon, "robust_value_iteration")
    uncertainty = _for_each_pair(uncertainty, _successors(mdp)[0].shape)
    return _robust_plan(mdp, jnp.asarray(reward), uncertainty, tolerance, horizon, max_iterations)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _robust_plan(
    mdp: TabularMDP,
    reward: Array,
    uncertainty: Uncertainty,
    tolerance: ArrayLike,
    horizon: int | None,
    max_iterations: int,
) -> Plan:
    robust_q, start = _robust_backup(mdp, reward, uncertainty)
    if horizon is None:
        found = fixed_point(
            lambda value: max_over_actions(robust_q(value)), start, tolerance=tolerance, max_iterations=max_iterations
        )
        value, q, residual, iterations = found.point, robust_q(found.point), found.residual, found.iterations
    else:

        def earlier(value: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            q = robust_q(value)
            new = max_over_actions(q)
            return new, (new, q)

        _, (values, q) = lax.scan(earlier, start, None, length=horizon, reverse=True)
        value = jnp.concatenate([values, start[None]])
        residual, iterations = jnp.zeros((), start.dtype), jnp.int32(horizon)
    return Plan(value, q, jax.nn.one_hot(jnp.argmax(q, axis=-1), mdp.num_actions, dtype=q.dtype), residual, iterations)


def robust_policy_evaluation(
    mdp: TabularMDP,
    log_policy: ArrayLike,
    reward: ArrayLike,
    uncertainty: Uncertainty,
    *,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Array:
    """What a policy earns under the worst transitions: value[s] = sum_a exp(log_policy[s, a]) q[s, a], [S].

    q is as in `robust_value_iteration`, and so are the arguments, gradients and errors; log_policy [S, A]. The
    adversary sees the action before it chooses, so a random policy hides nothing from it.
    """
    log_policy = jnp.asarray(log_policy)
    if log_policy.shape != (mdp.num_states, mdp.num_actions):
        raise ValueError(
            f"robust_policy_evaluation: log_policy must be [S, A] with S={mdp.num_states}, A={mdp.num_actions}, "
            f"got {log_policy.shape}"
        )
    check_time(mdp, None, "robust_policy_evaluation")
    uncertainty = _for_each_pair(uncertainty, _successors(mdp)[0].shape)
    return _robust_evaluate(mdp, log_policy, jnp.asarray(reward), uncertainty, tolerance, max_iterations)


@functools.partial(jax.jit, static_argnums=5)
def _robust_evaluate(
    mdp: TabularMDP,
    log_policy: Array,
    reward: Array,
    uncertainty: Uncertainty,
    tolerance: ArrayLike,
    max_iterations: int,
) -> Array:
    robust_q, start = _robust_backup(mdp, reward, uncertainty)
    policy = jnp.exp(log_policy)
    return fixed_point(
        lambda value: jnp.sum(policy * robust_q(value), axis=-1),
        start,
        tolerance=tolerance,
        max_iterations=max_iterations,
    ).point


def _robust_backup(
    mdp: TabularMDP, reward: ArrayLike, uncertainty: Uncertainty
) -> tuple[Callable[[Array], Array], Array]:
    """value [S] -> q [S, A], 0 in terminal states; and the value to start from."""
    expected = action_reward(mdp, reward)
    reward = jnp.asarray(reward, expected.dtype)
    probability, next_state = _successors(mdp)
    sparse = next_state is not None

    def robust_q(value: Array) -> Array:
        # One row [S] serves every pair of a dense transition, so that a set that sorts sorts once.
        after = mdp.discount * (value if next_state is None else value[next_state])
        if reward.ndim == 3:
            on_arrival = reward if next_state is None else jnp.take_along_axis(reward, next_state, axis=-1)
            after = on_arrival + (after if sparse else after[None, None, :])
        axes = (0, None if after.ndim == 1 else 0, 0)
        worst_cases = jax.vmap(jax.vmap(lambda pair, v, p: pair.worst_case(v, p), axes), axes)
        worst = worst_cases(uncertainty, after, probability)
        q = worst if reward.ndim == 3 else expected + worst
        return jnp.where(mdp.terminal[:, None], 0.0, q)

    return robust_q, jnp.zeros(mdp.num_states, jnp.result_type(expected, probability, mdp.discount))


def _successors(mdp: TabularMDP) -> tuple[Array, Array | None]:
    """(probability, next_state), [S, A, K] each, or ([S, A, S], None) of a dense transition."""
    if isinstance(mdp.transition, SparseTransition | GridTransition):
        next_state, probability = sparse_transition(mdp.transition)
        return probability, next_state
    return mdp.transition, None


def _for_each_pair(uncertainty: Any, shape: tuple[int, ...]) -> Any:
    """The same set with its number as [S, A] and its support as `shape`, [S, A, S] or [S, A, K]."""
    if type(uncertainty) not in LARGEST:
        raise TypeError(
            f"uncertainty must be an L1Ball, KLBall, Contamination or CVaR, got {type(uncertainty).__name__}"
        )
    field, number = uncertainty._fields[0], uncertainty[0]
    name = f"{type(uncertainty).__name__}: {field}"
    check_number(name, number, LARGEST[type(uncertainty)])
    if jnp.shape(number) not in ((), shape[:2]):
        raise ValueError(f"{name} must be a scalar or [S, A] = {list(shape[:2])}, got {jnp.shape(number)}")
    changes = {field: jnp.broadcast_to(jnp.asarray(number, float), shape[:2])}
    if getattr(uncertainty, "support", None) is not None:
        changes["support"] = jnp.broadcast_to(jnp.asarray(uncertainty.support, bool), shape)
    return uncertainty._replace(**changes)
