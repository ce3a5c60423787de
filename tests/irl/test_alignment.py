"""Value divergence by hand and in its limits; constrained minimisation against KKT points and a linear program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy.optimize import linprog

import jaxalign
from jaxalign import Network
from jaxalign.irl.alignment import (
    align_values,
    constrained,
    occupancy_distance,
    regret,
    return_range,
    value_divergence,
)
from jaxalign.irl.reward_distance import epic_distance
from jaxalign.mdp import (
    TabularMDP,
    dense_transition,
    expected_return,
    gridworld,
    occupancy_measure,
    random_mdp,
    soft_value_iteration,
)

S, A, G = 4, 3, 0.8
MDP = random_mdp(jax.random.key(0), S, A, discount=G)
LEFT_OR_RIGHT = TabularMDP(  # one choice, then state 1 or 2 for ever
    np.array([[[0, 1, 0], [0, 0, 1]], [[0, 1, 0]] * 2, [[0, 0, 1]] * 2]), [1.0, 0, 0], [False] * 3, 0.5
)


def reward(seed):
    return np.random.default_rng(seed).normal(size=(S, A))


def log(policy):
    with np.errstate(divide="ignore"):
        return jnp.log(jnp.asarray(policy))


def test_measures_by_hand():
    left, right = (log([[p, 1 - p], [1.0, 0.0], [1.0, 0.0]]) for p in (1.0, 0.0))
    # Both visit state 0 once of two discounted steps; all else differs, and the action there does as well.
    np.testing.assert_allclose(occupancy_distance(LEFT_OR_RIGHT, left, right), 1.0)
    half = log([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(occupancy_distance(LEFT_OR_RIGHT, left, half), 0.5)
    pays = jnp.array([0.0, 1.0, 4.0])  # left is worth 1, right 4
    np.testing.assert_allclose(return_range(LEFT_OR_RIGHT, pays), [1.0, 4.0], rtol=1e-5)
    found = [regret(LEFT_OR_RIGHT, pays, policy) for policy in (left, half, right)]
    np.testing.assert_allclose(found, [1.0, 0.5, 0.0], atol=1e-5)
    # The human likes right by 3 (a log-odds of 3 at temperature 1), the AI left by 1.
    divergence = value_divergence(LEFT_OR_RIGHT, pays, jnp.array([0.0, 2.0, 1.0]), temperature=1.0)
    p, q = 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(1))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(divergence.policy_divergence, kl / 2, rtol=1e-4)  # half of the visits are to state 0
    np.testing.assert_allclose(divergence.occupancy_distance, p - q, rtol=1e-4)
    np.testing.assert_allclose(divergence.regret, 1 - q, rtol=1e-4)
    np.testing.assert_allclose(divergence.reward_distance, 1.0, rtol=1e-5)


def test_equal_values_diverge_by_nothing_and_opposite_ones_by_all():
    r = reward(0)
    potential = np.array([1.0, -2.0, 0.5, 3.0])
    next_potential = np.asarray(dense_transition(MDP.transition)) @ potential
    warm = soft_value_iteration(MDP, r, temperature=0.05).log_policy
    for same in (r, r + 5.0, r + G * next_potential - potential[:, None]):
        found = value_divergence(MDP, r, same, temperature=0.05)
        np.testing.assert_allclose(found[:3], [0.0] * 3, atol=1e-4)
        # What is left is what any policy at this temperature loses.
        np.testing.assert_allclose(found.regret, regret(MDP, r, warm), rtol=1e-2)
    assert 0.0 < regret(MDP, r, warm) < 0.01
    opposite = value_divergence(MDP, r, -r, temperature=0.01)
    np.testing.assert_allclose([opposite.reward_distance, opposite.regret], 1.0, rtol=1e-3)
    assert opposite.occupancy_distance > 0.9
    assert value_divergence(MDP, r, -r, temperature=0.5, reward_distance=epic_distance).reward_distance > 0.99


def test_regret_of_indifference_is_not_a_number_but_has_no_nan_gradient():
    policy = jax.nn.log_softmax(jnp.asarray(reward(0)))
    assert np.isnan(regret(MDP, jnp.full(S, 2.0), policy))
    gradient = jax.grad(lambda x: regret(MDP, jnp.zeros(S), jax.nn.log_softmax(x)))(policy)
    assert jnp.isfinite(gradient).all()


def test_jit_vmap_and_gradients():
    human, many = reward(0), np.stack([reward(k) for k in (1, 2, 3)])
    measure = lambda ai: jnp.stack(value_divergence(MDP, human, ai, temperature=0.5))  # noqa: E731
    together = jax.jit(jax.vmap(measure))(many)
    np.testing.assert_allclose(together, [measure(ai) for ai in many], rtol=1e-4, atol=1e-6)
    with jax.enable_x64(True):
        wide = random_mdp(jax.random.key(0), S, A, discount=G)
        exact = jax.jit(lambda ai: jnp.stack(value_divergence(wide, human, ai, temperature=0.5)))
        assert exact(many[0]).dtype == jnp.float64
        check_grads(exact, (many[0],), order=1, modes=["rev"], rtol=1e-2, atol=1e-4)  # to the planner's tolerance


X0, NORMAL = np.array([2.0, 1.0]), np.array([[1.0, 1.0], [-1.0, 0.0]])


def quadratic(**options):
    """min |x - x0|^2 / 2 s.t. x_0 + x_1 <= 1 and -x_0 <= 0: x = (1, 0), multipliers (1, 0)."""
    network = Network(lambda key: jax.random.normal(key, (2,)), lambda x: x)

    def objective(x, batch, key):
        return 0.5 * jnp.sum((x - X0) ** 2), {"first": x[0]}

    def constraints(x, batch, key):
        return jnp.asarray(NORMAL, x.dtype) @ x - jnp.array([1.0, 0.0])

    options = {"dual_learning_rate": 0.1, "num_constraints": 2, **options}
    return constrained(network, objective, constraints, optax.sgd(0.1), **options)


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_quadratic_reaches_its_kkt_point(penalty):
    run = jax.jit(lambda key: jaxalign.train(quadratic(penalty=penalty), key, None, length=600))
    state, metrics = run(jax.random.key(0))
    np.testing.assert_allclose(state.params["primal"], [1.0, 0.0], atol=1e-4)
    np.testing.assert_allclose(state.params["multipliers"], [1.0, 0.0], atol=1e-4)
    last = jax.tree.map(lambda x: x[-1], metrics)
    np.testing.assert_allclose(last["constraints"], [0.0, -1.0], atol=1e-4)
    np.testing.assert_allclose([last["objective"], last["loss"], last["first"]], [1.0, 1.0, 1.0], atol=1e-3)
    assert (metrics["multipliers"] >= 0).all()


def test_one_step_by_hand():
    algorithm = quadratic(dual_learning_rate=0.5, penalty=3.0)
    state = algorithm.init(jax.random.key(0))
    params = {"primal": jnp.array([1.0, 2.0]), "multipliers": jnp.array([0.25, 0.25])}
    state, metrics = algorithm.step(state.replace(params=params), None)
    # c = (2, -1); prices max(0, 0.25 + 3 c) = (6.25, 0); slope (x - x0) + 6.25 (1, 1)
    np.testing.assert_allclose(state.params["primal"], [1.0 - 0.525, 2.0 - 0.725], rtol=1e-6)
    np.testing.assert_allclose(state.params["multipliers"], [1.25, 0.0])
    np.testing.assert_allclose(metrics["loss"], 1.0 + 12.5)


def test_hyperparameters_are_swept():
    def final(hyper, key):
        state, _ = jaxalign.train(quadratic(**hyper), key, None, length=600)
        return state.params["multipliers"]

    hypers = {"dual_learning_rate": jnp.array([0.05, 0.1]), "penalty": jnp.array([0.0, 1.0])}
    found = jaxalign.sweep(final, hypers, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(found, np.broadcast_to([1.0, 0.0], (2, 2, 2)), atol=1e-2)


def linear_program(human, cost, budget):
    """The best return of any policy within the budget and the price of the budget, over occupancies d >= 0."""
    p, start = np.asarray(dense_transition(MDP.transition), float), np.asarray(MDP.initial, float)
    flow = np.repeat(np.eye(S), A, axis=1) - G * p.reshape(S * A, S).T
    best = linprog(-human.ravel(), A_ub=[cost.ravel()], b_ub=[budget], A_eq=flow, b_eq=start, method="highs")
    return -best.fun, -best.ineqlin.marginals[0]


REWARD_TABLE = Network(lambda key: 0.01 * jax.random.normal(key, (S, A)), lambda params, features: params)


def aligned(human, cost, budget, **options):
    options = {"temperature": 1.0, "dual_learning_rate": 0.02, "penalty": 0.5, **options}
    return align_values(MDP, REWARD_TABLE, human, optax.adam(0.05), costs=cost[None], budgets=[budget], **options)


def test_constrained_alignment_reaches_the_linear_program():
    """With a reward table any policy can be had: the optimum is the constrained MDP's, the multiplier its dual."""
    human, cost = reward(0), np.abs(reward(7))
    worst, best = (float(x) for x in return_range(MDP, human))
    greedy = soft_value_iteration(MDP, human, temperature=0.01).log_policy
    frugal = soft_value_iteration(MDP, -cost, temperature=0.01).log_policy
    most, least = (float(expected_return(MDP, policy, cost)) for policy in (greedy, frugal))
    budget = 0.5 * (most + least)
    optimum, price = linear_program(human, cost, budget)
    assert price > 0.05
    assert optimum < best - 0.1
    run = jax.jit(lambda key: jaxalign.train(aligned(human, cost, budget), key, None, length=1500))
    state, metrics = run(jax.random.key(0))
    last = jax.tree.map(lambda x: float(x[-200:].mean()), metrics)
    earned = best - last["regret"] * (best - worst)
    np.testing.assert_allclose(earned, optimum, atol=0.02 * (best - worst))
    np.testing.assert_allclose(last["constraints"], 0.0, atol=0.02 * budget)
    np.testing.assert_allclose(last["multipliers"] * (best - worst), price, rtol=0.1)
    # The reported cost is that of the policy of the reward learned.
    policy = soft_value_iteration(MDP, state.params["primal"]).log_policy
    spent = float(jnp.sum(occupancy_measure(MDP, policy) * cost))
    np.testing.assert_allclose(spent - budget, float(metrics["constraints"][-1, 0]), atol=0.05)


def test_a_budget_that_does_not_bind_costs_nothing():
    human, cost = reward(0), np.abs(reward(7))
    algorithm = aligned(human, cost, 100.0, divergence=lambda d: d.policy_divergence + d.reward_distance)
    state, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, None, length=400))(jax.random.key(1))
    assert float(state.params["multipliers"][0]) == 0.0
    assert metrics["policy_divergence"][-1] < 0.01 * metrics["policy_divergence"][0]
    assert metrics["reward_distance"][-1] < 0.2 * metrics["reward_distance"][0]
    np.testing.assert_allclose(metrics["loss"], metrics["objective"])


def test_features_and_terminal_states():
    mdp = gridworld(2, 3, goal=5, slip=0.1)
    network = Network(lambda key: jnp.zeros(2), lambda params, features: features @ params)
    features = jnp.stack([jnp.arange(6.0), jnp.ones(6)], axis=1)
    costs = jnp.zeros((2, 6, 5)).at[0, 2].set(1.0)
    options = {"costs": costs, "budgets": [0.5, 0.0], "temperature": 0.5, "dual_learning_rate": 0.1}
    algorithm = align_values(mdp, network, -jnp.ones(6), optax.sgd(0.1), features=features, **options)
    state, metrics = jax.jit(algorithm.step)(algorithm.init(jax.random.key(0)), None)
    assert state.params["primal"].shape == (2,)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((metrics, state.params)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costs": np.ones((S, A))}, r"costs must be \[C, 4, 3\] and budgets \[C\]"),
        ({"budgets": [1.0, 2.0]}, r"got \(1, 4, 3\) and \(2,\)"),
        ({"human_reward": np.ones(S)}, "every policy earns the same"),
        ({"human_reward": np.ones(S + 1)}, "reward must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    options = {"human_reward": reward(0), "costs": np.ones((1, S, A)), "budgets": [1.0], "temperature": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        align_values(MDP, REWARD_TABLE, optimizer=optax.sgd(0.1), dual_learning_rate=0.1, **options)


def test_a_wrong_number_of_constraints_is_named():
    algorithm = quadratic(num_constraints=3)
    with pytest.raises(ValueError, match=r"constraints must return \(3,\), got \(2,\)"):
        algorithm.step(algorithm.init(jax.random.key(0)), None)
