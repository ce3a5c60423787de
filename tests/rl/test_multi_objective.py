"""Fronts and volumes by hand and by inclusion and exclusion; deep sea treasure; constrained planning against an LP."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linprog

import jaxalign
from jaxalign import Network
from jaxalign.irl.alignment import constrained
from jaxalign.mdp import (
    arrival_reward,
    dense_transition,
    expected_return,
    gridworld,
    occupancy_measure,
    random_mdp,
    value_iteration,
)
from jaxalign.rl.multi_objective import (
    chebyshev_scalarization,
    constrained_value_iteration,
    convex_coverage_set,
    hypervolume,
    lagrangian_incentive,
    lexicographic_best,
    linear_scalarization,
    pareto_front,
)
from jaxalign.rl.rollout import Steps

# Vamplew et al. (2011): treasure and depth of each column.
TREASURE = np.array([1, 2, 3, 5, 8, 16, 24, 50, 74, 124], float)
DEPTH = np.array([1, 2, 3, 4, 4, 4, 7, 7, 9, 10])
TIME = -np.array([1, 3, 5, 7, 8, 9, 13, 14, 17, 19], float)
MDP = random_mdp(jax.random.key(0), 5, 3, discount=0.8)
REWARD, COST = jax.random.normal(jax.random.key(1), (5, 3)), jax.random.uniform(jax.random.key(2), (5, 3))
plan_within = jax.jit(lambda budget: constrained_value_iteration(MDP, REWARD, COST, budget=budget))


@pytest.fixture(scope="module")
def sea():
    """(mdp, rewards [2, S, A]): down to a treasure or on to a deeper one; -1 a step."""
    rows, columns = np.indices((11, 10))
    mdp = gridworld(11, 10, walls=rows > DEPTH[columns], goal=(1, 0), start=(0, 0), stay=False, discount=1.0)
    bottom = (rows == DEPTH[columns]).reshape(-1)
    mdp = mdp.replace(terminal=jnp.asarray(bottom))
    found = arrival_reward(mdp, jnp.asarray(bottom * TREASURE[columns].reshape(-1), jnp.float32))
    return mdp, jnp.stack([found, jnp.where(mdp.terminal[:, None], 0.0, -jnp.ones_like(found))])


def test_scalarisations_by_hand():
    returns = np.array([[1.0, 4.0], [3.0, 2.0]])
    np.testing.assert_allclose(linear_scalarization(returns, [0.5, 2.0]), [8.5, 5.5])
    np.testing.assert_allclose(chebyshev_scalarization(returns, [1.0, 0.5], [3.0, 5.0]), [-2.0, -1.5])
    assert chebyshev_scalarization([3.0, 5.0], [1.0, 1.0], [3.0, 5.0]) == 0.0
    returns = np.array([[9.0, 0.0, 1.0], [5.0, 7.0, 2.0], [6.0, 7.0, 1.0], [4.0, 9.0, 9.0]])
    assert lexicographic_best(returns, [np.inf] * 3) == 0
    assert lexicographic_best(returns, [5.0, np.inf, np.inf]) == 1  # 5 is enough of the first; then 7; then 2
    assert lexicographic_best(returns, [4.0, np.inf, np.inf]) == 3


def test_pareto_front_by_hand():
    returns = np.array([[1.0, 5.0], [2.0, 4.0], [2.0, 3.0], [2.0, 4.0], [0.0, 5.0], [5.0, 0.0]])
    np.testing.assert_array_equal(pareto_front(returns), [True, True, False, True, False, True])
    np.testing.assert_array_equal(pareto_front(returns[:, :1]), [False] * 5 + [True])


@pytest.mark.parametrize("objectives", [1, 2, 4])
def test_hypervolume_by_inclusion_and_exclusion(objectives):
    rng = np.random.default_rng(objectives)
    points, reference = rng.normal(size=(6, objectives)), np.full(objectives, -0.5)
    above = np.maximum(points - reference, 0.0)
    subsets = (list(s) for n in range(1, 7) for s in itertools.combinations(range(6), n))
    expected = sum((-1) ** (len(s) + 1) * np.prod(above[s].min(axis=0)) for s in subsets)
    with jax.enable_x64(True):
        volume = jax.jit(hypervolume)
        np.testing.assert_allclose(volume(points, reference), expected, rtol=1e-12)
        # What is not on the front adds nothing.
        front = np.asarray(pareto_front(points))
        np.testing.assert_allclose(volume(np.where(front[:, None], points, reference), reference), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="hypervolume: needs returns"):
        hypervolume(points, 0.0)


def test_deep_sea_treasure(sea):
    mdp, rewards = sea
    # Weights for the treasure and the time, then for the shortest way to each treasure, an objective of its own.
    share = np.linspace(0.01, 0.99, 15)
    weights = np.zeros((25, 12), np.float32)
    weights[:15, :2], weights[15:, 1], weights[15:, 2:] = np.stack([share, 1.0 - share], -1), 1.0, 1000.0 * np.eye(10)
    each = (rewards[:1] == jnp.asarray(TREASURE, jnp.float32)[:, None, None]).astype(jnp.float32)
    returns = jax.jit(convex_coverage_set)(mdp, jnp.concatenate([rewards, each]), weights).returns[:, :2]
    covered, front = np.asarray(returns[:15]), np.asarray(returns[15:])
    np.testing.assert_allclose(front, np.stack([TREASURE, TIME], -1), rtol=1e-5)
    assert np.asarray(pareto_front(front)).all()
    np.testing.assert_allclose(hypervolume(front, [0.0, -25.0]), 1155.0, rtol=1e-6)  # as in the literature
    # Linear weights see the ends only: the front is concave between them.
    np.testing.assert_allclose(np.unique(covered.round(3), axis=0), front[[0, -1]], rtol=1e-5)
    # Chebyshev weights find all of it.
    reference = front.max(axis=0) + 1.0
    weights = 1.0 / (reference - front)
    scores = jax.vmap(lambda weight: chebyshev_scalarization(front, weight, reference))(weights)
    np.testing.assert_array_equal(scores.argmax(axis=-1), np.arange(10))


def test_coverage_set_is_best_for_its_weights():
    rewards = jax.random.normal(jax.random.key(3), (3, 5, 3))
    weights = jax.random.dirichlet(jax.random.key(4), jnp.ones(3), (6,))

    found = np.asarray(jax.jit(convex_coverage_set)(MDP, rewards, weights).returns)
    # Every deterministic policy's returns, by linear solves.
    transition, each = (np.asarray(x, float) for x in (dense_transition(MDP.transition), rewards))
    choices = np.array(list(itertools.product(range(3), repeat=5)))
    between, paid = transition[np.arange(5), choices], each[:, np.arange(5), choices]  # [243, S, S], [M, 243, S]
    visits = np.linalg.solve(np.eye(5) - 0.8 * between.transpose(0, 2, 1), np.asarray(MDP.initial, float)[:, None])
    returns = np.einsum("ps,mps->pm", visits[..., 0], paid)
    best = np.argmax(returns @ np.asarray(weights, float).T, axis=0)
    np.testing.assert_allclose(found, returns[best], rtol=1e-4, atol=1e-5)


def by_linear_program(budget):
    """The best return within the budget, over occupancies d >= 0 with sum_a d[s, a] = initial + discount P^T d."""
    transition, g = np.asarray(dense_transition(MDP.transition), float), float(MDP.discount)
    flow = np.einsum("sz,a->zsa", np.eye(5), np.ones(3)) - g * transition.transpose(2, 0, 1)
    return linprog(
        -np.asarray(REWARD, float).ravel(),
        A_ub=np.asarray(COST, float).reshape(1, -1),
        b_ub=[budget],
        A_eq=flow.reshape(5, -1),
        b_eq=np.asarray(MDP.initial, float),
    )


@pytest.mark.parametrize("budget", [1.2, 1.5, 2.0, 10.0])
def test_constrained_value_iteration_against_a_linear_program(budget):
    expected, found = by_linear_program(budget), plan_within(budget)
    assert expected.success
    np.testing.assert_allclose(found.value, -expected.fun, rtol=2e-4)
    assert found.cost <= budget + 1e-3
    np.testing.assert_allclose(found.multiplier, -expected.ineqlin.marginals[0], rtol=1e-2, atol=1e-4)
    # The policy it names does it.
    log_policy = jnp.log(found.policy)
    np.testing.assert_allclose(found.policy.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(expected_return(MDP, log_policy, REWARD), found.value, rtol=1e-3)
    np.testing.assert_allclose(expected_return(MDP, log_policy, COST), found.cost, rtol=1e-3)


def test_no_policy_keeps_within_an_impossible_budget():
    assert by_linear_program(0.01).status == 2
    assert np.isnan(plan_within(0.01).value)
    together = jax.vmap(plan_within)(jnp.array([0.01, 1.5]))
    np.testing.assert_allclose(together.value, [np.nan, plan_within(1.5).value], rtol=1e-5)


def test_constrained_by_gradients_comes_to_the_same():
    """`irl.constrained` on a softmax policy, whose multiplier is the linear program's dual."""
    budget = 1.5

    def objective(logits, batch, key):
        return -expected_return(MDP, jax.nn.log_softmax(logits), REWARD), {}

    def over(logits, batch, key):
        return (expected_return(MDP, jax.nn.log_softmax(logits), COST) - budget)[None]

    algorithm = constrained(
        Network(lambda key: jnp.zeros((5, 3)), lambda x: x), objective, over, optax.sgd(0.3), num_constraints=1,
        dual_learning_rate=0.1, penalty=3.0,
    )  # fmt: skip
    state, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, None, length=1000))(jax.random.key(0))
    np.testing.assert_allclose(-metrics["objective"][-1], plan_within(budget).value, rtol=1e-2)
    np.testing.assert_allclose(state.params["multipliers"][0], plan_within(budget).multiplier, rtol=0.02)


def test_lagrangian_incentive_is_projected_ascent_on_the_mean_cost():
    costs, rewards, flags = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.ones((2, 2)), jnp.zeros((2, 2), bool)
    steps = Steps(rewards, flags, rewards, rewards, flags, flags, rewards, {"cost": costs})
    incentive = lagrangian_incentive(0.5, learning_rate=0.2, initial=2.0)
    apply = jax.jit(incentive.apply)
    state, paid, metrics = apply(incentive.init(jax.random.key(0)), steps, jax.random.key(1))
    np.testing.assert_allclose(paid, [[-1.0, 1.0], [1.0, -5.0]])
    np.testing.assert_allclose([state["multiplier"], metrics["multiplier"], metrics["mean_cost"]], [2.1, 2.0, 1.0])
    cheap = steps._replace(info={"cost": jnp.zeros((2, 2))})
    for _ in range(25):
        state, paid, _ = apply(state, cheap, jax.random.key(1))
    assert state["multiplier"] == 0.0
    np.testing.assert_allclose(paid, rewards)
    with pytest.raises(KeyError, match="no 'harm' in the environment's info"):
        lagrangian_incentive(0.5, learning_rate=0.2, cost="harm").apply(state, steps, jax.random.key(1))


def test_lagrangian_incentive_settles_at_the_price_of_the_constraint():
    """A learner that plans for what it is paid; its multiplier oscillates about the dual of the linear program."""
    budget, g = 1.5, float(MDP.discount)
    incentive = lagrangian_incentive(budget * (1 - g), learning_rate=0.5)

    def round_(state, _):
        plan = value_iteration(MDP, REWARD - state["multiplier"] * COST)
        visits = occupancy_measure(MDP, jnp.log(plan.policy))
        mean = jnp.full((1, 1), (1 - g) * jnp.sum(visits * COST))  # what a long rollout costs per (discounted) step
        flags = jnp.zeros((1, 1), bool)
        steps = Steps(mean, flags, mean, mean, flags, flags, mean, {"cost": mean})
        state, _, metrics = incentive.apply(state, steps, jax.random.key(0))
        return state, (metrics["multiplier"], jnp.sum(visits * COST))

    _, (multipliers, costs) = jax.jit(lambda s: jax.lax.scan(round_, s, None, length=400))(incentive.init(None))
    np.testing.assert_allclose(multipliers[200:].mean(), plan_within(budget).multiplier, rtol=0.1)
    np.testing.assert_allclose(costs[200:].mean(), budget, rtol=0.05)
