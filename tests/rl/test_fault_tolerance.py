"""Votes against the binomial, detectors against Wald's and Lorden's bounds, fallback exactly and by simulation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxalign.environments.tabular import tabular_environment
from jaxalign.mdp import (
    TabularMDP,
    arrival_reward,
    cliff,
    cliff_reward,
    expected_return,
    gridworld,
    random_mdp,
    sparse_transition,
    value_iteration,
)
from jaxalign.rl.environment_faults import faulty_actions
from jaxalign.rl.fault_detection import (
    cusum,
    guarded,
    sequential_ratio_test,
    transition_log_ratio,
    with_fallback,
)
from jaxalign.rl.fault_tolerance import (
    alarm_evidence,
    degradation_curves,
    degradation_returns,
    domain_randomized_plan,
    fallback_policy,
    majority_vote,
    majority_vote_error,
    median_vote,
    with_alarm,
)
from jaxalign.rl.faults import action_fault_reward, action_faults

KEY = jax.random.key(0)


def assert_close(x, y, **tolerance):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), **({"atol": 2e-5} | tolerance))


def test_votes_by_hand():
    vote = majority_vote(jnp.array([[2, 0], [2, 1], [1, 1], [2, 0], [9, 7]]), num_actions=3)
    assert vote.choice.tolist() == [2, 0]
    assert_close(vote.disagreement, [0.4, 0.6])
    values = jnp.array([[1.0, 1.0], [1.2, jnp.nan], [1e9, 2.0], [0.9, jnp.nan], [1.1, 4.0]])
    vote = median_vote(values)
    assert_close(vote.choice, [1.1, 2.0])
    assert_close(vote.disagreement, [0.1, 1.0], atol=1e-6)
    assert np.isnan(median_vote(jnp.full(3, jnp.nan)).choice)


def test_a_wrong_majority_is_as_likely_as_the_binomial_says():
    rates = np.array([0.0, 0.1, 0.4, 1.0])
    for members in (1, 2, 5, 8):
        wanted = scipy.stats.binom.sf(np.ceil(members / 2) - 1, members, rates)
        assert_close(majority_vote_error(rates, members=members), wanted, atol=1e-6)
    faulty = jax.random.bernoulli(KEY, 0.3, (5, 20_000)).astype(int)  # the right action is 0, the wrong ones agree on 1
    wrong = int(np.sum(majority_vote(faulty, num_actions=2).choice == 1))
    low, high = scipy.stats.binomtest(wrong, 20_000).proportion_ci(0.999)
    assert low < majority_vote_error(0.3, members=5) < high
    assert_close(jax.grad(lambda p: majority_vote_error(p, members=3))(0.2), 6 * 0.2 * 0.8, rtol=1e-4)  # 3 p^2 - 2 p^3
    with pytest.raises(ValueError, match="at least 1"):
        majority_vote_error(0.1, members=0)


# Two states, one action, the next state drawn anew: residuals are independent, as the theory has them.
def coin(p):
    return TabularMDP(jnp.full((2, 1, 2), jnp.array([1 - p, p])), jnp.array([1.0, 0.0]), jnp.zeros(2, bool), 0.9)


NOMINAL, FAULTY = coin(0.2), coin(0.5)
DIVERGENCE = float(scipy.special.rel_entr([0.5, 0.5], [0.8, 0.2]).sum())  # KL(faulty || nominal)
LOG_RATIO = transition_log_ratio(NOMINAL, FAULTY)


def alarm_times(detector, p, num, length):
    """The step [num] of the first alarm in `length` steps of a coin p, 0 where there is none; and the last states."""

    def one(key):
        states = jax.random.bernoulli(key, p, (length,)).astype(jnp.int32)
        residuals = jax.vmap(LOG_RATIO)(jnp.zeros_like(states), jnp.zeros_like(states), states)
        last, alarms = jax.lax.scan(detector.update, detector.init(), residuals)
        return jnp.where(jnp.any(alarms), jnp.argmax(alarms) + 1, 0), last

    return jax.vmap(one)(jax.random.split(KEY, num))


def test_residuals():
    assert_close(LOG_RATIO(0, 0, 1), np.log(0.5 / 0.2), rtol=1e-5)
    grid = gridworld(2, 2)
    broken = action_faults(grid, rate=0.5, replacement=4)
    for forms in ((grid, broken), (grid.replace(transition=sparse_transition(grid.transition)), broken)):
        ratio = transition_log_ratio(*forms)
        assert_close(ratio(2, 0, 0), np.log(0.5))
        assert 80 < ratio(2, 0, 2) < 100  # impossible while all is well: large, but a number
        assert ratio(2, 0, 1) == 0.0  # impossible either way
    with pytest.raises(ValueError, match=r"\(S, A\)"):
        transition_log_ratio(grid, NOMINAL)


def test_sequential_ratio_test_keeps_walds_promises():
    false_alarm, missed = 0.05, 0.1
    run = jax.jit(lambda p: alarm_times(sequential_ratio_test(false_alarm=false_alarm, missed=missed), p, 4000, 200))
    alarm, state = run(0.2)
    wrongly = scipy.stats.binomtest(int((alarm > 0).sum()), 4000).proportion_ci(0.999)
    assert wrongly.low < false_alarm / (1 - missed)
    assert (alarm > 0).sum() > 0
    assert np.all(state.decision != 0)
    alarm, state = run(0.5)
    unseen = scipy.stats.binomtest(int((state.decision == -1).sum()), 4000).proportion_ci(0.999)
    assert unseen.low < missed / (1 - false_alarm)
    delays = np.asarray(alarm)[np.asarray(alarm) > 0]
    upper, lower = np.log((1 - missed) / false_alarm), np.log(missed / (1 - false_alarm))
    expected = ((1 - missed) * upper + missed * lower) / DIVERGENCE
    assert expected < delays.mean() < expected + 2 * np.log(0.5 / 0.2) / DIVERGENCE + 4  # it oversteps by one residual
    with pytest.raises(ValueError, match="together < 1"):
        sequential_ratio_test(false_alarm=0.6, missed=0.5)


def test_cusum_alarms_late_when_well_and_soon_when_not():
    threshold = 3.0
    run = jax.jit(lambda p: alarm_times(cusum(threshold=threshold), p, 1000, 1500)[0])
    false = np.asarray(run(0.2))
    assert (false > 0).mean() > 0.99
    error = false.std() / np.sqrt(false.size)
    assert false.mean() > np.exp(threshold) - 3 * error  # Lorden's bound: exp(3) = 20 steps
    delay = np.asarray(run(0.5))
    assert np.all(delay > 0)
    # To reach the threshold the walk needs threshold / divergence steps, and oversteps by less than one residual.
    assert threshold / DIVERGENCE - 6 < delay.mean() < (threshold + np.log(2.5)) / DIVERGENCE + 1
    assert delay.mean() < false.mean() / 4
    higher = jax.jit(lambda: alarm_times(cusum(threshold=5.0), 0.5, 1000, 300)[0])()
    assert_close(higher.mean() - delay.mean(), 2.0 / DIVERGENCE, rtol=0.35)  # the slope of theory


def test_cusum_by_hand():
    detector = cusum(threshold=2.0)
    scores, alarms = [], []
    state = detector.init()
    for x in (-1.0, 1.5, -0.5, 1.0, -3.0):
        state, alarm = detector.update(state, jnp.float32(x))
        scores.append(float(state))
        alarms.append(bool(alarm))
    assert scores == [0.0, 1.5, 1.0, 2.0, 0.0]
    assert alarms == [False, False, False, True, False]


WALK = gridworld(1, 6, goal=(0, 5), start=(0, 0), discount=0.9)
BROKEN = action_faults(WALK, rate=0.5, replacement=3)
RIGHT, STAY = jnp.log(jax.nn.one_hot(jnp.full(6, 1), 5)), jnp.log(jax.nn.one_hot(jnp.full(6, 4), 5))


def test_fallback_acts_safely_from_the_alarm_on():
    go, stop = (lambda key, state: jnp.int32(1)), (lambda key, state: jnp.int32(4))
    policy = with_fallback(go, stop, cusum(threshold=1.0), transition_log_ratio(WALK, BROKEN))
    memory, actions = policy.init(jnp.int32(0)), []
    for seen in (0, 1, 2, 1, 1, 2):  # pushed left at the third step
        memory, action = jax.jit(policy.act)(memory, KEY, jnp.int32(seen))
        actions.append(int(action))
    assert actions == [1, 1, 1, 4, 4, 4]
    assert bool(memory.alarmed)


def test_guarded_episodes_have_the_exact_value_of_the_joint_chain():
    """Undiscounted steps to the goal with a guard that stands still after an alarm: simulated, and exactly."""
    levels, length = 2, 12
    evidence = alarm_evidence(WALK, BROKEN, unit=1.0, most=2)
    assert evidence[2, 1, 1] == 2
    assert evidence[2, 1, 3] == -1
    assert evidence[2, 1, 5] == 0
    rates, cost = jnp.array([0.0, 0.3]), -jnp.ones(6).at[5].set(0.0)
    go, stop = (lambda key, state: jnp.int32(1)), (lambda key, state: jnp.int32(4))
    log_ratio = lambda s, a, z: evidence[s, a, z].astype(float)  # noqa: E731

    def environment_at(rate):
        world = tabular_environment(WALK, jnp.broadcast_to(cost, (6, 5, 6)), observe="index")
        return guarded(faulty_actions(world, rate=rate, replacement=3), stop, cusum(threshold=2.0), log_ratio)

    def joint_at(rate):
        broken = action_faults(WALK.replace(discount=1.0), rate=rate, replacement=3)
        return with_alarm(broken, evidence, levels=levels), jnp.tile(arrival_reward(broken, cost), (levels + 1, 1))

    @jax.jit
    def both():
        safe = {"never": RIGHT, "alarm": STAY}
        policies = {name: fallback_policy(RIGHT, policy, levels=levels) for name, policy in safe.items()}
        timed = jax.tree.map(lambda policy: jnp.broadcast_to(policy, (length, *policy.shape)), policies)
        exact = degradation_curves(joint_at, timed, rates)
        return exact, degradation_returns(KEY, environment_at, go, rates, episodes=1000, max_steps=length)

    exact, returns = both()
    assert_close(exact["never"][0], -4.0)
    assert exact["alarm"][0] == exact["never"][0]  # no fault, no alarm
    assert exact["alarm"][1] < exact["never"][1]  # to stand still is not better here
    assert returns.shape == (2, 1000)
    error = np.asarray(returns).std(axis=1) / np.sqrt(1000)
    assert np.all(np.abs(returns.mean(axis=1) - exact["alarm"]) < 4 * error + 1e-4)


def test_curves_of_plans_on_a_cliff():
    rates = jnp.linspace(0.0, 0.6, 4)
    world = cliff(3, 5, discount=0.95)
    faulty = lambda rate: action_faults(world, rate=rate)  # noqa: E731
    at = lambda rate: (faulty(rate), arrival_reward(faulty(rate), cliff_reward(3, 5)))  # noqa: E731
    plans = jax.vmap(lambda rate: value_iteration(*at(rate)).policy)(rates)
    curves = degradation_curves(at, {f"{i}": jnp.log(plan) for i, plan in enumerate(plans)}, rates)
    table = np.stack([curves[f"{i}"] for i in range(4)])
    assert np.all(np.argmax(table + 1e-4 * np.eye(4), axis=0) == np.arange(4))  # each is best where it was planned
    assert np.all(np.diff(table, axis=1) < 0.0)
    mixed = domain_randomized_plan(at, rates)
    assert_close(mixed.value, degradation_curves(at, jnp.log(mixed.policy), rates).mean(), rtol=1e-4)
    assert mixed.value >= table.mean(axis=1).max() - 1e-3


@pytest.mark.slow
def test_domain_randomized_plans_beside_all_policies():
    policies = jax.nn.one_hot(jnp.array(list(itertools.product(range(2), repeat=3))), 2)
    rates, weights = jnp.array([0.0, 0.5, 1.0]), jnp.array([0.5, 0.2, 0.3])

    @jax.jit
    def both(key):
        draw, pay = jax.random.split(key)
        mdp, reward = random_mdp(draw, 3, 2), jax.random.normal(pay, (3, 2))
        fault = lambda rate: {"rate": rate, "replacement": 0}  # noqa: E731
        at = lambda r: (action_faults(mdp, **fault(r)), action_fault_reward(mdp, reward, **fault(r)))  # noqa: E731
        worth = jax.vmap(lambda p: weights @ degradation_curves(at, jnp.log(p), rates))(policies)
        return domain_randomized_plan(at, rates, weights=weights).value, worth

    found, worth = jax.lax.map(both, jax.random.split(KEY, 12))
    best = worth.max(axis=1)
    assert np.all(found <= best + 1e-4)
    assert_close(found, best, atol=1e-3)  # all twelve: the search is not stuck in these


def test_bad_detectors_are_named():
    with pytest.raises(ValueError, match="with_alarm: evidence must be"):
        with_alarm(WALK, jnp.zeros((6, 5)), levels=2)


def test_no_evidence_no_alarm():
    silent = with_alarm(WALK, jnp.zeros((6, 5, 6), int), levels=1)
    at_fifth = jnp.where(jnp.arange(12) == 4, 1.0, 0.0)
    assert_close(expected_return(silent, jnp.tile(RIGHT, (2, 1)), at_fifth), 0.9**4)
