"""How much faults cost, with and without a defence: votes, fallback evaluated exactly, degradation over fault rates."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.environments.protocol import Environment
from jaxalign.mdp.planning import bellman_q, expected_return, occupancy_measure, policy_evaluation, value_iteration
from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.mdp.transitions import GridTransition, SparseTransition, dense_transition, sparse_transition
from jaxalign.rl.rollout import evaluate
from jaxalign.types import Array, ArrayLike, Key

WorldAt = Callable[[Array], tuple[TabularMDP, Array]]  # fault rate -> (mdp, reward)


class Vote(NamedTuple):
    """What an ensemble says. choice: [...]; disagreement: [...], 0 where all members say the same."""

    choice: Array
    disagreement: Array


def majority_vote(actions: ArrayLike, *, num_actions: int) -> Vote:
    """The action most members choose, the first of equally frequent ones; right while fewer than half of E err.

    actions: int [E, ...], one row per member; a vote outside 0..num_actions-1 is nobody's, and all such give action 0.
    Returns Vote: choice int32 [...], disagreement the share of members that did not choose it.
    """
    actions = jnp.asarray(actions)
    votes = jnp.mean(jax.nn.one_hot(actions, num_actions, dtype=float), axis=0)
    return Vote(jnp.argmax(votes, axis=-1).astype(jnp.int32), 1.0 - jnp.max(votes, axis=-1))


def median_vote(values: ArrayLike) -> Vote:
    """The median of what members say, between two right values while fewer than half of E are wrong, however wrong.

    values: [E, ...]; a NaN is left out, and a place where all are NaN is NaN.
    Returns Vote: choice [...], disagreement the median of |values - choice|, in the unit of the values.
    """
    values = jnp.asarray(values, float)
    choice = jnp.nanmedian(values, axis=0)
    return Vote(choice, jnp.nanmedian(jnp.abs(values - choice[None]), axis=0))


def majority_vote_error(rate: ArrayLike, *, members: int) -> Array:
    """The probability that half or more of E = `members` are wrong: sum_{k >= E/2} C(E, k) rate^k (1 - rate)^(E - k).

    That is how often a majority vote fails if members fail independently and the wrong ones agree (the worst case; a
    tie counts as failure), [...] as `rate`. von Neumann (1956), "Probabilistic logics".
    Raises ValueError if members < 1.
    """
    if members < 1:
        raise ValueError(f"majority_vote_error: members must be at least 1, got {members}")
    needed = math.ceil(members / 2)
    return jax.scipy.special.betainc(float(needed), float(members - needed + 1), jnp.asarray(rate, float))


def degradation_curves(world_at: WorldAt, log_policies: Any, rates: ArrayLike) -> Any:
    """The exact expected return of each policy at each fault rate, every leaf [S, A] becoming [R].

    world_at: rate -> (mdp, reward), both traced in it: `action_faults` and `action_fault_reward`, say
    log_policies: pytree of [S, A] or [H, S, A]; rates: [R]
    """

    def returns(rate: Array) -> Any:
        mdp, reward = world_at(rate)
        return jax.tree.map(lambda log_policy: expected_return(mdp, log_policy, reward), log_policies)

    return jax.vmap(returns)(jnp.asarray(rates, float))


def degradation_returns(
    key: Key,
    environment_at: Callable[[Array], Environment],
    act: Callable[[Key, Array], Array],
    rates: ArrayLike,
    *,
    episodes: int,
    max_steps: int,
) -> Array:
    """Returns [R, episodes] of one policy in an environment at each fault rate; `evaluate` for all of them at once.

    environment_at: rate -> Environment, the rate traced in it; act: (key, observation) -> action; rates: [R]. All rates
    see the same keys, so differences between them are paired. Give a row to `bootstrap_interval`.
    """

    def returns(rate: Array) -> Array:
        return evaluate(key, environment_at(rate), act, episodes=episodes, max_steps=max_steps).returns

    return jax.vmap(returns)(jnp.asarray(rates, float))


class RandomizedPlan(NamedTuple):
    """policy: [S, A], one-hot; value: [], its expected return, the weighted mean over fault rates."""

    policy: Array
    value: Array


def domain_randomized_plan(
    world_at: WorldAt, rates: ArrayLike, *, weights: ArrayLike | None = None, iterations: int = 20
) -> RandomizedPlan:
    """One policy for a fault rate drawn once per episode and never seen: large sum_r weights[r] return(rates[r]).

    Policy iteration on the mean: policy[s] = argmax_a sum_r weights[r] d_r[s] q_r[s, a], with d_r the discounted visits
    and q_r the values of the policy before at rate r (that is the gradient of the mean return). Started from the best
    policy of each rate, of all policies met the best is kept. For one rate it is policy iteration; for several the
    problem is NP-hard, and this finds a good policy, never a worse one than the best for any single rate.
    Steimle, Kaufman & Denton (2021), "Multi-model Markov decision processes".

    world_at: rate -> (mdp, reward), traced; rates: [R]; weights: [R], None: equal; iterations: static.
    """
    rates = jnp.asarray(rates, float)
    share = jnp.full(rates.shape, 1.0) if weights is None else jnp.asarray(weights, float)
    share = share / jnp.sum(share)

    def judge(policy: Array) -> tuple[Array, Array]:
        """(mean return, [S, A] its gradient)."""

        def at(rate: Array) -> tuple[Array, Array]:
            mdp, reward = world_at(rate)
            value = policy_evaluation(mdp, jnp.log(policy), reward)
            visits = jnp.sum(occupancy_measure(mdp, jnp.log(policy)), axis=-1)
            # A little of each state, so that states the policy does not reach are improved as well.
            visits = visits + jnp.sqrt(jnp.finfo(visits.dtype).eps)
            return mdp.initial @ value, visits[:, None] * bellman_q(mdp, action_reward(mdp, reward), value)

        returns, gradients = jax.vmap(at)(rates)
        return share @ returns, jnp.tensordot(share, gradients, axes=1)

    def improve(carry: tuple[Array, RandomizedPlan], _: None) -> tuple[tuple[Array, RandomizedPlan], None]:
        policy, best = carry
        value, gradient = judge(policy)
        better, met = value > best.value, RandomizedPlan(policy, value)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), met, best)
        return (jax.nn.one_hot(jnp.argmax(gradient, axis=-1), gradient.shape[-1], dtype=policy.dtype), best), None

    def search(policy: Array) -> RandomizedPlan:
        nothing = RandomizedPlan(policy, jnp.full((), -jnp.inf, policy.dtype))
        return jax.lax.scan(improve, (policy, nothing), None, length=iterations)[0][1]

    found = jax.lax.map(search, jax.vmap(lambda rate: value_iteration(*world_at(rate)).policy)(rates))
    return jax.tree.map(lambda leaf: leaf[jnp.argmax(found.value)], found)


def alarm_evidence(nominal: TabularMDP, faulty: TabularMDP, *, unit: ArrayLike, most: int) -> Array:
    """log(P_faulty / P_nominal) of each step in whole units, at most +-`most`: int32 [S, A, S], for `with_alarm`.

    unit: > 0, nats. 0 where neither can make the step.
    """
    right, wrong = (dense_transition(mdp.transition) for mdp in (nominal, faulty))
    tiny = jnp.finfo(right.dtype).tiny
    ratio = jnp.log(jnp.maximum(wrong, tiny)) - jnp.log(jnp.maximum(right, tiny))
    return jnp.clip(jnp.round(ratio / unit), -most, most).astype(jnp.int32)


def with_alarm(mdp: TabularMDP, evidence: ArrayLike, *, levels: int) -> TabularMDP:
    """The MDP together with a `cusum` detector that counts in whole units, so that fallback can be evaluated exactly.

    State level * S + s, (levels + 1) S in all: each step adds evidence[s, a, s'] to the level, kept in 0..levels; at
    level `levels` the alarm has gone off, and stays. `fallback_policy` and `jnp.tile(reward, (levels + 1, 1))` go with
    it. The transition is sparse.

    evidence: int [S, A, S]. Raises ValueError on another shape, or levels < 1.
    """
    states, actions = mdp.num_states, mdp.num_actions
    evidence = jnp.asarray(evidence)
    if evidence.shape != (states, actions, states) or levels < 1:
        raise ValueError(
            f"with_alarm: evidence must be {[states, actions, states]} and levels at least 1, "
            f"got {evidence.shape} and {levels}"
        )
    if isinstance(mdp.transition, SparseTransition | GridTransition):
        next_state, probability = sparse_transition(mdp.transition)
    else:  # every state is a place: how many are in use is not known under jit
        probability = mdp.transition
        next_state = jnp.broadcast_to(jnp.arange(states, dtype=jnp.int32), probability.shape)
    added = jnp.take_along_axis(evidence, next_state, axis=-1)
    level = jnp.arange(levels + 1, dtype=jnp.int32)[:, None, None, None]
    after = jnp.where(level == levels, levels, jnp.clip(level + added[None], 0, levels))
    successor = (after * states + next_state[None]).astype(jnp.int32).reshape(-1, *next_state.shape[1:])
    return TabularMDP(
        SparseTransition(successor, jnp.tile(probability, (levels + 1, 1, 1))),
        jnp.concatenate([mdp.initial, jnp.zeros(levels * states, mdp.initial.dtype)]),
        jnp.tile(mdp.terminal, levels + 1),
        mdp.discount,
    )


def fallback_policy(log_policy: Array, safe_log_policy: Array, *, levels: int) -> Array:
    """`log_policy` until the alarm, `safe_log_policy` from then on, for `with_alarm`: [S, A] -> [(levels + 1) S, A]."""
    return jnp.concatenate([jnp.tile(log_policy, (levels, 1)), safe_log_policy])
