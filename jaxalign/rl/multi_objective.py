"""Several objectives at once: scalarisations, Pareto fronts, coverage sets, and constraints at a price.

Returns are better when larger, in every objective.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.mdp import TabularMDP, action_reward, occupancy_measure, value_iteration
from jaxalign.rl.incentives import Incentive
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics

MAX_DOUBLINGS = 40  # of the multiplier, in the search for one that is high enough


def linear_scalarization(rewards: ArrayLike, weights: ArrayLike) -> Array:
    """sum_m weights[m] rewards[..., m]; [..., M] and [M] -> [...]. Of rewards or returns alike."""
    return jnp.asarray(rewards) @ jnp.asarray(weights)


def chebyshev_scalarization(returns: ArrayLike, weights: ArrayLike, reference: ArrayLike) -> Array:
    """-max_m weights[m] |reference[m] - returns[..., m]|; [..., M], [M] and [M] -> [...], 0 at the reference.

    With positive weights and a reference above all returns, every point of a Pareto front is best for some weights,
    also where the front is not convex (Steuer & Choo 1983). Of returns only: it does not distribute over steps.
    """
    returns = jnp.asarray(returns)
    shape = (1,) * (returns.ndim - 1) + (-1,)
    weights, reference = (jnp.asarray(x).reshape(shape) for x in (weights, reference))
    return -jnp.max(weights * jnp.abs(reference - returns), axis=-1)


def lexicographic_best(returns: ArrayLike, thresholds: ArrayLike) -> Array:
    """The index [] of the best of N returns [N, M], objective 0 mattering most.

    Each is compared as min(returns[:, m], thresholds[m]), so that objective m + 1 decides among all that have enough of
    objective m (Gabor, Kalmar & Szepesvari 1998). thresholds: [M]; the last may be infinite.
    """
    returns = jnp.asarray(returns)
    enough = jnp.minimum(returns, jnp.asarray(thresholds, returns.dtype)[None, :])
    return jnp.lexsort(enough.T[::-1])[-1]


def pareto_front(returns: ArrayLike) -> Array:
    """Which of N returns [N, M] no other beats: bool [N]. Equal returns do not beat each other."""
    returns = jnp.asarray(returns)
    other, one = returns[:, None, :], returns[None, :, :]
    beaten = jnp.all(other >= one, axis=-1) & jnp.any(other > one, axis=-1)
    return ~jnp.any(beaten, axis=0)


def hypervolume(returns: ArrayLike, reference: ArrayLike) -> Array:
    """The volume of what is below some of N returns [N, M] and above `reference` [M]; exact, a scalar.

    Sliced along the last objective: sum_i (z_i - z_{i+1}) * (volume in the others of the i best by z), down to one
    objective. Time and memory grow as N^(M-1): for a few objectives.
    Raises ValueError if `reference` is not [M].
    """
    returns, reference = jnp.asarray(returns), jnp.asarray(reference)
    if returns.ndim != 2 or reference.shape != returns.shape[1:]:
        raise ValueError(f"hypervolume: needs returns [N, M] and reference [M], got {returns.shape}, {reference.shape}")
    return _volume(jnp.maximum(returns - reference[None, :], 0.0))


def _volume(points: Array) -> Array:
    """The volume between 0 and points [N, M] >= 0."""
    if points.shape[1] == 1:
        return jnp.max(points)
    points = points[jnp.argsort(-points[:, -1])]
    heights = points[:, -1] - jnp.append(points[1:, -1], 0.0)
    first = jnp.tril(jnp.ones((len(points),) * 2, bool))
    slices = jax.vmap(lambda kept: _volume(jnp.where(kept[:, None], points[:, :-1], 0.0)))(first)
    return heights @ slices


class CoverageSet(NamedTuple):
    """What is best for each of W weights. policies: [W, S, A], one-hot; returns: [W, M]."""

    policies: Array
    returns: Array


def convex_coverage_set(mdp: TabularMDP, rewards: ArrayLike, weights: ArrayLike) -> CoverageSet:
    """The best deterministic policy for every linear scalarisation, planned together.

    Its returns are corners of the convex hull of what can be had; a concave part of the front is never found this way.

    Args:
        rewards: [M, S], [M, S, A] or [M, S, A, S].
        weights: [W, M].
    """
    each = jax.vmap(lambda reward: action_reward(mdp, reward))(jnp.asarray(rewards))  # [M, S, A]

    def best(weight: Array) -> tuple[Array, Array]:
        policy = value_iteration(mdp, jnp.tensordot(weight, each, 1)).policy
        return policy, jnp.tensordot(each, occupancy_measure(mdp, jnp.log(policy)), 2)

    return CoverageSet(*jax.vmap(best)(jnp.asarray(weights, each.dtype)))


class ConstrainedPlan(NamedTuple):
    """The best policy within a budget.

    value, cost: its expected return and cost, scalars; NaN if no policy keeps within the budget
    multiplier: the price of the cost at which it is best; 0 if the budget does not bind
    occupancy: [S, A], its discounted visits
    policy: [S, A], stochastic in general; uniform where it never comes
    """

    value: Array
    cost: Array
    multiplier: Array
    occupancy: Array
    policy: Array


def constrained_value_iteration(
    mdp: TabularMDP, reward: ArrayLike, cost: ArrayLike, *, budget: ArrayLike, bisections: int = 40
) -> ConstrainedPlan:
    """max_policy E return of `reward` subject to E return of `cost` <= budget (both discounted), by its Lagrangian.

    The multiplier is where the plan for reward - multiplier * cost goes from beyond the budget to within it, found by
    bisection; the plans of both sides are best there, and the mixture of their occupancies that spends exactly the
    budget is an optimum (Altman 1999). For several constraints, or through gradients, see
    `jaxalign.irl.constrained`, and `align_values` with `costs`.

    reward, cost: [S], [S, A] or [S, A, S].
    """
    reward, cost = action_reward(mdp, reward), action_reward(mdp, cost)

    def visits(objective: Array) -> Array:
        return occupancy_measure(mdp, jnp.log(value_iteration(mdp, objective).policy))

    def spent(occupancy: Array) -> Array:
        return jnp.sum(occupancy * cost)

    def too_low(carry: tuple[Array, Array]) -> Array:
        multiplier, count = carry
        return (spent(visits(reward - multiplier * cost)) > budget) & (count < MAX_DOUBLINGS)

    def narrow(ends: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = ends
        middle = 0.5 * (low + high)
        over = spent(visits(reward - middle * cost)) > budget
        return (jnp.where(over, middle, low), jnp.where(over, high, middle)), None

    one, zero = jnp.ones((), reward.dtype), jnp.zeros((), reward.dtype)
    high, _ = jax.lax.while_loop(too_low, lambda carry: (2.0 * carry[0], carry[1] + 1), (one, jnp.int32(0)))
    (low, high), _ = jax.lax.scan(narrow, (zero, high), None, length=bisections)
    beyond, within = visits(reward - low * cost), visits(reward - high * cost)
    free = spent(visits(reward)) <= budget
    excess, slack = spent(beyond) - budget, budget - spent(within)
    share = jnp.where(free, 0.0, jnp.clip(excess / jnp.where(free, 1.0, excess + slack), 0.0, 1.0))
    multiplier = jnp.where(free, 0.0, high)
    occupancy = jnp.where(free, visits(reward), share * within + (1.0 - share) * beyond)
    feasible = spent(visits(-cost)) <= budget + 1e-5 * jnp.abs(budget)
    value, paid = (jnp.where(feasible, jnp.sum(occupancy * x), jnp.nan) for x in (reward, cost))
    total = jnp.sum(occupancy, axis=-1, keepdims=True)
    policy = jnp.where(total > 0.0, occupancy / jnp.where(total > 0.0, total, 1.0), 1.0 / mdp.num_actions)
    return ConstrainedPlan(value, paid, multiplier, occupancy, policy)


def lagrangian_incentive(
    budget: ArrayLike, *, learning_rate: ArrayLike, initial: ArrayLike = 0.0, cost: str = "cost"
) -> Incentive:
    """rewards - multiplier * steps.info[cost], the multiplier raised while the agent spends more than the budget.

    multiplier <- max(0, multiplier + learning_rate * (mean of the costs [T, N] - budget))

    The mean is over all steps of the rollout, whatever episodes they belong to, so that `budget` is per step: for B per
    episode of about L steps give B / L. Steps are paid at the multiplier that held when they were taken.

    The state is {"multiplier": []}; metrics: "multiplier" (the one paid at) and "mean_cost".
    Raises KeyError naming the cost if the environment's `info` has none.
    """

    def init(key: Key) -> dict[str, Array]:
        return {"multiplier": jnp.asarray(initial, jnp.zeros(()).dtype)}

    def apply(state: dict[str, Array], steps: Steps, key: Key) -> tuple[dict[str, Array], Array, Metrics]:
        if cost not in steps.info:
            known = sorted(steps.info)
            raise KeyError(f"lagrangian_incentive: no {cost!r} in the environment's info, which has {known}")
        multiplier, costs = state["multiplier"], steps.info[cost]
        mean_cost = jnp.mean(costs)
        raised = jnp.maximum(0.0, multiplier + learning_rate * (mean_cost - budget)).astype(multiplier.dtype)
        return {"multiplier": raised}, steps.rewards - multiplier * costs, {
            "multiplier": multiplier,
            "mean_cost": mean_cost,
        }

    return Incentive(init, apply)
