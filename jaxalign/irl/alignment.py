"""The alignment objective: how far an AI's values are from a human's, and its minimisation under constraints."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, gradient_algorithm
from jaxalign.irl.evaluation import policy_divergence
from jaxalign.irl.reward_distance import starc_distance
from jaxalign.irl.rewards import evaluate_reward
from jaxalign.mdp import TabularMDP, expected_return, occupancy_measure, soft_value_iteration, value_iteration
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class ValueDivergence(NamedTuple):
    """Four measures, scalars, of how far an AI's reward is from a human's; the first three are 0 if they agree.

    reward_distance: in [0, 1], STARC unless another is chosen
    policy_divergence: KL of the human's policy from the AI's, mean over the states the human visits; nats per step
    occupancy_distance: in [0, 1], total variation of what the two policies do
    regret: in [0, 1], what following the AI's policy loses under the human's reward, as `regret` has it; part of it is
        the price of the temperature, which a policy soft-optimal for the human's own reward pays as well
    """

    reward_distance: Array
    policy_divergence: Array
    occupancy_distance: Array
    regret: Array


def occupancy_distance(mdp: TabularMDP, log_policy: Array, other_log_policy: Array) -> Array:
    """Total variation of two policies' normalised discounted visits: sum_{s, a} |d[s, a] - d'[s, a]| / 2, in [0, 1].

    log_policy, other_log_policy: [S, A], or [H, S, A]. Raises ValueError as `occupancy_measure`.
    """
    one, other = (occupancy_measure(mdp, policy) for policy in (log_policy, other_log_policy))
    return 0.5 * jnp.sum(jnp.abs(one / jnp.sum(one) - other / jnp.sum(other)))


def return_range(mdp: TabularMDP, reward: ArrayLike) -> tuple[Array, Array]:
    """(worst, best) expected return that any policy has under `reward` [S], [S, A] or [S, A, S]; scalars."""
    reward = jnp.asarray(reward)
    worst, best = (mdp.initial @ value_iteration(mdp, r).value for r in (-reward, reward))
    return -worst, best


def regret(mdp: TabularMDP, reward: ArrayLike, log_policy: Array) -> Array:
    """(best - E return of the policy) / (best - worst) under `reward`: 0 for the best policy, 1 for the worst.

    Args:
        reward: [S], [S, A] or [S, A, S].
        log_policy: [S, A].

    NaN where every policy earns the same (best - worst no more than 1e-5 of their size): there is nothing to lose, and
    nothing to measure it by. Raises ValueError as `value_iteration` and `policy_evaluation`.
    """
    return _share_lost(expected_return(mdp, log_policy, reward), *return_range(mdp, reward))


def value_divergence(
    mdp: TabularMDP,
    human_reward: ArrayLike,
    ai_reward: ArrayLike,
    *,
    temperature: ArrayLike,
    reward_distance: Callable[..., Array] = starc_distance,
) -> ValueDivergence:
    """How far two rewards are apart: as rewards, in the policies they lead to, and in what those earn.

    Args:
        human_reward, ai_reward: [S], [S, A] or [S, A, S].
        temperature: of the two soft-optimal policies compared, in units of each reward.
        reward_distance: `(human_reward, ai_reward, mdp) -> scalar`, such as `epic_distance`.

    Raises ValueError as `soft_value_iteration` and the distance do.
    """
    human = _human(mdp, human_reward, temperature)
    ai_log_policy = soft_value_iteration(mdp, ai_reward, temperature=temperature).log_policy
    return _divergence(mdp, human, ai_reward, ai_log_policy, reward_distance)


def constrained(
    network: Network,
    objective: Objective,
    constraints: Callable[[Params, Any, Key], Array],
    optimizer: optax.GradientTransformation,
    *,
    num_constraints: int,
    dual_learning_rate: ArrayLike,
    penalty: ArrayLike = 0.0,
) -> Algorithm:
    """Minimise f(x) subject to c_i(x) <= 0, i < C, by descent in x and ascent in the Lagrange multipliers.

    L(x, multipliers) = f(x) + sum_i multipliers_i c_i(x)
    x            descends   df/dx + sum_i max(0, multipliers_i + penalty c_i) dc_i/dx
    multipliers  <- max(0, multipliers + dual_learning_rate c)

    With penalty > 0 this is the augmented Lagrangian of Rockafellar (1973), which damps the circling of plain descent
    and ascent and converges where f is linear, too; its fixed points are the Karush-Kuhn-Tucker points all the same.

    Args:
        network: only `network.init` is used; x is what it returns.
        objective: `(x, batch, key) -> (f, metrics)`.
        constraints: `(x, batch, key) -> c`, [C], met where c <= 0.
        optimizer: any Optax transformation, for x.

    The state is a TrainState with params {"primal": x, "multipliers": [C]}; the multipliers start at 0.
    Metrics: the objective's own, "objective" f, "constraints" c [C], "multipliers" [C], "loss" f with each c_i at its
    price max(0, ...), "gradient_norm" over x and the multipliers.
    Raises ValueError at trace time if `constraints` does not return [num_constraints].
    """

    def problem(x: Params, batch: Any, key: Key) -> tuple[Array, Array, Metrics]:
        objective_key, constraints_key = jax.random.split(key)
        value, metrics = objective(x, batch, objective_key)
        return value, constraints(x, batch, constraints_key), metrics

    return _constrained(network, problem, optimizer, num_constraints, dual_learning_rate, penalty)


def align_values(
    mdp: TabularMDP,
    reward_network: Network,
    human_reward: ArrayLike,
    optimizer: optax.GradientTransformation,
    *,
    costs: ArrayLike,
    budgets: ArrayLike,
    temperature: ArrayLike,
    dual_learning_rate: ArrayLike,
    penalty: ArrayLike = 0.0,
    features: Array | None = None,
    divergence: Callable[[ValueDivergence], Array] = attrgetter("regret"),
    reward_distance: Callable[..., Array] = starc_distance,
) -> Algorithm:
    """Train an AI's reward so that it diverges least from the human's while the AI's behaviour keeps within budgets.

    min divergence(value_divergence(human_reward, ai_reward))  s.t.  sum_{s, a} d[s, a] costs[c, s, a] <= budgets[c]

    with d the discounted occupancy (not normalised) of the AI's soft-optimal policy; solved by `constrained`, whose
    state and metrics it has, with batches None. What a side effect does goes into `costs` as it is; to keep the return
    of a task reward r at least R, take the cost -r and the budget -R.

    Args:
        reward_network: `apply(params, features)` gives the AI's reward [S] (or [S, 1], or [S, A]).
        human_reward: [S], [S, A] or [S, A, S].
        costs: [C, S, A]; terminal states cost nothing.
        budgets: [C].
        temperature: of the human's and of the AI's soft-optimal policy.
        features: [S, F] (or [S, A, F], if the network takes it); None: one-hot states [S, S].
        divergence: which of the measures to minimise, or any function of them.
        dual_learning_rate, penalty, reward_distance: as in `constrained` and `value_divergence`.

    Metrics: those of `constrained`, and the four of ValueDivergence.
    Raises ValueError if an array is of another shape, or if the human's reward is indifferent between all policies.
    """
    costs, budgets = jnp.asarray(costs), jnp.asarray(budgets)
    if costs.ndim != 3 or costs.shape[1:] != (mdp.num_states, mdp.num_actions) or budgets.shape != costs.shape[:1]:
        raise ValueError(
            f"align_values: costs must be [C, {mdp.num_states}, {mdp.num_actions}] and budgets [C], "
            f"got {costs.shape} and {budgets.shape}"
        )
    features = jnp.eye(mdp.num_states, dtype=mdp.initial.dtype) if features is None else jnp.asarray(features)
    human = _human(mdp, human_reward, temperature)
    indifferent = jnp.isnan(_share_lost(human.best, human.worst, human.best))
    if not isinstance(indifferent, jax.core.Tracer) and bool(indifferent):
        raise ValueError("align_values: under human_reward every policy earns the same, so there is no regret")

    def problem(params: Params, batch: Any, key: Key) -> tuple[Array, Array, Metrics]:
        ai_reward = evaluate_reward(reward_network, params, features)
        log_policy = soft_value_iteration(mdp, ai_reward, temperature=temperature).log_policy
        measures = _divergence(mdp, human, ai_reward, log_policy, reward_distance)
        spent = jnp.einsum("sa,csa->c", occupancy_measure(mdp, log_policy), costs)
        return divergence(measures), spent - budgets, measures._asdict()

    return _constrained(reward_network, problem, optimizer, budgets.size, dual_learning_rate, penalty)


class _Human(NamedTuple):
    """What is compared with, once for all steps: reward, its soft-optimal log_policy [S, A], the range of returns."""

    reward: Array
    log_policy: Array
    worst: Array
    best: Array


def _human(mdp: TabularMDP, reward: ArrayLike, temperature: ArrayLike) -> _Human:
    reward = jnp.asarray(reward)
    log_policy = soft_value_iteration(mdp, reward, temperature=temperature).log_policy
    return _Human(reward, log_policy, *return_range(mdp, reward))


def _divergence(
    mdp: TabularMDP,
    human: _Human,
    ai_reward: ArrayLike,
    ai_log_policy: Array,
    reward_distance: Callable[..., Array],
) -> ValueDivergence:
    return ValueDivergence(
        reward_distance(human.reward, ai_reward, mdp),
        policy_divergence(mdp, human.log_policy, ai_log_policy),
        occupancy_distance(mdp, human.log_policy, ai_log_policy),
        _share_lost(expected_return(mdp, ai_log_policy, human.reward), human.worst, human.best),
    )


def _share_lost(earned: Array, worst: Array, best: Array) -> Array:
    """(best - earned) / (best - worst); NaN, without a NaN gradient, where the two are the same."""
    some = best - worst > 1e-5 * (jnp.abs(best) + jnp.abs(worst))
    return jnp.where(some, (best - earned) / jnp.where(some, best - worst, 1.0), jnp.nan)


def _constrained(
    network: Network,
    problem: Callable[[Params, Any, Key], tuple[Array, Array, Metrics]],
    optimizer: optax.GradientTransformation,
    num_constraints: int,
    dual_learning_rate: ArrayLike,
    penalty: ArrayLike,
) -> Algorithm:
    """`constrained` for objective and constraints that come out of one computation (f, c [C], metrics)."""

    def init(key: Key) -> Params:
        return {"primal": network.init(key), "multipliers": jnp.zeros(num_constraints)}

    def lagrangian(params: Params, batch: Any, key: Key) -> tuple[Array, Metrics]:
        multipliers = params["multipliers"]
        value, violation, metrics = problem(params["primal"], batch, key)
        if violation.shape != multipliers.shape:
            raise ValueError(f"constrained: constraints must return {multipliers.shape}, got {violation.shape}")
        price = jax.lax.stop_gradient(jax.nn.relu(multipliers + penalty * violation))
        # The second term is 0; its slope in the multipliers is the violation.
        loss = value + price @ violation + (multipliers - jax.lax.stop_gradient(multipliers)) @ violation
        return loss, {**metrics, "objective": value, "constraints": violation, "multipliers": multipliers}

    ascent = optax.chain(optax.scale(dual_learning_rate), optax.keep_params_nonnegative())
    parts = {"primal": "primal", "multipliers": "multipliers"}
    optimizer = optax.partition({"primal": optimizer, "multipliers": ascent}, parts)
    return gradient_algorithm(Network(init, network.apply), lagrangian, optimizer)
