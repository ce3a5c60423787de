"""Planning against an adversary that takes the action over now and then (probabilistic action robust MDPs).

Tessler, Efroni & Mannor (2019), "Action robust reinforcement learning and applications in continuous control",
arXiv:1901.09184, section 4: with probability alpha the adversary's action is executed and not the agent's.
"""

import functools

import jax
import jax.numpy as jnp

from jaxalign.mdp.fixed_point import fixed_point
from jaxalign.mdp.planning import Plan, bellman_q, check_time
from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.rl.faults import checked_rate
from jaxalign.types import Array, ArrayLike


def probabilistic_robust_value_iteration(
    mdp: TabularMDP,
    reward: ArrayLike,
    *,
    alpha: ArrayLike,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Plan:
    """The best policy if an adversary acts with probability alpha: value[s] = (1 - alpha) max_a q[s, a] +
    alpha min_a q[s, a], q[s, a] = r(s, a) + discount E_{s'} value[s'].

    q[s, a] is what executing a is worth, whoever chose it; the policy takes its best action, `action_adversary(q)` its
    worst, and neither gains by moving second or at random (arXiv:1901.09184, section 4). The value is that of the MDP
    under `action_faults` at rate alpha with the adversary for replacement.

    Args:
        reward: [S], [S, A] or [S, A, S]; the executed action is paid.
        alpha: in [0, 1]; 0 is `value_iteration`, 1 leaves all to the adversary. It may be traced.
        tolerance, max_iterations: as in `value_iteration`, over an infinite horizon.

    Returns Plan. Raises ValueError as `value_iteration`, and on an alpha outside [0, 1] (outside jit).
    """
    check_time(mdp, None, "probabilistic_robust_value_iteration")
    alpha = checked_rate("probabilistic_robust_value_iteration", alpha)
    return _plan(mdp, jnp.asarray(reward), alpha, tolerance, max_iterations)


def probabilistic_robust_evaluation(
    mdp: TabularMDP,
    log_policy: ArrayLike,
    reward: ArrayLike,
    *,
    alpha: ArrayLike,
    tolerance: ArrayLike = 1e-6,
    max_iterations: int = 10_000,
) -> Array:
    """What a policy earns against its worst adversary: value[s] = (1 - alpha) sum_a exp(log_policy[s, a]) q[s, a] +
    alpha min_a q[s, a], [S].

    log_policy [S, A]; q, the other arguments and the errors as in `probabilistic_robust_value_iteration`.
    """
    log_policy = jnp.asarray(log_policy)
    if log_policy.shape != (mdp.num_states, mdp.num_actions):
        raise ValueError(
            f"probabilistic_robust_evaluation: log_policy must be [S, A] with S={mdp.num_states}, "
            f"A={mdp.num_actions}, got {log_policy.shape}"
        )
    check_time(mdp, None, "probabilistic_robust_evaluation")
    alpha = checked_rate("probabilistic_robust_evaluation", alpha)
    return _evaluate(mdp, log_policy, jnp.asarray(reward), alpha, tolerance, max_iterations)


def action_adversary(q: Array) -> Array:
    """The worst action of each state, one-hot; the first of equally bad ones: [S, A] -> [S, A]."""
    return jax.nn.one_hot(jnp.argmin(q, axis=-1), q.shape[-1], dtype=q.dtype)


@functools.partial(jax.jit, static_argnums=4)
def _plan(mdp: TabularMDP, reward: Array, alpha: Array, tolerance: ArrayLike, max_iterations: int) -> Plan:
    reward = action_reward(mdp, reward)

    def backup(value: Array) -> Array:
        q = bellman_q(mdp, reward, value)
        return (1.0 - alpha) * jnp.max(q, axis=-1) + alpha * jnp.min(q, axis=-1)

    found = fixed_point(backup, _start(mdp, reward, alpha), tolerance=tolerance, max_iterations=max_iterations)
    q = bellman_q(mdp, reward, found.point)
    policy = jax.nn.one_hot(jnp.argmax(q, axis=-1), mdp.num_actions, dtype=q.dtype)
    return Plan(found.point, q, policy, found.residual, found.iterations)


@functools.partial(jax.jit, static_argnums=5)
def _evaluate(
    mdp: TabularMDP, log_policy: Array, reward: Array, alpha: Array, tolerance: ArrayLike, max_iterations: int
) -> Array:
    reward = action_reward(mdp, reward)
    policy = jnp.exp(log_policy).astype(reward.dtype)

    def backup(value: Array) -> Array:
        q = bellman_q(mdp, reward, value)
        return (1.0 - alpha) * jnp.sum(policy * q, axis=-1) + alpha * jnp.min(q, axis=-1)

    start = _start(mdp, reward, alpha)
    return fixed_point(backup, start, tolerance=tolerance, max_iterations=max_iterations).point


def _start(mdp: TabularMDP, reward: Array, alpha: Array) -> Array:
    return jnp.zeros(mdp.num_states, jnp.result_type(reward, mdp.discount, alpha))
