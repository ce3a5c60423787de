"""Maximum causal entropy IRL: losses of demonstrations and of occupancies, an Algorithm, and L-BFGS on the dual.

Ziebart (2010), "Modeling purposeful adaptive behavior with the principle of maximum causal entropy".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm
from jaxalign.irl.rewards import evaluate_reward
from jaxalign.irl.trajectories import Trajectories, timed_visit_counts, visit_counts
from jaxalign.mdp import TabularMDP, action_reward, soft_value_iteration
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


def population_causal_entropy_nll(
    reward: Array,
    mdp: TabularMDP,
    occupancy: Array,
    *,
    temperature: ArrayLike = 1.0,
    horizon: int | None = None,
) -> Array:
    """-sum_{s, a} occupancy[s, a] log policy(a | s), a scalar in nats, with the policy of `soft_value_iteration`.

    Args:
        reward: [S], [S, A] or [S, A, S].
        occupancy: [S, A], how often each pair is visited, discounted or not (`occupancy_measure`, `visit_counts`);
            with `horizon` H, [H, S, A] (`timed_visit_counts`), against the policy of each step.

    If `occupancy` is a policy's discounted occupancy, the gradient for a reward features @ weights is
    (features expected under the reward's policy - features expected under the occupancy) / temperature.
    Raises ValueError if `occupancy` is of another shape.
    """
    expected = (mdp.num_states, mdp.num_actions) if horizon is None else (horizon, mdp.num_states, mdp.num_actions)
    if occupancy.shape != expected:
        raise ValueError(f"occupancy must be {expected}, got {occupancy.shape}")
    plan = soft_value_iteration(mdp, reward, temperature=temperature, horizon=horizon)
    return -jnp.sum(occupancy * plan.log_policy)


def causal_entropy_nll(
    reward: Array,
    mdp: TabularMDP,
    trajectories: Trajectories,
    *,
    temperature: ArrayLike = 1.0,
    horizon: int | None = None,
) -> Array:
    """-(1 / N) sum_n sum_t mask_nt log policy(a_nt | s_nt), a scalar in nats per trajectory; actions in terminal
    states do not count.

    Args:
        reward: [S], [S, A] or [S, A, S].
        trajectories: [N, T]; with `horizon` H >= T step t is scored by the policy with H - t steps left.

    Raises ValueError as `check_trajectories`, or if T is more than the horizon.
    """
    counts = _counts(mdp, trajectories, horizon)
    return population_causal_entropy_nll(reward, mdp, counts, temperature=temperature, horizon=horizon)


def causal_entropy_dual(
    reward: Array,
    mdp: TabularMDP,
    occupancy: Array,
    *,
    temperature: ArrayLike = 1.0,
    horizon: int | None = None,
) -> Array:
    """E_{s ~ initial} value[s] - sum_{s, a} occupancy[s, a] r(s, a), a scalar: the dual of matching the occupancy.

    value is that of `soft_value_iteration`. Convex in `reward` ([S], [S, A] or [S, A, S]); its gradient is the
    reward's occupancy minus the one given ([S, A], discounted, un-normalised), so at the minimum they match.
    Equals temperature * `population_causal_entropy_nll` where the occupancy is some policy's.
    """
    value = soft_value_iteration(mdp, reward, temperature=temperature, horizon=horizon).value
    start = mdp.initial @ (value if horizon is None else value[0])
    return start - jnp.sum(occupancy * action_reward(mdp, reward))


def max_causal_entropy_irl(
    mdp: TabularMDP,
    reward_network: Network,
    optimizer: optax.GradientTransformation,
    trajectories: Trajectories | Array | None,
    *,
    features: Array | None = None,
    horizon: int | None = None,
    temperature: ArrayLike = 1.0,
) -> Algorithm:
    """Fit a reward to demonstrations by gradient steps on `causal_entropy_nll`.

    A step's batch is None, for all of `trajectories`, or an occupancy of its own (`visit_counts` of a minibatch, or
    of the lane's own demonstrations under `replicate`).

    Args:
        reward_network: `apply(params, features)` gives the reward [S] (or [S, 1], or [S, A]).
        trajectories: demonstrations [N, T]; or an occupancy [S, A] ([H, S, A] with a horizon), for the population
            loss; or None, if every batch is an occupancy.
        features: [S, F] (or [S, A, F], if the network takes it); None: one-hot states [S, S].
        horizon: steps of an episode, after which the policy depends on the time left; None is the discounted
            infinite horizon.

    Metrics: "loss" in nats per demonstrated action (the gradient is that of this mean).
    Raises ValueError as `check_trajectories`, or if an array is of another shape.
    """
    counts = _counts(mdp, trajectories, horizon) if isinstance(trajectories, Trajectories) else trajectories
    features = jnp.eye(mdp.num_states) if features is None else jnp.asarray(features)
    if features.shape[0] != mdp.num_states:
        raise ValueError(f"max_causal_entropy_irl: features must be [{mdp.num_states}, F], got {features.shape}")

    def objective(params: Params, batch: Array | None, key: Key) -> tuple[Array, Metrics]:
        visits = counts if batch is None else batch
        if visits is None:
            raise ValueError("max_causal_entropy_irl: give `trajectories`, or an occupancy as each batch")
        reward = evaluate_reward(reward_network, params, features)
        nll = population_causal_entropy_nll(reward, mdp, visits, temperature=temperature, horizon=horizon)
        return nll / jnp.sum(visits), {}

    return gradient_algorithm(reward_network, objective, optimizer)


class DualSolution(NamedTuple):
    """weights: [F]; dual: the objective reached; gradient_norm: largest unmatched feature; iterations: int32."""

    weights: Array
    dual: Array
    gradient_norm: Array
    iterations: Array


def solve_causal_entropy_dual(
    mdp: TabularMDP,
    features: Array,
    occupancy: Array,
    *,
    temperature: ArrayLike = 1.0,
    horizon: int | None = None,
    l2: ArrayLike = 0.0,
    tolerance: ArrayLike = 1e-4,
    max_iterations: int = 200,
) -> DualSolution:
    """The linear reward features @ weights whose policy visits the features as often as `occupancy`, by L-BFGS.

    Minimises causal_entropy_dual(features @ weights, mdp, occupancy) + l2 / 2 |weights|^2 from weights 0, until the
    largest entry of the gradient is at most `tolerance` or `max_iterations`. One compiled loop; vmap it over
    occupancies, temperatures or penalties.

    Args:
        features: [S, F] or [S, A, F].
        occupancy: [S, A], discounted and un-normalised: `occupancy_measure` or `visit_counts` with the MDP's discount.
            Where no policy has such visits (few demonstrations), l2 > 0 keeps the weights finite.
    """
    optimizer = optax.lbfgs()

    def objective(weights: Array) -> Array:
        reward = features @ weights
        dual = causal_entropy_dual(reward, mdp, occupancy, temperature=temperature, horizon=horizon)
        return dual + 0.5 * l2 * jnp.sum(weights**2)

    value_and_grad = optax.value_and_grad_from_state(objective)

    def unfinished(carry: tuple[Array, optax.OptState, Array, Array, Array]) -> Array:
        *_, gradient_norm, count = carry
        return (gradient_norm > tolerance) & (count < max_iterations)

    def advance(carry: tuple[Array, optax.OptState, Array, Array, Array]) -> tuple:
        weights, state, _, _, count = carry
        value, gradient = value_and_grad(weights, state=state)
        updates, state = optimizer.update(
            gradient, state, weights, value=value, grad=gradient, value_fn=objective
        )
        weights = optax.apply_updates(weights, updates)
        value, gradient = value_and_grad(weights, state=state)
        return weights, state, value, jnp.max(jnp.abs(gradient)), count + 1

    weights = jnp.zeros(features.shape[-1], features.dtype)
    infinite = jnp.full((), jnp.inf, features.dtype)
    start = (weights, optimizer.init(weights), infinite, infinite, jnp.int32(0))
    weights, _, value, gradient_norm, count = jax.lax.while_loop(unfinished, advance, start)
    return DualSolution(weights, value, gradient_norm, count)


def _counts(mdp: TabularMDP, trajectories: Trajectories, horizon: int | None) -> Array:
    if horizon is None:
        return visit_counts(mdp, trajectories)
    return timed_visit_counts(mdp, trajectories, horizon=horizon)
