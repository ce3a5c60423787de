"""Faults in MDPs and environments: by hand, as identities, and against loops over states and all policies."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.cartpole import cartpole
from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, check_environment
from jaxalign.mdp import (
    Contamination,
    SparseTransition,
    TabularMDP,
    dense_transition,
    expected_return,
    gridworld,
    policy_evaluation,
    random_mdp,
    robust_value_iteration,
    sparse_transition,
    value_iteration,
)
from jaxalign.rl.action_robust import (
    action_adversary,
    probabilistic_robust_evaluation,
    probabilistic_robust_value_iteration,
)
from jaxalign.rl.environment_faults import (
    delayed_actions,
    faulty_actions,
    faulty_rewards,
    faulty_sensors,
    fixed_reading,
    last_reading,
    noisy_reading,
    random_reading,
)
from jaxalign.rl.faults import (
    action_fault_reward,
    action_faults,
    executed_actions,
    frozen_transition,
    transition_faults,
)
from jaxalign.rl.sensor_faults import belief_update, policy_through_sensor, qmdp_action, qmdp_returns, sensor_faults

KEY = jax.random.key(0)
DENSE = random_mdp(KEY, 4, 3).replace(terminal=jnp.array([False, False, False, True]))
SPARSE = DENSE.replace(transition=sparse_transition(DENSE.transition))
REWARD = jax.random.normal(jax.random.key(1), (4, 3))
GRID = gridworld(2, 3, slip=0.1, goal=5)
BY_STATE = jax.random.dirichlet(jax.random.key(2), jnp.ones(3), (4,))


def assert_close(x, y, **tolerance):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), **({"atol": 2e-5} | tolerance))


def test_action_faults_by_hand():
    """Two states, two actions: stay or swap, and a third of the swaps become stays."""
    stay_or_swap = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    mdp = TabularMDP(stay_or_swap, jnp.array([1.0, 0.0]), jnp.zeros(2, bool), 0.5)
    assert_close(action_faults(mdp, rate=1 / 3, replacement=0).transition[0, 1], [1 / 3, 2 / 3])
    assert_close(action_faults(mdp, rate=0.5).transition[0], [[0.75, 0.25], [0.25, 0.75]])
    assert_close(action_fault_reward(mdp, jnp.array([[4.0, 0.0], [0.0, 0.0]]), rate=0.25, replacement=1)[0], [3.0, 0.0])
    assert_close(executed_actions(mdp, rate=0.2, replacement=jnp.array([0.5, 0.5])), [[0.9, 0.1], [0.1, 0.9]])


@pytest.mark.parametrize("replacement", [None, 2, np.array([0.2, 0.3, 0.5], np.float32), BY_STATE])
@pytest.mark.parametrize("mdp", [DENSE, SPARSE])
def test_action_faults_are_a_mixture_over_actions(mdp, replacement):
    table = {"None": np.full(3, 1 / 3), "2": np.eye(3)[2]}.get(str(replacement), replacement)
    table = np.broadcast_to(table, (4, 3))
    nominal = np.asarray(DENSE.transition)
    wanted = 0.7 * nominal + 0.3 * np.einsum("sb,sbz->sz", table, nominal)[:, None]
    faulty = action_faults(mdp, rate=0.3, replacement=replacement)
    assert isinstance(faulty.transition, type(mdp.transition))
    assert_close(dense_transition(faulty.transition), wanted)
    earned = np.where(np.asarray(DENSE.terminal)[:, None], 0.0, REWARD)
    wanted_reward = 0.7 * earned + 0.3 * np.sum(table * earned, axis=1)[:, None]
    assert_close(action_fault_reward(mdp, REWARD, rate=0.3, replacement=replacement), wanted_reward)


def test_a_grid_stays_a_grid_and_uniform_faults_are_its_slip():
    moving = gridworld(2, 3, goal=5, stay=False)
    faulty = action_faults(moving, rate=0.4)
    assert_close(faulty.transition.probability, gridworld(2, 3, slip=0.4, goal=5, stay=False).transition.probability)
    by_state = jnp.tile(jnp.eye(5)[0], (6, 1))
    one, other = action_faults(GRID, rate=0.4, replacement=by_state), action_faults(GRID, rate=0.4, replacement=0)
    assert isinstance(one.transition, SparseTransition)
    assert one.transition.probability.shape == (6, 5, 5)
    assert_close(dense_transition(one.transition), dense_transition(other.transition))


def test_transition_faults():
    to = jnp.array([0.1, 0.2, 0.3, 0.4])
    nominal = np.asarray(DENSE.transition)
    frozen = np.broadcast_to(np.eye(4)[:, None], (4, 3, 4))
    for mdp in (DENSE, SPARSE):
        thrown = transition_faults(mdp, rate=0.25, fault=to).transition
        assert_close(thrown, 0.75 * nominal + 0.25 * np.asarray(to))
        held = transition_faults(mdp, rate=0.25, fault=frozen_transition(mdp)).transition
        assert_close(dense_transition(held), 0.75 * nominal + 0.25 * frozen)
    assert isinstance(held, SparseTransition)
    stopped = transition_faults(GRID, rate=1.0, fault=frozen_transition(GRID))
    assert_close(value_iteration(stopped, jnp.ones(6)).value, [10.0] * 5 + [0.0], rtol=1e-4)


def test_rates_may_be_traced_and_have_gradients():
    def worth(rate):
        faulty = action_faults(SPARSE, rate=rate)
        return value_iteration(faulty, action_fault_reward(SPARSE, REWARD, rate=rate), tolerance=1e-7).value[0]

    rates = jnp.array([0.0, 0.3, 1.0])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(worth)))(rates)
    assert_close(values[0], value_iteration(DENSE, REWARD).value[0])
    assert np.all(np.diff(values) < 0.0)
    assert np.all(slopes[:2] < 0.0)
    uniform = jnp.full((4, 3), -np.log(3.0))
    assert_close(values[2], policy_evaluation(DENSE, uniform, REWARD)[0])
    with jax.enable_x64(True):
        wide = TabularMDP(np.asarray(DENSE.transition, np.float64), np.full(4, 0.25), np.asarray(DENSE.terminal), 0.9)
        assert action_faults(wide, rate=0.1).transition.dtype == np.float64
        assert transition_faults(wide, rate=0.1, fault=frozen_transition(wide)).transition.dtype == np.float64


def test_bad_faults_are_named():
    for call, message in [
        (lambda: action_faults(DENSE, rate=1.5), "action_faults: rate must be in"),
        (lambda: action_faults(DENSE, rate=jnp.ones(2)), "scalar"),
        (lambda: action_faults(DENSE, rate=0.1, replacement=3), "not an action in 0..2"),
        (lambda: action_faults(DENSE, rate=0.1, replacement=jnp.ones(4) / 4), "replacement must be"),
        (lambda: transition_faults(DENSE, rate=0.1, fault=jnp.ones(3) / 3), "fault must be"),
        (lambda: transition_faults(DENSE, rate=0.1, fault=GRID.transition), r"has \(S, A\)"),
        (lambda: sensor_faults(DENSE, rate=0.1, noise=jnp.ones(3)), "noise must be"),
        (lambda: probabilistic_robust_value_iteration(DENSE, REWARD, alpha=-0.1), "must be in"),
        (lambda: probabilistic_robust_evaluation(DENSE, jnp.zeros((4, 2)), REWARD, alpha=0.1), "log_policy must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_action_robust_plan_by_hand():
    """One state for ever, actions paying 1 and 0: value = (1 - alpha) / (1 - discount)."""
    mdp = TabularMDP(jnp.ones((1, 2, 1)), jnp.ones(1), jnp.zeros(1, bool), 0.5)
    plan = probabilistic_robust_value_iteration(mdp, jnp.array([[1.0, 0.0]]), alpha=0.3)
    assert_close(plan.value, [1.4], atol=1e-5)
    assert_close(plan.q, [[1.7, 0.7]], atol=1e-5)
    assert_close(plan.policy, [[1.0, 0.0]])
    assert_close(action_adversary(plan.q), [[0.0, 1.0]])


def test_action_robust_plan_is_the_best_of_all_policies_against_all_adversaries():
    alpha, plan = 0.3, probabilistic_robust_value_iteration(DENSE, REWARD, alpha=0.3)
    transition, reward = np.asarray(DENSE.transition, np.float64), np.asarray(REWARD, np.float64)
    rows, going = np.arange(3), np.asarray([0, 1, 2])

    def worth(agent, adversary):  # the last state is terminal
        agent, adversary = np.array(agent), np.array(adversary)
        step = (1 - alpha) * transition[rows, agent] + alpha * transition[rows, adversary]
        earned = (1 - alpha) * reward[rows, agent] + alpha * reward[rows, adversary]
        return np.linalg.solve(np.eye(3) - 0.9 * step[:, going], earned)

    deterministic = list(itertools.product(range(3), repeat=3))
    table = np.array([[worth(agent, adversary) for adversary in deterministic] for agent in deterministic])
    maximin = table.min(axis=1).max(axis=0)
    assert_close(plan.value[:3], maximin, atol=1e-4)
    assert_close(table.max(axis=0).min(axis=0), maximin)  # moving second gains nothing
    agent = tuple(np.argmax(plan.policy[:3], axis=1))
    worst = table[deterministic.index(agent)].min(axis=0)
    assert_close(
        probabilistic_robust_evaluation(DENSE, jnp.log(plan.policy), REWARD, alpha=alpha)[:3], worst, atol=1e-4
    )
    nominal = value_iteration(DENSE, REWARD).policy
    assert np.all(probabilistic_robust_evaluation(DENSE, jnp.log(nominal), REWARD, alpha=alpha) <= plan.value + 1e-4)


def test_action_robust_identities():
    plan_at = jax.jit(lambda alpha: probabilistic_robust_value_iteration(SPARSE, REWARD, alpha=alpha, tolerance=1e-7))
    plans = jax.vmap(plan_at)(jnp.array([0.0, 0.2, 0.5, 1.0]))
    assert_close(plans.value[0], value_iteration(DENSE, REWARD).value)
    assert_close(plans.value[3], -value_iteration(DENSE, -REWARD).value)
    assert np.all(np.diff(plans.value[:, :3], axis=0) < 0.0)
    adversary = action_adversary(plans.q[1])
    fault = {"rate": 0.2, "replacement": adversary}
    same = value_iteration(action_faults(SPARSE, **fault), action_fault_reward(SPARSE, REWARD, **fault), tolerance=1e-7)
    assert_close(same.value, plans.value[1])
    uniform = value_iteration(action_faults(SPARSE, rate=0.2), action_fault_reward(SPARSE, REWARD, rate=0.2))
    assert np.all(uniform.value[:3] > plans.value[1, :3])  # chance is kinder than an adversary
    state_reward = jnp.arange(4.0)
    anywhere = robust_value_iteration(DENSE, state_reward, Contamination(0.2, support=True)).value
    # An adversary that may send it anywhere is stronger than one that can only act.
    assert np.all(anywhere <= probabilistic_robust_value_iteration(DENSE, state_reward, alpha=0.2).value + 1e-5)
    slope = jax.grad(lambda alpha: plan_at(alpha).value[0])(0.2)
    assert_close(slope, (plan_at(0.205).value[0] - plan_at(0.195).value[0]) / 0.01, rtol=1e-2)


def test_sensor_faults_by_hand_and_at_their_ends():
    assert_close(sensor_faults(DENSE, rate=0.4)[0], [0.7, 0.1, 0.1, 0.1])
    assert_close(sensor_faults(DENSE, rate=0.4, noise=jnp.eye(4)[2])[0], [0.6, 0.0, 0.4, 0.0])
    log_policy = jnp.log(value_iteration(DENSE, REWARD).policy)
    assert_close(policy_through_sensor(log_policy, sensor_faults(DENSE, rate=0.0)), log_policy)
    blind = jnp.exp(policy_through_sensor(log_policy, sensor_faults(DENSE, rate=1.0)))
    assert_close(blind, np.broadcast_to(np.exp(log_policy).mean(axis=0), (4, 3)))
    value = lambda rate: expected_return(  # noqa: E731
        SPARSE, policy_through_sensor(log_policy, sensor_faults(SPARSE, rate=rate)), REWARD
    )
    worths, slopes = jax.vmap(jax.value_and_grad(value))(jnp.array([0.0, 0.5, 1.0]))
    assert_close(worths[0], expected_return(DENSE, log_policy, REWARD))
    assert np.all(np.diff(worths) < 0.0)
    assert np.all(np.isfinite(slopes))


@pytest.mark.parametrize("mdp", [DENSE, SPARSE])
def test_belief_update_is_bayes_rule(mdp):
    observation, belief = sensor_faults(mdp, rate=0.3), jnp.array([0.5, 0.2, 0.3, 0.0])
    for action, reading in [(0, 0), (2, 3)]:
        joint = np.asarray(belief) @ np.asarray(DENSE.transition)[:, action] * np.asarray(observation)[:, reading]
        joint[3] = 0.0
        assert_close(belief_update(mdp, observation, belief, action, reading), joint / joint.sum())
    known = belief_update(mdp, sensor_faults(mdp, rate=0.0), belief, 1, 2)
    assert_close(known, np.eye(4)[2])
    impossible = belief_update(mdp, sensor_faults(mdp, rate=0.0), belief, 1, 3)  # terminal, yet asked to act
    predicted = np.asarray(belief @ DENSE.transition[:, 1]) * [1, 1, 1, 0]
    assert_close(impossible, predicted / predicted.sum())


def test_qmdp():
    plan = value_iteration(DENSE, REWARD)
    assert qmdp_action(jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([0.6, 0.4])) == 1
    assert np.array_equal(qmdp_action(plan.q, jnp.eye(4)), np.argmax(plan.q, axis=1))

    @jax.jit
    def returns(rate):
        observation = sensor_faults(DENSE, rate=rate)
        return qmdp_returns(KEY, DENSE, REWARD, observation, plan.q, num=2000, length=80)

    sharp, blurred = returns(0.0), returns(0.6)
    error = lambda x: float(np.std(x) / np.sqrt(x.size))  # noqa: E731
    assert abs(sharp.mean() - DENSE.initial @ plan.value) < 4 * error(sharp)
    seen = policy_through_sensor(jnp.log(plan.policy), sensor_faults(DENSE, rate=0.6))
    memoryless = expected_return(DENSE, seen, REWARD)
    assert blurred.mean() > memoryless - 2 * error(blurred)
    assert blurred.mean() < sharp.mean()


def counting(size=5) -> Environment:
    """Observes the sum of the actions so far, [1]; pays the action."""

    def step(key, state, action):
        after = state + action
        return TimeStep(after[None], after, jnp.asarray(action, float), after >= 100, jnp.zeros((), bool), {})

    reset = lambda key: (jnp.zeros(1), jnp.zeros(()))  # noqa: E731
    return Environment(reset, step, Box(-jnp.inf, jnp.inf, (1,)), Discrete(size), "counting")


def roll(environment, action, steps=200, key=KEY):
    """TimeSteps [T] under one action."""

    def one(state, key):
        step = environment.step(key, state, action)
        return step.state, step._replace(state=())

    return jax.lax.scan(one, environment.reset(key)[1], jax.random.split(key, steps))[1]


def test_faulty_actions():
    @jax.jit
    @jax.vmap
    def run(rate):
        return roll(faulty_actions(counting(), rate=rate, replacement=0), 1)

    steps = run(jnp.array([0.0, 0.3, 0.6, 1.0]))
    assert np.array_equal(steps.reward, 1.0 - steps.info["action_fault"])
    share = steps.info["action_fault"].mean(axis=1)
    assert_close(share, [0.0, 0.3, 0.6, 1.0], atol=4 * np.sqrt(0.25 / 200))
    assert share[0] == 0.0
    assert share[3] == 1.0
    assert np.all(steps.info["action_fault"][2] >= steps.info["action_fault"][1])  # the same keys, nested faults
    drawn = jax.jit(lambda: roll(faulty_actions(counting(), rate=1.0), 1))().reward
    assert_close(np.bincount(np.asarray(drawn, int), minlength=5) / 200, np.full(5, 0.2), atol=0.12)


def test_persistent_faults():
    steps = jax.jit(lambda: roll(faulty_actions(counting(), rate=0.05, replacement=0, persistence=1.0), 1))()
    fault = np.asarray(steps.info["action_fault"])
    assert not fault[0]
    assert fault[-1]
    assert np.all(np.diff(fault.astype(int)) >= 0)
    longer = jax.jit(lambda: roll(faulty_actions(counting(), rate=0.1, replacement=0, persistence=0.5), 1, 4000))()
    fault = np.asarray(longer.info["action_fault"])
    assert_close(fault[1:][fault[:-1]].mean(), 0.1 + 0.9 * 0.5, atol=0.05)
    assert_close(fault.mean(), 0.1 / (1 - 0.45), atol=0.04)  # stationary share: rate / (1 - (1 - rate) persistence)


def test_faulty_sensors_show_something_else_and_leave_the_state_alone():
    readings = {
        "held": last_reading,
        "zero": fixed_reading(0.0),
        "noisy": noisy_reading(0.1),
        "drawn": random_reading(Box(-2.0, -1.0, (1,))),
    }
    runs = jax.jit(
        lambda: {name: roll(faulty_sensors(counting(), rate=0.5, reading=read), 1) for name, read in readings.items()}
    )()
    true = np.arange(1.0, 201.0)
    for name, steps in runs.items():
        fault, shown = np.asarray(steps.info["sensor_fault"]), np.asarray(steps.observation)[:, 0]
        assert np.array_equal(np.asarray(steps.info["true_observation"])[:, 0], true)
        assert np.array_equal(shown[~fault], true[~fault])
        assert 60 < fault.sum() < 140
        before = np.r_[0.0, shown[:-1]]
        wrong = {"held": before, "zero": 0.0 * true, "noisy": shown, "drawn": np.clip(shown, -2.0, -1.0)}[name]
        assert np.array_equal(shown[fault], wrong[fault])
        assert np.all(shown[fault] != true[fault])
    noise = (np.asarray(runs["noisy"].observation)[:, 0] - true)[np.asarray(runs["noisy"].info["sensor_fault"])]
    assert 0.07 < noise.std() < 0.13
    with pytest.raises(ValueError, match="random_reading"):
        noisy_reading(1.0)(KEY, jnp.int32(1), jnp.int32(1))


def test_faulty_rewards_and_delays():
    steps = jax.jit(lambda: roll(faulty_rewards(counting(), rate=0.5, reading=fixed_reading(-7.0)), 2))()
    assert np.array_equal(steps.reward, np.where(steps.info["reward_fault"], -7.0, 2.0))
    assert np.all(steps.info["true_reward"] == 2.0)
    late = jax.jit(lambda: roll(delayed_actions(counting(), 3, first=4), 1, 6))()
    assert np.array_equal(late.reward, [4, 4, 4, 1, 1, 1])
    with pytest.raises(ValueError, match="at least 1"):
        delayed_actions(counting(), 0)
    with pytest.raises(ValueError, match=r"not in 0\.\.4"):
        delayed_actions(counting(), 1, first=9)


def test_wrapped_environments_keep_the_protocol():
    inner = cartpole()
    wrapped = faulty_actions(inner, rate=0.1)
    wrapped = faulty_sensors(wrapped, rate=0.2, reading=noisy_reading(0.01), persistence=0.3)
    wrapped = delayed_actions(faulty_rewards(wrapped, rate=0.1, reading=last_reading), 2)
    check_environment(wrapped)
    step = jax.jit(wrapped.step)(KEY, wrapped.reset(KEY)[1], 1)
    assert {"action_fault", "sensor_fault", "reward_fault"} <= set(step.info)
    with pytest.raises(ValueError, match=r"is not in 0\.\.1"):
        faulty_actions(inner, rate=0.5, replacement=2)
    with pytest.raises(ValueError, match=r"is not in 0\.\.1"):
        faulty_actions(inner, rate=1.0).step(KEY, faulty_actions(inner, rate=1.0).reset(KEY)[1], 5)
    with pytest.raises(ValueError, match="faulty_sensors: rate"):
        faulty_sensors(inner, rate=2.0)
    silent = jax.jit(faulty_actions(inner, rate=1.0).step)(KEY, faulty_actions(inner, rate=1.0).reset(KEY)[1], 5)
    assert np.isnan(silent.reward)
    assert not silent.info["action_fault"]
    np.testing.assert_allclose(  # without faults it is the same world, seen through the same keys
        roll(faulty_actions(inner, rate=0.0), 1, 5).observation, roll(inner, 1, 5).observation, rtol=1e-5
    )
