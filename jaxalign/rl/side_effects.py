"""Penalties for side effects: the state an outcome is compared with, the planning problem, and what came of it.

The agent is paid reward(s, a) - coefficient * E deviation[s', b], with a deviation [S, S] of jaxalign.rl.reachability
and b the baseline: the state at the start, the one that doing nothing since the start would have led to, or the one
that doing nothing just now would have led to. The first two are not functions of s, so that the agent plans in a world
whose state is (s, b). Scale: a penalty is in the units of its deviation, per step, neither averaged nor discounted.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp import SparseTransition, TabularMDP, occupancy_measure, sparse_transition, value_iteration
from jaxalign.rl.reachability import (
    attainable_utilities,
    inaction_rollout,
    reachability,
    relative_reachability,
    scale_by_baseline,
    unreachability,
    value_difference,
)
from jaxalign.types import Array, ArrayLike, Key


class Baseline(NamedTuple):
    """A world with its baseline in the state: S' pairs (s, b).

    mdp: the MDP over the pairs
    state: [S'] int, the world's state s of each
    compared: [S'] int, the state that the outcome of an action taken there is compared with
    """

    mdp: TabularMDP
    state: Array
    compared: Array


def starting_state(mdp: TabularMDP) -> Baseline:
    """Compare with the state the episode began in: S' pairs of one of S states and one with mdp.initial[s] > 0.

    Blames the agent for all that happens, so that it may hinder what others do (interference).
    """
    return _paired(mdp, np.arange(mdp.num_states))


def inaction(mdp: TabularMDP, *, noop: int) -> Baseline:
    """Compare with the state in which the world would be had the agent never done anything: b <- next_state[b, noop].

    S' pairs of one of S states and one that doing nothing from the start leads to. Goes on blaming the agent for what
    it did on purpose, so that it may undo its own work (offsetting).
    Raises ValueError if action `noop` is not deterministic: then there is no one such state.
    """
    return _paired(mdp, _doing_nothing(mdp, noop, "inaction"))


def stepwise_inaction(mdp: TabularMDP, *, noop: int) -> Baseline:
    """Compare with the state that doing nothing now, and not all along, would lead to; the states [S] are the world's.

    Doing nothing is never penalised. Turner et al. (2020, arXiv:1902.09725).
    Raises ValueError if action `noop` is not deterministic.
    """
    sparse = mdp.replace(transition=sparse_transition(mdp.transition))
    after = _doing_nothing(mdp, noop, "stepwise_inaction")
    return Baseline(sparse, jnp.arange(mdp.num_states), jnp.asarray(after))


def side_effect_penalty(baseline: Baseline, deviation: Array) -> Array:
    """penalty[x, a] = E_{s' ~ P(. | x, a)} deviation[s', compared[x]], [S, S] -> [S', A]; 0 in terminal states."""
    next_state, probability = baseline.mdp.transition
    compared = deviation[baseline.state[next_state], baseline.compared[:, None, None]]
    return jnp.where(baseline.mdp.terminal[:, None], 0.0, jnp.sum(probability * compared, axis=-1))


def penalized_reward(baseline: Baseline, reward: Array, penalty: Array, *, coefficient: ArrayLike) -> Array:
    """reward[state[x], a] - coefficient * penalty[x, a], for the baseline's MDP; [S, A] and [S', A] -> [S', A]."""
    return reward[baseline.state] - coefficient * penalty


class Judged(NamedTuple):
    """What a plan for a penalised reward is worth, undiscounted sums over an episode, scalars (or [C]).

    reward: what the task pays it
    performance: what it is worth by the world's hidden performance
    penalty: what it was charged, before the coefficient
    """

    reward: Array
    performance: Array
    penalty: Array


@functools.partial(jax.jit, static_argnames="horizon")
def judge_penalty(
    baseline: Baseline, deviation: Array, reward: Array, performance: Array, *, coefficient: ArrayLike, horizon: int
) -> Judged:
    """Plan for the penalised reward over `horizon` steps with the MDP's discount, and see what comes of the plan.

    deviation: [S, S]; reward, performance: [S, A]. Jitted, as planners are.
    """
    penalty = side_effect_penalty(baseline, deviation)
    paid = penalized_reward(baseline, reward, penalty, coefficient=coefficient)
    policy = value_iteration(baseline.mdp, paid, horizon=horizon).policy
    visits = occupancy_measure(baseline.mdp.replace(discount=jnp.ones_like(baseline.mdp.discount)), jnp.log(policy))
    of_state = (reward[baseline.state], performance[baseline.state], penalty)
    return Judged(*(jnp.sum(visits * each) for each in of_state))


def penalty_sweep(
    baseline: Baseline, deviation: Array, reward: Array, performance: Array, coefficients: ArrayLike, *, horizon: int
) -> Judged:
    """`judge_penalty` at every coefficient [C], planned together: a curve of arrays [C]."""
    judge = functools.partial(judge_penalty, baseline, deviation, reward, performance, horizon=horizon)
    return jax.vmap(lambda coefficient: judge(coefficient=coefficient))(jnp.asarray(coefficients))


class Design(NamedTuple):
    """A penalty: what is compared with what. deviation: [S, S]."""

    baseline: Baseline
    deviation: Array


def attainable_utility_designs(
    key: Key, mdp: TabularMDP, *, noop: int, num_rewards: int = 30, discount: ArrayLike = 0.996
) -> dict[str, Design]:
    """Attainable utility preservation and its ablations (Turner et al., 2020) for the S states of `mdp`.

    The auxiliary rewards are uniform on [0, 1], one number per state. All deviations are shares of what the baseline
    can attain (`scale_by_baseline`). All but "model-free" compare after an `inaction_rollout`, the starting state's own
    values excepted. discount: of the auxiliary values and of the rollouts.
    """
    auxiliary = jax.random.uniform(key, (num_rewards, mdp.num_states), mdp.initial.dtype)
    now, later, lost = _attainable_utility_deviations(mdp, auxiliary, discount, noop)
    stepwise, start = stepwise_inaction(mdp, noop=noop), starting_state(mdp)
    return {
        "AUP": Design(stepwise, later[0]),
        "model-free": Design(stepwise, now),
        "starting state": Design(start, later[1]),
        "inaction": Design(inaction(mdp, noop=noop), later[0]),
        "decrease": Design(stepwise, lost),
    }


def reachability_designs(mdp: TabularMDP, *, noop: int, discount: ArrayLike = 0.99) -> dict[str, Design]:
    """Unreachability and relative reachability from each baseline, [S, S] (Krakovna et al., 2019, arXiv:1806.01186).

    Relative reachability from the stepwise baseline is after an `inaction_rollout`. discount: of reachabilities and
    of that rollout.
    """
    deviations = dict(zip(("unreachability", "relative reachability"), _reach(mdp, discount, noop), strict=True))
    baselines = {
        "starting state": starting_state(mdp),
        "inaction": inaction(mdp, noop=noop),
        "stepwise": stepwise_inaction(mdp, noop=noop),
    }
    return {
        f"{measure}, {name}": Design(baseline, deviation[name == "stepwise"])
        for measure, deviation in deviations.items()
        for name, baseline in baselines.items()
    }


@functools.partial(jax.jit, static_argnums=3)
def _attainable_utility_deviations(
    mdp: TabularMDP, auxiliary: Array, discount: ArrayLike, noop: int
) -> tuple[Array, tuple[Array, Array], Array]:
    """Now, later (with the baseline's values later, and now), and what is lost later."""
    now = attainable_utilities(mdp, auxiliary, discount=discount).T
    later = inaction_rollout(mdp, now, noop=noop, discount=discount)

    def share(values: Array, base: Array, summary: Callable[[Array], Array] = jnp.abs) -> Array:
        return scale_by_baseline(value_difference(values, base, summary=summary), base)

    return share(now, now), (share(later, later), share(later, now)), share(later, later, jax.nn.relu)


@functools.partial(jax.jit, static_argnums=2)
def _reach(mdp: TabularMDP, discount: ArrayLike, noop: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(without, with) a rollout: unreachability, which has none, and relative reachability."""
    reach = reachability(mdp, discount=discount)
    later = inaction_rollout(mdp, reach, noop=noop, discount=discount)
    alone = unreachability(reach)
    return (alone, alone), (relative_reachability(reach), relative_reachability(later))


def _doing_nothing(mdp: TabularMDP, noop: int, name: str) -> np.ndarray:
    """The state [S] after doing nothing in each."""
    next_state, probability = (np.asarray(x)[:, noop] for x in sparse_transition(mdp.transition))
    likeliest = np.argmax(probability, axis=-1)
    after = np.take_along_axis(next_state, likeliest[:, None], axis=-1)
    # The same successor may be listed twice.
    sure = np.sum(probability * (next_state == after), axis=-1)
    if unsure := np.flatnonzero(sure < 1.0 - 1e-5).tolist():
        raise ValueError(f"{name}: action noop={noop} must be deterministic, in state {unsure[0]} it is not")
    return np.where(np.asarray(mdp.terminal), np.arange(mdp.num_states), after[:, 0])


def _paired(mdp: TabularMDP, after: np.ndarray) -> Baseline:
    """The world beside a baseline that begins where it begins and goes from b to after[b] [S] at every step."""
    initial = np.asarray(mdp.initial)
    baselines = np.flatnonzero(initial).tolist()
    for b in baselines:  # grows on the way
        if (then := int(after[b])) not in baselines:
            baselines.append(then)
    places = np.array([baselines.index(after[b]) for b in baselines])
    transition, states, pairs = sparse_transition(mdp.transition), mdp.num_states, len(baselines)
    next_state, probability, terminal = (np.repeat(x, pairs, axis=0) for x in (*transition, mdp.terminal))
    next_state = next_state * pairs + np.tile(places, states)[:, None, None].astype(np.int32)
    start = np.zeros((states, pairs), initial.dtype)
    start[baselines, range(pairs)] = initial[baselines]
    both = TabularMDP(SparseTransition(next_state, probability), start.reshape(-1), terminal, mdp.discount)
    state, compared = np.repeat(np.arange(states), pairs), np.tile(after[baselines], states)
    return Baseline(both, jnp.asarray(state), jnp.asarray(compared))
