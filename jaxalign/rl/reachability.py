"""What can still be attained from a state, and how states differ in that: the deviation measures of side effects.

A deviation is a matrix [S, S]: deviation[x, y] says how bad it is to be in x where one is compared with being in y.
Scales: reachabilities are in [0, 1]. Attainable values are (1 - discount) V, in units of the auxiliary reward per step
(as in Krakovna et al., 2019), so that rewards in [0, 1] give values and deviations in [0, 1].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.mdp import TabularMDP, dense_transition, discounted_sum, expected_next, value_iteration
from jaxalign.mdp.fixed_point import fixed_point
from jaxalign.types import Array, ArrayLike


def reachability(
    mdp: TabularMDP, *, discount: ArrayLike = 1.0, tolerance: ArrayLike = 1e-6, max_iterations: int = 10_000
) -> Array:
    """R[x, y] = max_policy E[discount^N], N the steps until y is first reached from x; [S, S], in [0, 1].

    R[y, y] = 1 and R[x, y] = max_a discount E_{s'} R[s', y] otherwise, with no way out of a terminal state: the values
    of S problems with one target each, iterated together. With discount 1 it is the greatest probability of ever
    reaching y, so 0 or 1 in a deterministic world. The MDP's own discount plays no part.
    Krakovna et al. (2019, arXiv:1806.01186).
    """
    reached = jnp.eye(mdp.num_states, dtype=mdp.initial.dtype)

    def backup(found: Array) -> Array:
        after = jax.vmap(lambda of_target: jnp.max(expected_next(mdp.transition, of_target), axis=-1))(found)
        return jnp.maximum(reached, discount * jnp.where(mdp.terminal[None, :], 0.0, after))

    by_target = fixed_point(backup, reached, tolerance=tolerance, max_iterations=max_iterations).point
    return by_target.T


def attainable_utilities(
    mdp: TabularMDP, auxiliary_rewards: ArrayLike, *, discount: ArrayLike, tolerance: ArrayLike = 1e-6
) -> Array:
    """values[r, x] = (1 - discount) V_r(x), the optimal value of each auxiliary reward from each state; [R, S].

    Args:
        auxiliary_rewards: [R, S], paid for being in a state, or [R, S, A]; terminal states pay nothing and are worth 0.
        discount: of the auxiliary values, below 1; the MDP's own plays no part.

    Raises ValueError if the rewards are not [R, S] or [R, S, A].
    """
    rewards = jnp.asarray(auxiliary_rewards)
    if rewards.shape[1:] not in ((mdp.num_states,), (mdp.num_states, mdp.num_actions)):
        raise ValueError(
            f"attainable_utilities: auxiliary_rewards must be [R, S] or [R, S, A] with S={mdp.num_states}, "
            f"A={mdp.num_actions}, got {rewards.shape}"
        )
    lasting = mdp.replace(discount=jnp.asarray(discount, mdp.initial.dtype))
    plan = jax.vmap(lambda reward: value_iteration(lasting, reward, tolerance=tolerance).value)
    return plan((1.0 - discount) * rewards)


def inaction_rollout(mdp: TabularMDP, values: Array, *, noop: int, discount: ArrayLike) -> Array:
    """(1 - discount) sum_k discount^k E values[s_k], where s_0 is the state and all that follows is doing nothing.

    values: [S, F] gives [S, F]. It makes deviations see effects that come about later by themselves (Krakovna et al.,
    2019); discount 0 leaves `values`, discount near 1 looks at how things end. Terminal states stay.
    """
    stay = jnp.eye(mdp.num_states, dtype=mdp.initial.dtype)
    between = jnp.where(mdp.terminal[:, None], stay, dense_transition(mdp.transition)[:, noop])
    return (1.0 - discount) * discounted_sum(discount * between, values)


def unreachability(reach: Array) -> Array:
    """deviation[x, y] = 1 - reach[x, y]: how far the baseline is out of reach, [S, S] -> [S, S]."""
    return 1.0 - reach


def value_difference(
    values: Array, baseline_values: Array | None = None, *, summary: Callable[[Array], Array] = jnp.abs
) -> Array:
    """deviation[x, y] = mean_f summary(baseline_values[y, f] - values[x, f]), [S, S].

    Krakovna et al. (2019). Shared out over f, a loss counts as much as the share of what can be wanted that it
    concerns; `jnp.abs` counts gains as well, `jax.nn.relu` only losses.

    Args:
        values: [S, F], what can be attained from each state: reachabilities, or `attainable_utilities(...).T`.
        baseline_values: [S, F]; None: the same.
    """
    baseline_values = values if baseline_values is None else baseline_values
    # One baseline at a time: all at once would be [S, S, F].
    of_baseline = jax.lax.map(lambda base: jnp.mean(summary(base[None, :] - values), axis=-1), baseline_values)
    return of_baseline.T


def relative_reachability(reach: Array, baseline_reach: Array | None = None) -> Array:
    """deviation[x, y] = mean_z max(0, reach[y, z] - reach[x, z]): what x has lost of all that y can reach, [S, S].

    reach, baseline_reach: [S, S], as they are or after `inaction_rollout`. Krakovna et al. (2019).
    """
    return value_difference(reach, baseline_reach, summary=jax.nn.relu)


def scale_by_baseline(deviation: Array, baseline_values: Array) -> Array:
    """deviation[x, y] / mean_f |baseline_values[y, f]|, [S, S]: a share of what the baseline can attain.

    With the deviation of `value_difference` it is the scaled penalty of Turner et al. (2020, arXiv:1902.09725). Where
    nothing can be attained from the baseline the deviation stays as it is. baseline_values: [S, F].
    """
    scale = jnp.mean(jnp.abs(baseline_values), axis=-1)
    return deviation / jnp.where(scale > 0.0, scale, 1.0)[None, :]
