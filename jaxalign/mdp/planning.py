"""Hard and soft value iteration, policy evaluation and occupancy measures.

Throughout, r(s, a) is `action_reward(mdp, reward)` and terminal states have value 0. What iterates is jitted here, so
that a call outside jit is traced once per shape and not at every call; within an outer jit that changes nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign.mdp.discounted_sum import discounted_sum
from jaxalign.mdp.fixed_point import FixedPoint, fixed_point, l1_norm, sup_norm
from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.mdp.transitions import (
    GridTransition,
    dense_transition,
    expected_next,
    expected_next_of_actions,
    push_forward,
)
from jaxalign.types import Array, ArrayLike

MAX_UNROLLED_ACTIONS = 16  # more would make long programs
MAX_SOLVE_STATES = 1024  # up to here one dense solve is quicker than iterating at the usual discounts


class Plan(NamedTuple):
    """An optimal plan; with a horizon H every array but the last two has a leading time axis.

    value: [S], or [H+1, S] with value[H] = 0
    q: [S, A], or [H, S, A]
    policy: [S, A], or [H, S, A]; one-hot, the first of equally good actions
    residual: max |new - old value| at the last iteration (0 with a horizon: exact)
    iterations: int32, how many Bellman backups were made
    """

    value: Array
    q: Array
    policy: Array
    residual: Array
    iterations: Array


class SoftPlan(NamedTuple):
    """An entropy-regularised plan; with a horizon H every array but the last two has a leading time axis.

    value: [S], or [H+1, S] with value[H] = 0
    q: [S, A], or [H, S, A]
    log_policy: [S, A], or [H, S, A]; uniform in terminal states
    residual: max |new - old value| at the last iteration (0 with a horizon: exact)
    iterations: int32, how many Bellman backups were made
    """

    value: Array
    q: Array
    log_policy: Array
    residual: Array
    iterations: Array


def bellman_q(mdp: TabularMDP, reward: Array, value: Array) -> Array:
    """q[s, a] = r[s, a] + discount E_{s'} value[s'], and 0 in terminal states; reward [S, A], value [S] -> [S, A]."""
    if isinstance(mdp.transition, GridTransition):
        # Action by action: taken apart again by a maximum over actions, the stack costs nothing, and a sweep is one
        # pass over the grid, on a CPU 3 times as fast as with arrays [S, A].
        after = expected_next_of_actions(mdp.transition, value)
        columns = [r + mdp.discount * x for r, x in zip(jnp.unstack(reward, axis=-1), after, strict=True)]
        return jnp.stack([jnp.where(mdp.terminal, 0.0, q) for q in columns], axis=-1)
    q = reward + mdp.discount * expected_next(mdp.transition, value)
    return jnp.where(mdp.terminal[:, None], 0.0, q)


def value_iteration(
    mdp: TabularMDP,
    reward: ArrayLike,
    *,
    horizon: int | None = None,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Plan:
    """Optimal values: value[s] = max_a q[s, a], q[s, a] = r(s, a) + discount E_{s'} value[s'].

    Args:
        reward: [S], [S, A] or [S, A, S].
        horizon: steps H left at time 0; None is the infinite horizon, solved until max |change of value| <= tolerance
            (then the error is at most residual * discount / (1 - discount)) or `max_iterations`.

    Returns Plan. Its gradient with respect to reward, transition and discount is that of the optimal policy's value
    (implicit at the fixed point; the policy itself has none).
    Raises ValueError if the horizon is infinite, discount 1 and no state terminal; or on a reward of another shape.
    """
    check_time(mdp, horizon, "value_iteration")
    return _hard_plan(mdp, jnp.asarray(reward), tolerance, horizon, max_iterations)


def soft_value_iteration(
    mdp: TabularMDP,
    reward: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    horizon: int | None = None,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> SoftPlan:
    """Maximum causal entropy values: value[s] = t log sum_a exp(q[s, a] / t), t the temperature,
    q[s, a] = r(s, a) + discount E_{s'} value[s'], log_policy[s, a] = (q[s, a] - value[s]) / t.

    Maximises E sum_k discount^k (r(s_k, a_k) + t H(policy(. | s_k))), entropy in nats. The expectation over s' is
    outside the logarithm: causal entropy, right under stochastic dynamics (Ziebart 2010, eq. 4.9-4.10).

    Args:
        reward: [S], [S, A] or [S, A, S].
        temperature: t > 0.
        horizon: steps H left at time 0; None is the infinite horizon, solved until max |change of value| <= tolerance
            (then the error is at most residual * discount / (1 - discount)) or `max_iterations`.

    Returns SoftPlan. With an infinite horizon its gradient is implicit, one linear solve of (I - discount P_policy), so
    memory does not grow with the iterations.
    Raises ValueError if the horizon is infinite, discount 1 and no state terminal; if the temperature is not positive;
    or on a reward of another shape.
    """
    if not isinstance(temperature, jax.core.Tracer) and not bool(np.all(np.asarray(temperature) > 0.0)):
        raise ValueError(f"soft_value_iteration: temperature must be positive, got {temperature}")
    check_time(mdp, horizon, "soft_value_iteration")
    return _soft_plan(mdp, jnp.asarray(reward), temperature, tolerance, horizon, max_iterations)


def policy_evaluation(
    mdp: TabularMDP,
    log_policy: Array,
    reward: ArrayLike,
    *,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Array:
    """The value of a policy: value = r_pi + discount P_pi value with r_pi[s] = sum_a exp(log_policy[s, a]) r(s, a).

    log_policy: [S, A] gives [S], by `discounted_sum` up to 1,024 states and by iteration (see `value_iteration` for
    tolerance) above; [H, S, A] is a policy that changes with time and gives [H+1, S].
    Raises ValueError if discount is 1 and no state terminal (unless time is finite); or on arrays of another shape.
    """
    log_policy = _check_policy(mdp, log_policy, "policy_evaluation")
    check_time(mdp, None if log_policy.ndim == 2 else len(log_policy), "policy_evaluation")
    return _evaluate(mdp, log_policy, jnp.asarray(reward), tolerance, max_iterations)


def occupancy_measure(
    mdp: TabularMDP,
    log_policy: Array,
    *,
    horizon: int | None = None,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Array:
    """Expected discounted visits: d[s, a] = sum_k discount^k Pr(s_k = s, a_k = a), not normalised, [S, A].

    d = mu * policy with mu = (I - discount P_pi^T)^-1 initial; steps 0..H-1 only if `horizon` is H, or if `log_policy`
    [S, A] is given per step [H, S, A]. No action is taken in a terminal state, so d is 0 there, and
    sum_{s, a} d[s, a] r(s, a) is the expected return. Without terminal states it sums to 1 / (1 - discount).
    Raises ValueError if time is infinite, discount 1 and no state terminal; or `horizon` is not that of `log_policy`.
    """
    log_policy = _check_policy(mdp, log_policy, "occupancy_measure")
    if log_policy.ndim == 3:
        if horizon not in (None, len(log_policy)):
            raise ValueError(f"occupancy_measure: horizon is {horizon}, log_policy has {len(log_policy)} steps")
        horizon = len(log_policy)
    check_time(mdp, horizon, "occupancy_measure")
    return _occupancy(mdp, log_policy, tolerance, horizon, max_iterations)


def expected_return(mdp: TabularMDP, log_policy: Array, reward: ArrayLike) -> Array:
    """E_{s ~ initial} of the policy's value, a scalar; log_policy [S, A] or [H, S, A], reward as everywhere."""
    value = policy_evaluation(mdp, log_policy, reward)
    return mdp.initial @ (value if value.ndim == 1 else value[0])


@functools.partial(jax.jit, static_argnums=(3, 4))
def _hard_plan(
    mdp: TabularMDP, reward: Array, tolerance: ArrayLike, horizon: int | None, max_iterations: int
) -> Plan:
    value, q, residual, iterations = _plan(mdp, reward, max_over_actions, tolerance, horizon, max_iterations)
    policy = jax.nn.one_hot(jnp.argmax(q, axis=-1), mdp.num_actions, dtype=q.dtype)
    return Plan(value, q, policy, residual, iterations)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _soft_plan(
    mdp: TabularMDP,
    reward: Array,
    temperature: ArrayLike,
    tolerance: ArrayLike,
    horizon: int | None,
    max_iterations: int,
) -> SoftPlan:
    soft_max = lambda q: temperature * _log_sum_exp(q / temperature)  # noqa: E731
    value, q, residual, iterations = _plan(mdp, reward, soft_max, tolerance, horizon, max_iterations)
    return SoftPlan(value, q, jax.nn.log_softmax(q / temperature, axis=-1), residual, iterations)


@functools.partial(jax.jit, static_argnums=4)
def _evaluate(
    mdp: TabularMDP, log_policy: Array, reward: Array, tolerance: ArrayLike, max_iterations: int
) -> Array:
    reward, policy = action_reward(mdp, reward), jnp.exp(log_policy)
    start = jnp.zeros(mdp.num_states, reward.dtype)

    def backup(policy: Array, value: Array) -> Array:
        return jnp.sum(policy * bellman_q(mdp, reward, value), axis=-1)

    if policy.ndim == 3:
        _, values = lax.scan(lambda v, p: (backup(p, v),) * 2, start, policy, reverse=True)
        return jnp.concatenate([values, start[None]])
    if _by_solve(mdp):
        return discounted_sum(_discounted_steps(mdp, policy), jnp.sum(policy * reward, axis=-1))
    return fixed_point(
        lambda v: backup(policy, v), start, tolerance=tolerance, max_iterations=max_iterations
    ).point


@functools.partial(jax.jit, static_argnums=(3, 4))
def _occupancy(
    mdp: TabularMDP, log_policy: Array, tolerance: ArrayLike, horizon: int | None, max_iterations: int
) -> Array:
    policy = jnp.where(mdp.terminal[:, None], 0.0, jnp.exp(log_policy))
    if horizon is not None:
        return _occupancy_of_steps(mdp, policy, horizon)
    initial = mdp.initial.astype(policy.dtype)
    if _by_solve(mdp):
        return discounted_sum(_discounted_steps(mdp, policy).T, initial)[:, None] * policy
    visits = fixed_point(
        lambda mu: initial + mdp.discount * push_forward(mdp.transition, mu[:, None] * policy),
        initial,
        tolerance=tolerance,
        max_iterations=max_iterations,
        norms=(l1_norm, sup_norm),  # a mass spread over 10^6 states is small in each
    ).point
    return visits[:, None] * policy


def _plan(
    mdp: TabularMDP,
    reward: ArrayLike,
    maximum: Callable[[Array], Array],
    tolerance: ArrayLike,
    horizon: int | None,
    max_iterations: int,
) -> tuple[Array, Array, Array, Array]:
    """(value, q, residual, iterations) of value = maximum(q), q = r + discount P value."""
    reward = action_reward(mdp, reward)
    start = jnp.zeros(mdp.num_states, jnp.result_type(reward, mdp.discount))

    def backup(value: Array) -> tuple[Array, Array]:
        q = bellman_q(mdp, reward, value)
        # A soft maximum of the zeros of a terminal state would be t log A.
        return jnp.where(mdp.terminal, 0.0, maximum(q)), q

    if horizon is None:
        found: FixedPoint = fixed_point(
            lambda v: backup(v)[0], start, tolerance=tolerance, max_iterations=max_iterations
        )
        return found.point, bellman_q(mdp, reward, found.point), found.residual, found.iterations

    def earlier(value: Array, _: None) -> tuple[Array, Any]:
        new, q = backup(value)
        return new, (new, q)

    _, (values, q) = lax.scan(earlier, start, None, length=horizon, reverse=True)
    value = jnp.concatenate([values, start[None]])
    return value, q, jnp.zeros((), start.dtype), jnp.int32(horizon)


@jax.custom_jvp
def max_over_actions(q: Array) -> Array:
    """max_a q[s, a], [S, A] -> [S]; over a few actions column by column, which XLA fuses and vectorises on a CPU.

    Its derivative is that of the first of the best actions, the one `Plan.policy` takes.
    """
    if q.shape[-1] > MAX_UNROLLED_ACTIONS:
        return jnp.max(q, axis=-1)
    return functools.reduce(jnp.maximum, jnp.unstack(q, axis=-1))


@max_over_actions.defjvp
def _max_over_actions_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (q,), (change,) = primals, tangents
    # JAX's own rule asks which entries equal the maximum. XLA may compute q anew in each fusion, with a multiply-add in
    # one and not in another; then of two tied actions both count in full, or none, and the implicit solve diverges.
    best = jnp.argmax(q, axis=-1)
    if q.shape[-1] > MAX_UNROLLED_ACTIONS:
        return max_over_actions(q), jnp.take_along_axis(change, best[:, None], axis=-1)[:, 0]
    columns = enumerate(jnp.unstack(change, axis=-1))
    return max_over_actions(q), functools.reduce(jnp.add, [jnp.where(best == a, column, 0.0) for a, column in columns])


def _log_sum_exp(q: Array) -> Array:
    """log sum_a exp(q[s, a]), [S, A] -> [S]; see `max_over_actions`."""
    if q.shape[-1] > MAX_UNROLLED_ACTIONS:
        return jax.nn.logsumexp(q, axis=-1)
    top = lax.stop_gradient(max_over_actions(q))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return top + jnp.log(sum(jnp.exp(column - top) for column in jnp.unstack(q, axis=-1)))


def _occupancy_of_steps(mdp: TabularMDP, policy: Array, horizon: int) -> Array:
    def step(carry: tuple[Array, Array], policy_now: Array | None) -> tuple[tuple[Array, Array], None]:
        mass, total = carry
        taken = mass[:, None] * (policy if policy_now is None else policy_now)
        return (mdp.discount * push_forward(mdp.transition, taken), total + taken), None

    mass = mdp.initial.astype(jnp.result_type(mdp.initial, policy, mdp.discount))
    zero = jnp.zeros((mdp.num_states, mdp.num_actions), mass.dtype)
    timed = policy if policy.ndim == 3 else None
    (_, total), _ = lax.scan(step, (mass, zero), timed, length=horizon)
    return total


def _discounted_steps(mdp: TabularMDP, policy: Array) -> Array:
    """discount P_pi with nothing leaving terminal states, [S, S]."""
    between = jnp.einsum("sa,saz->sz", policy, dense_transition(mdp.transition))
    return jnp.where(mdp.terminal[:, None], 0.0, mdp.discount * between)


def _by_solve(mdp: TabularMDP) -> bool:
    return not isinstance(mdp.transition, GridTransition) and mdp.num_states <= MAX_SOLVE_STATES


def check_time(mdp: TabularMDP, horizon: int | None, name: str) -> None:
    """Raise ValueError on a horizon below 1 and, outside jit, on a sum of rewards [S, A] that need not converge."""
    if horizon is not None:
        if horizon < 1:
            raise ValueError(f"{name}: horizon must be at least 1, got {horizon}")
        return
    if any(isinstance(x, jax.core.Tracer) for x in (mdp.discount, mdp.terminal)):
        return
    if mdp.discount.ndim == 0 and float(mdp.discount) == 1.0 and not np.asarray(mdp.terminal).any():
        raise ValueError(f"{name}: discount 1 over an infinite horizon needs a terminal state; give `horizon`")


def _check_policy(mdp: TabularMDP, log_policy: Array, name: str) -> Array:
    log_policy = jnp.asarray(log_policy)
    if log_policy.ndim not in (2, 3) or log_policy.shape[-2:] != (mdp.num_states, mdp.num_actions):
        raise ValueError(
            f"{name}: log_policy must be [S, A] or [H, S, A] with S={mdp.num_states}, A={mdp.num_actions}, "
            f"got {log_policy.shape}"
        )
    return log_policy.astype(jnp.promote_types(log_policy.dtype, mdp.initial.dtype))
