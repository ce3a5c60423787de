"""Maximum causal entropy IRL: losses by hand and in NumPy, gradients as feature gaps, and rewards recovered."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxalign
from jaxalign import Network
from jaxalign.irl import (
    Trajectories,
    causal_entropy_dual,
    causal_entropy_nll,
    expected_value_difference,
    linear_reward,
    max_causal_entropy_irl,
    policy_divergence,
    population_causal_entropy_nll,
    sample_trajectories,
    solve_causal_entropy_dual,
    timed_visit_counts,
    visit_counts,
)
from jaxalign.mdp import TabularMDP, gridworld, occupancy_measure, random_mdp, soft_value_iteration, value_iteration
from jaxalign.networks import MLP

STATES, ACTIONS, FEATURES, HORIZON = 9, 5, 3, 6


@pytest.fixture(scope="module")
def world():
    """A 3 x 3 grid, features, a linear reward of them, its soft-optimal policy and occupancy."""
    mdp = gridworld(3, 3, slip=0.2, discount=0.8)
    features = jax.random.normal(jax.random.key(0), (STATES, FEATURES))
    weights = jnp.array([1.0, -0.5, 0.7])
    log_policy = soft_value_iteration(mdp, features @ weights).log_policy
    return mdp, features, weights, log_policy, occupancy_measure(mdp, log_policy)


@pytest.fixture(scope="module")
def demonstrations(world):
    mdp, _, _, log_policy, _ = world
    return sample_trajectories(jax.random.key(1), mdp, log_policy, num=300, length=HORIZON)


def numpy_soft_plan(transition, reward, discount, temperature, horizon):
    """Log-policies [H, S, A] by plain backward induction in float64, reward [S, A]."""
    value, plans = np.zeros(len(reward)), []
    for _ in range(horizon):
        q = reward + discount * transition @ value
        top = q.max(axis=1)
        value = top + temperature * np.log(np.exp((q - top[:, None]) / temperature).sum(axis=1))
        plans.append((q - value[:, None]) / temperature)
    return np.stack(plans[::-1])


def test_nll_by_hand():
    """One state, two actions, discount 0: log-probabilities are a log-softmax of the rewards."""
    mdp = TabularMDP(jnp.ones((1, 2, 1)), jnp.ones(1), jnp.zeros(1, bool), 0.0)
    demonstrations = Trajectories(
        jnp.zeros((2, 3), int), jnp.array([[0, 0, 1], [1, 0, 0]]), jnp.array([[True] * 3, [True, False, False]])
    )
    reward = jnp.array([[np.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    by_hand = (2 * np.log(4 / 3) + np.log(4.0) + np.log(4.0)) / 2
    np.testing.assert_allclose(causal_entropy_nll(reward, mdp, demonstrations), by_hand, rtol=1e-6)
    np.testing.assert_allclose(
        causal_entropy_nll(2.0 * reward, mdp, demonstrations, temperature=2.0), by_hand, rtol=1e-6
    )


def test_nll_against_numpy(world, demonstrations):
    mdp, features, weights, _, _ = world
    transition = np.asarray(jaxalign.mdp.dense_transition(mdp.transition), np.float64)
    reward = np.repeat(np.asarray(features @ weights, np.float64)[:, None], ACTIONS, axis=1)
    states, actions, mask = (np.asarray(x) for x in demonstrations)
    for horizon, steps in ((None, 400), (HORIZON, HORIZON)):
        plans = numpy_soft_plan(transition, reward, 0.8, 0.7, steps)
        total = 0.0
        for n in range(len(states)):
            for t in range(states.shape[1]):
                total -= mask[n, t] * plans[0 if horizon is None else t][states[n, t], actions[n, t]]
        nll = causal_entropy_nll(features @ weights, mdp, demonstrations, temperature=0.7, horizon=horizon)
        np.testing.assert_allclose(nll, total / len(states), rtol=2e-5)


def test_the_population_gradient_is_the_feature_gap(world):
    mdp, features, _, _, occupancy = world
    for temperature in (1.0, 0.5):
        weights = jnp.array([0.3, 0.2, -0.1])
        plan = soft_value_iteration(mdp, features @ weights, temperature=temperature)
        gap = features.T @ (occupancy_measure(mdp, plan.log_policy) - occupancy).sum(axis=1)
        nll = jax.grad(
            lambda w, t: population_causal_entropy_nll(features @ w, mdp, occupancy, temperature=t)
        )(weights, temperature)
        dual = jax.grad(lambda w, t: causal_entropy_dual(features @ w, mdp, occupancy, temperature=t))(
            weights, temperature
        )
        np.testing.assert_allclose(nll * temperature, gap, atol=3e-5)
        np.testing.assert_allclose(dual, gap, atol=3e-5)


def test_the_dual_is_the_population_nll(world):
    mdp, features, weights, _, occupancy = world
    for temperature in (1.0, 0.3):
        dual = causal_entropy_dual(features @ weights, mdp, occupancy, temperature=temperature)
        nll = population_causal_entropy_nll(features @ weights, mdp, occupancy, temperature=temperature)
        np.testing.assert_allclose(dual, temperature * nll, rtol=1e-5)


def test_the_finite_horizon_gradient_is_the_feature_gap(world):
    mdp, features, weights, _, _ = world
    mdp = mdp.replace(discount=1.0)
    demonstrator = soft_value_iteration(mdp, features @ weights, horizon=HORIZON).log_policy
    target = occupancy_measure(mdp, demonstrator)
    start = jnp.array([0.1, 0.4, 0.0])
    current = occupancy_measure(mdp, soft_value_iteration(mdp, features @ start, horizon=HORIZON).log_policy)
    gradient = jax.grad(lambda w: causal_entropy_dual(features @ w, mdp, target, horizon=HORIZON))(start)
    np.testing.assert_allclose(gradient, features.T @ (current - target).sum(axis=1), atol=1e-5)


def test_steps_in_terminal_states_and_padding_do_not_count():
    mdp = gridworld(1, 3, goal=2)
    demonstrations = Trajectories(
        jnp.array([[0, 1, 2, 2], [1, 2, 0, 0]]),
        jnp.array([[1, 1, 0, 4], [1, 3, 3, 3]]),
        jnp.array([[True] * 4, [True, True, False, False]]),
    )
    shorter = Trajectories(
        jnp.array([[0, 1], [1, 0]]), jnp.array([[1, 1], [1, 0]]), jnp.array([[True, True], [True, False]])
    )
    reward = jnp.array([0.1, -0.2, 5.0])
    np.testing.assert_allclose(
        causal_entropy_nll(reward, mdp, demonstrations), causal_entropy_nll(reward, mdp, shorter), rtol=1e-6
    )


def test_counts_by_time_sum_to_counts(world, demonstrations):
    mdp = world[0]
    timed = timed_visit_counts(mdp, demonstrations, horizon=HORIZON + 2)
    np.testing.assert_allclose(timed.sum(axis=0), visit_counts(mdp, demonstrations), rtol=1e-5)
    np.testing.assert_array_equal(timed[HORIZON:], 0.0)
    np.testing.assert_allclose(timed[:HORIZON].sum(axis=(1, 2)), 1.0, rtol=1e-5)


def test_lbfgs_finds_the_weights_that_match_the_features(world):
    mdp, features, weights, _, occupancy = world
    solve = jax.jit(lambda d, t: solve_causal_entropy_dual(mdp, features, d, temperature=t, tolerance=2e-5))
    found = solve(occupancy, 1.0)
    assert float(found.gradient_norm) <= 2e-5
    assert 1 <= int(found.iterations) < 100
    np.testing.assert_allclose(found.weights, weights, atol=2e-3)
    # The temperature only scales what explains the same behaviour.
    colder = solve(occupancy, 0.5)
    np.testing.assert_allclose(colder.weights, 0.5 * weights, atol=2e-3)


@pytest.mark.slow
def test_lbfgs_runs_under_vmap_and_l2_shrinks(world):
    mdp, features, _, _, occupancy = world
    norms = jax.jit(
        jax.vmap(lambda l2: jnp.linalg.norm(solve_causal_entropy_dual(mdp, features, occupancy, l2=l2).weights))
    )(jnp.array([0.0, 1.0, 100.0]))
    assert norms[0] > norms[1] > norms[2] > 0.0


def test_the_algorithm_recovers_the_behaviour(world):
    """On the exact occupancy: the policy, the value, and, as the features are identified, the weights."""
    mdp, features, weights, log_policy, occupancy = world
    algorithm = max_causal_entropy_irl(mdp, linear_reward(FEATURES), optax.adam(0.1), occupancy, features=features)
    state, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, None, length=200))(jax.random.key(0))
    np.testing.assert_allclose(state.params["weights"], weights, atol=1e-2)
    learned = features @ state.params["weights"]
    assert float(policy_divergence(mdp, log_policy, soft_value_iteration(mdp, learned).log_policy)) < 1e-4
    greedy = jnp.log(value_iteration(mdp, learned).policy)
    assert abs(float(expected_value_difference(mdp, features @ weights, greedy))) < 1e-4
    assert float(metrics["loss"][0]) > float(metrics["loss"][-1])
    entropy = -jnp.sum(occupancy * log_policy) / jnp.sum(occupancy)
    np.testing.assert_allclose(metrics["loss"][-1], entropy, rtol=1e-4)


def test_demonstrations_as_batches_equal_those_given_at_first(world, demonstrations):
    mdp, features, _, _, _ = world
    network, optimizer = linear_reward(FEATURES), optax.sgd(0.1)
    given = max_causal_entropy_irl(mdp, network, optimizer, demonstrations, features=features)
    batched = max_causal_entropy_irl(mdp, network, optimizer, None, features=features)
    state = given.init(jax.random.key(0))
    one, _ = given.step(state, None)
    other, _ = batched.step(state, visit_counts(mdp, demonstrations))
    np.testing.assert_array_equal(one.params["weights"], other.params["weights"])
    with pytest.raises(ValueError, match="trajectories"):
        batched.step(state, None)


@pytest.mark.parametrize("horizon", [None, HORIZON])
def test_a_neural_reward_explains_the_demonstrations_as_well_as_their_own(world, demonstrations, horizon):
    mdp, features, weights, _, _ = world
    network = Network.from_linen(MLP((16, 1)), features)
    algorithm = max_causal_entropy_irl(
        mdp, network, optax.adam(0.03), demonstrations, features=features, horizon=horizon
    )
    _, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, None, length=150))(jax.random.key(0))
    own = causal_entropy_nll(features @ weights, mdp, demonstrations, horizon=horizon)
    per_action = own / visit_counts(mdp, demonstrations).sum()
    assert float(metrics["loss"][-1]) < float(per_action) + 0.01


def test_float64_and_vmap(world, demonstrations):
    with jax.enable_x64(True):
        mdp = random_mdp(jax.random.key(0), 5, 2)
        reward = jnp.arange(5.0) / 5.0
        occupancy = occupancy_measure(mdp, soft_value_iteration(mdp, reward).log_policy)
        nll = population_causal_entropy_nll(reward, mdp, occupancy)
        assert nll.dtype == jnp.float64
        step = 1e-6 * jnp.eye(5)
        loss = lambda r: population_causal_entropy_nll(0.5 * r, mdp, occupancy)  # noqa: E731
        numeric = [(loss(reward + e) - loss(reward - e)) / 2e-6 for e in step]
        np.testing.assert_allclose(jax.grad(loss)(reward), numeric, atol=1e-4)
    mdp, features, weights, _, _ = world
    rewards = jnp.stack([features @ weights, -features @ weights])
    together = jax.jit(jax.vmap(lambda r: causal_entropy_nll(r, mdp, demonstrations)))(rewards)
    alone = [causal_entropy_nll(r, mdp, demonstrations) for r in rewards]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, d: causal_entropy_nll(jnp.zeros(4), m, d), r"reward must be"),
        (lambda m, d: causal_entropy_nll(jnp.zeros(9), m, d._replace(states=d.states + 9)), r"states\[0, 0\]"),
        (lambda m, d: causal_entropy_nll(jnp.zeros(9), m, d._replace(mask=d.mask & False)), "no step"),
        (lambda m, d: causal_entropy_nll(jnp.zeros(9), m, d, horizon=3), "more than horizon=3"),
        (lambda m, d: population_causal_entropy_nll(jnp.zeros(9), m, jnp.zeros(9)), "occupancy must be"),
        (lambda m, d: max_causal_entropy_irl(m, linear_reward(2), optax.sgd(1.0), d, features=jnp.zeros((4, 2))),
         "features must be"),
    ],
)  # fmt: skip
def test_bad_input_is_named(world, demonstrations, call, reason):
    with pytest.raises(ValueError, match=reason):
        call(world[0], demonstrations)
