"""GAIL and AIRL: losses and discriminators by hand, then the loop on MDPs whose optimum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy.special import log_expit

from jaxalign import Network, networks, sweep, train
from jaxalign.irl.adversarial import (
    AdversarialReward,
    Transitions,
    airl_logits,
    airl_reward,
    discriminator,
    discriminator_loss,
    draw_transitions,
    gail_reward,
    weighted_mean,
)
from jaxalign.irl.adversarial_training import (
    adversarial_imitation,
    airl,
    exact_rollout,
    gail,
    occupancy_transitions,
    on_states,
    policy_mirror_descent,
    sampled_rollout,
    soft_planner,
    state_table,
    trajectory_transitions,
)
from jaxalign.irl.evaluation import expected_value_difference
from jaxalign.irl.trajectories import Trajectories, sample_trajectories, visit_counts
from jaxalign.mdp import (
    gridworld,
    occupancy_measure,
    random_mdp,
    soft_value_iteration,
    sparse_transition,
    value_iteration,
)


def grid(size, **options):
    """A gridworld held as successors, for which occupancies are solved exactly."""
    mdp = gridworld(size, size, **options)
    return mdp.replace(transition=sparse_transition(mdp.transition))


def expert_of(mdp, reward):
    log_policy = soft_value_iteration(mdp, reward).log_policy
    return log_policy, exact_rollout(mdp)(jax.random.key(0), log_policy)


def fit(algorithm, steps, key=None):
    state, metrics = jax.jit(lambda key: train(algorithm, key, None, length=steps))(key or jax.random.key(0))
    return state, jax.tree.map(lambda x: float(x[-1]), metrics)


def occupancies(mdp, *log_policies):
    return [np.asarray(d / d.sum()) for d in (occupancy_measure(mdp, p) for p in log_policies)]


def total_variation(p, q):
    return 0.5 * np.abs(p - q).sum()


# Losses


def test_loss_by_hand():
    np.testing.assert_allclose(discriminator_loss(jnp.zeros(3), jnp.zeros(3)), np.full(3, 2 * np.log(2)), rtol=1e-6)
    # odds 3:1 for the expert on an expert step, 1:1 on a policy step: -ln 3/4 - ln 1/2
    np.testing.assert_allclose(discriminator_loss(np.log(3.0), 0.0), np.log(8 / 3), rtol=1e-6)
    np.testing.assert_allclose(airl_logits(jnp.array([1.0, 0.0]), jnp.array([-2.0, -0.5])), [3.0, 0.5])
    assert (discriminator_loss(jnp.array([100.0, -1e4]), jnp.array([-1e4, 1e4])) == jnp.array([0.0, 2e4])).all()


def test_loss_matches_numpy_and_its_transformations():
    expert, policy = np.random.default_rng(0).normal(0, 5, (2, 6))
    expected = -log_expit(expert) - log_expit(-policy)
    np.testing.assert_allclose(discriminator_loss(expert.astype("f4"), policy.astype("f4")), expected, rtol=1e-5)
    assert discriminator_loss(*(jnp.asarray(x, jnp.bfloat16) for x in (expert, policy))).dtype == jnp.float32
    with jax.enable_x64(True):
        for fn, value in ((discriminator_loss, expected), (airl_logits, expert - policy)):
            assert fn(expert, policy).dtype == jnp.float64
            np.testing.assert_allclose(jax.jit(fn)(expert, policy), value, rtol=1e-12)
            np.testing.assert_allclose(jax.vmap(fn)(expert, policy), value, rtol=1e-12)
            check_grads(fn, (expert, policy), order=1, modes=["rev"])


@pytest.mark.parametrize("fn", [discriminator_loss, airl_logits])
def test_shapes_that_would_broadcast_raise(fn):
    with pytest.raises(AssertionError):
        fn(jnp.zeros((5, 1)), jnp.zeros(5))


def test_the_best_logits_are_the_log_ratio_and_leave_the_jensen_shannon_divergence():
    """E over two small distributions: 2 ln 2 - 2 JSD at log p - log q, and nothing lower nearby."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    sure = jnp.full(3, 1e9)  # costs nothing on its side
    loss = lambda x: p @ discriminator_loss(x, -sure) + q @ discriminator_loss(sure, x)  # noqa: E731
    with jax.enable_x64(True):
        best = jnp.log(p) - jnp.log(q)
        middle = (p + q) / 2
        divergence = (p @ np.log(p / middle) + q @ np.log(q / middle)) / 2
        np.testing.assert_allclose(loss(best), 2 * np.log(2) - 2 * divergence, rtol=1e-12)
        np.testing.assert_allclose(jax.grad(loss)(best), 0.0, atol=1e-12)


# Discriminators


def steps(**changes):
    """Three steps between states 0 and 1 of two actions; the last is a terminal arrival."""
    rows = Transitions(
        jnp.array([0, 1, 0]), jnp.array([1, 0, 0]), jnp.array([1, 1, 1]), jnp.array([False, False, True]),
        log_probs=jnp.log(jnp.array([0.5, 0.25, 0.5])), weights=jnp.array([1.0, 2.0, 1.0]),
    )  # fmt: skip
    return rows._replace(**changes)


def test_airl_reward_by_hand():
    """f = g + discount (1 - terminated) h(s') - h(s): the potential of a terminal state is 0, whatever h says."""
    params = {"reward": jnp.array([1.0, 2.0]), "potential": jnp.array([10.0, 30.0])}
    adversary = airl_reward(state_table(2), state_table(2), discount=0.5)
    np.testing.assert_allclose(adversary.reward(params, steps()), [1 + 15 - 10, 2 + 15 - 30, 1 + 0 - 10])
    logits = adversary.logits(params, steps())
    np.testing.assert_allclose(logits, [6 + np.log(2), -13 + np.log(4), -9 + np.log(2)], rtol=1e-6)
    params["reward"] = jnp.array([[1.0, 3.0], [2.0, 5.0]])
    with_actions = airl_reward(state_table(2, 2), state_table(2), discount=0.5)
    np.testing.assert_allclose(with_actions.reward(params, steps()), [3 + 15 - 10, 2 + 15 - 30, 1 + 0 - 10])
    with pytest.raises(ValueError, match="need log_probs"):
        adversary.logits(params, steps(log_probs=None))


def test_gail_rewards_by_hand():
    params = jnp.array([[0.0, np.log(3.0)], [-np.log(3.0), 0.0]])  # logits of the steps: ln 3, -ln 3, 0
    adversary = gail_reward(state_table(2, 2))
    np.testing.assert_allclose(adversary.logits(params, steps()), [np.log(3), -np.log(3), 0], rtol=1e-6)
    np.testing.assert_allclose(adversary.reward(params, steps()), np.log([4, 4 / 3, 2]), rtol=1e-6)
    negative = gail_reward(state_table(2, 2), reward=jax.nn.log_sigmoid)
    np.testing.assert_allclose(negative.reward(params, steps()), np.log([3 / 4, 1 / 4, 1 / 2]), rtol=1e-6)


def test_networks_over_observations_and_float_actions():
    rows = steps(states=jnp.ones((3, 4)), next_states=jnp.ones((3, 4)))
    mlp = lambda outputs: Network.from_linen(networks.MLP((8, outputs)), jnp.zeros((1, 4)))  # noqa: E731
    for outputs in (1, 2):
        adversary = airl_reward(mlp(outputs), mlp(1), discount=0.9)
        assert adversary.logits(adversary.init(jax.random.key(0)), rows).shape == (3,)
    continuous = rows._replace(actions=jnp.full((3, 2), 0.5))
    linear = Network(lambda key: jnp.ones(6), lambda w, s, a: jnp.concatenate([s, a], axis=1) @ w)
    np.testing.assert_allclose(gail_reward(linear).logits(jnp.ones(6), continuous), 5.0)
    adversary = gail_reward(mlp(2))
    params = adversary.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"\(3, 2\) for 3 steps"):
        gail_reward(Network(linear.init, lambda w, s, a: s[:, :2])).logits(params, continuous)


def test_a_step_of_weight_zero_may_hold_anything():
    rows = steps(weights=jnp.array([1.0, 3.0, 0.0]))
    assert weighted_mean(jnp.array([1.0, 2.0, jnp.inf]), rows) == 1.75
    assert weighted_mean(jnp.array([1.0, 2.0, 6.0]), rows._replace(weights=None)) == 3.0


def test_discriminator_alone_reaches_the_log_ratio():
    """On batches of different sizes, with features; its accuracies at the start are one half."""
    p, q = jnp.array([0.7, 0.3]), jnp.array([0.4, 0.6])
    rows = lambda w, n: steps()._replace(  # noqa: E731
        states=jnp.eye(2)[jnp.arange(n) % 2], actions=jnp.zeros(n, int), next_states=jnp.zeros((n, 2)),
        terminated=jnp.zeros(n, bool), log_probs=None, weights=w[jnp.arange(n) % 2],
    )  # fmt: skip
    algorithm = discriminator(gail_reward(Network(lambda key: jnp.zeros(2), lambda w, x: x @ w)), optax.sgd(2.0))
    batch = (rows(p, 2), rows(q, 4))
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (200, *x.shape)), batch)
    state, metrics = jax.jit(lambda b: train(algorithm, jax.random.key(0), b))(repeated)
    np.testing.assert_allclose(state.params, jnp.log(p / q), atol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0], 2 * np.log(2), rtol=1e-6)
    assert (metrics["accuracy/expert"][0], metrics["accuracy/policy"][0]) == (0.5, 0.5)
    told = [metrics[f"accuracy/{side}"][-1] for side in ("expert", "policy")]
    np.testing.assert_allclose(told, [0.7, 0.6], rtol=1e-6)


def test_gradient_penalty_by_hand():
    """logits = 3 x + 4 y': slopes 3 in x and 4 in y', deviations 2 and 0.5 (weight 0 does not count): 36 + 4."""
    expert = Transitions(
        jnp.array([[1.0, 0.5], [5.0, 1.5], [1e9, 1e9]]), jnp.zeros(3, int), jnp.zeros((3, 2)), jnp.zeros(3, bool),
        weights=jnp.array([1.0, 1.0, 0.0]),
    )  # fmt: skip
    policy = expert._replace(states=jnp.ones((3, 2)), weights=None)
    logits = lambda w, rows: rows.states[:, 0] * w[0] + rows.next_states[:, 1] * w[1]  # noqa: E731
    linear = AdversarialReward(lambda key: jnp.array([3.0, 4.0]), logits, None)
    loss = {}
    for penalty in (None, 0.0, 0.1):
        algorithm = discriminator(linear, optax.sgd(1.0), gradient_penalty=penalty)
        loss[penalty] = algorithm.step(algorithm.init(jax.random.key(0)), (expert, policy))[1]["loss"]
    assert loss[None] == loss[0.0]
    np.testing.assert_allclose(loss[0.1] - loss[None], 0.1 * (36 + 4), rtol=1e-4)
    numbered = discriminator(gail_reward(state_table(2, 2)), optax.sgd(1.0), gradient_penalty=0.1)
    with pytest.raises(ValueError, match="states must be real"):
        numbered.step(numbered.init(jax.random.key(0)), (steps(), steps()))


def test_rows_are_drawn_in_proportion_to_their_weights():
    drawn = draw_transitions(jax.random.key(0), steps(weights=jnp.array([1.0, 3.0, 0.0])), 4000)
    assert drawn.weights is None
    assert drawn.states.shape == (4000,)
    share = np.bincount(np.asarray(drawn.actions + 2 * drawn.states), minlength=4) / 4000
    which = [int(steps().actions[i] + 2 * steps().states[i]) for i in range(3)]
    np.testing.assert_allclose(share[which], [0.25, 0.75, 0.0], atol=0.02)
    even = draw_transitions(jax.random.key(0), steps(weights=None), 3000)
    counts = np.bincount(np.asarray(even.actions + 2 * even.states), minlength=4)[which]
    np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.03)


# Transitions of an MDP


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
def test_occupancy_transitions_are_the_joint_distribution(form):
    mdp = {
        "dense": lambda: random_mdp(jax.random.key(1), 4, 3),
        "sparse": lambda: random_mdp(jax.random.key(1), 6, 2, branching=2),
        "grid": lambda: gridworld(3, 3, slip=0.2, goal=(0, 0)),
    }[form]()
    occupancy = jax.random.uniform(jax.random.key(2), (mdp.num_states, mdp.num_actions))
    rows = occupancy_transitions(mdp, occupancy)
    expected = np.where(np.asarray(mdp.terminal)[:, None], 0.0, occupancy)
    found = np.zeros_like(expected)
    np.add.at(found, (rows.states, rows.actions), rows.weights)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (rows.terminated == mdp.terminal[rows.next_states]).all()
    # Flow: what arrives, discounted, plus the start is what stands there.
    log_policy = jnp.log(jnp.full_like(occupancy, 1.0 / mdp.num_actions))
    exact = exact_rollout(mdp)(jax.random.key(0), log_policy)
    arrive = np.array(mdp.initial)
    np.add.at(arrive, exact.next_states, mdp.discount * exact.weights)
    leave = occupancy_measure(mdp, log_policy).sum(axis=1)
    np.testing.assert_allclose(arrive[~mdp.terminal], leave[~mdp.terminal], rtol=1e-4)


def test_trajectory_transitions_need_a_known_next_state():
    mdp = gridworld(1, 4, goal=(0, 3), discount=0.5)
    walk = Trajectories(
        jnp.array([[0, 1, 2, 3], [2, 1, 0, 0]]), jnp.array([[1, 1, 1, 0], [3, 3, 0, 0]]),
        jnp.array([[True] * 4, [True, True, False, False]]),
    )  # fmt: skip
    rows = trajectory_transitions(mdp, walk)
    np.testing.assert_allclose(rows.weights, [1, 0.5, 0.25, 1, 0, 0])
    assert rows.next_states[:4].tolist() == [1, 2, 3, 1]
    assert rows.terminated[:4].tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="no step is followed by another"):
        trajectory_transitions(mdp, Trajectories(*(x[1:, 1:] for x in walk)))


def test_sampled_rollouts_estimate_the_exact_one():
    mdp = grid(3, slip=0.3, goal=(2, 2), discount=0.8)
    log_policy = soft_value_iteration(mdp, jnp.full(9, -3.0)).log_policy
    exact = exact_rollout(mdp)(jax.random.key(0), log_policy)
    sampled = jax.jit(sampled_rollout(mdp, num=20_000, length=30))(jax.random.key(1), log_policy)

    def joint(rows):
        table = np.zeros((9, 5, 9))
        np.add.at(table, (rows.states, rows.actions, rows.next_states), rows.weights)
        return table / table.sum()

    assert total_variation(joint(exact), joint(sampled)) < 0.03
    # The last arrival, which Trajectories does not show, is there: terminal arrivals have the share they should.
    shares = [weighted_mean(rows.terminated.astype(float), rows) for rows in (exact, sampled)]
    assert shares[0] > 0.1
    np.testing.assert_allclose(shares[1], shares[0], atol=0.01)


# The loop


@pytest.mark.parametrize("learner", ["planner", "mirror descent"])
def test_airl_recovers_a_reward_of_states_up_to_a_constant(learner):
    """Deterministic, decomposable, demonstrations exact: g = r + c, h = V + c / (1 - discount), policy = expert."""
    mdp = grid(3)
    reward = jax.random.normal(jax.random.key(3), (9,))
    log_policy, expert = expert_of(mdp, reward)
    # Soft policy iteration: one step of policy improvement per reward, never solved to the end.
    learn = soft_planner(mdp) if learner == "planner" else policy_mirror_descent(mdp, step_size=1.0)
    algorithm = airl(learn, state_table(9), state_table(9), optax.adam(0.05), discount=0.9, expert=expert)
    state, metrics = fit(algorithm, 1500)
    g, h, value = state.params["reward"], state.params["potential"], soft_value_iteration(mdp, reward).value
    assert np.corrcoef(g, reward)[0, 1] > 0.9999
    assert np.ptp(g - reward) < 1e-3
    np.testing.assert_allclose(h - value, jnp.mean(g - reward) / 0.1, atol=5e-3)
    assert total_variation(*occupancies(mdp, state.policy, log_policy)) < 1e-4
    np.testing.assert_allclose(metrics["loss"], 2 * np.log(2), rtol=1e-5)
    # f is the expert's advantage, so its mean and the entropy cancel, and the soft return is 0.
    np.testing.assert_allclose(metrics["reward/policy"], -metrics["entropy"], atol=1e-4)
    np.testing.assert_allclose(metrics["soft_return"], 0.0, atol=1e-3)
    assert int(state.step) == 1500


def test_airl_with_an_end_recovers_the_reward_itself():
    """A terminal potential of 0 leaves no constant free."""
    mdp = grid(3, goal=(2, 2))
    reward = -2.5 + 0.5 * jax.random.normal(jax.random.key(4), (9,))
    _, expert = expert_of(mdp, reward)
    algorithm = airl(soft_planner(mdp), state_table(9), state_table(9), optax.adam(0.1), discount=0.9, expert=expert)
    state, _ = fit(algorithm, 2000)
    here = ~np.asarray(mdp.terminal)
    np.testing.assert_allclose(state.params["reward"][here], reward[here], atol=2e-2)
    value = soft_value_iteration(mdp, reward).value
    np.testing.assert_allclose(state.params["potential"][here], value[here], atol=5e-2)


def test_airl_at_another_temperature_is_wrong():
    """Why the learner's temperature must be 1: a nearly greedy policy cannot agree with f - log pi = 0."""
    mdp = grid(3)
    reward = jax.random.normal(jax.random.key(3), (9,))
    _, expert = expert_of(mdp, reward)
    learn = soft_planner(mdp, temperature=0.3)
    algorithm = airl(learn, state_table(9), state_table(9), optax.adam(0.05), discount=0.9, expert=expert)
    state, metrics = fit(algorithm, 1500)
    assert np.ptp(state.params["reward"] - reward) > 0.3
    assert metrics["loss"] < 2 * np.log(2) - 1e-2


@pytest.mark.parametrize("end", [False, True])
def test_gail_occupancy_is_the_experts(end):
    mdp = grid(3, goal=(2, 2)) if end else random_mdp(jax.random.key(0), 5, 3)
    size = (mdp.num_states, mdp.num_actions)
    log_policy, expert = expert_of(mdp, jax.random.normal(jax.random.key(1), size[:1]))
    learn = policy_mirror_descent(mdp, step_size=0.1, temperature=0.0)
    state, metrics = fit(gail(learn, state_table(*size), optax.adam(0.1), expert=expert), 1500)
    assert total_variation(*occupancies(mdp, state.policy, log_policy)) < 1e-3
    np.testing.assert_allclose(metrics["loss"], 2 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/policy"], np.log(2), atol=2e-3)  # softplus(0)


def test_gail_with_entropy_is_more_random_than_the_expert():
    mdp = random_mdp(jax.random.key(0), 5, 3)
    log_policy, expert = expert_of(mdp, 2.0 * jax.random.normal(jax.random.key(1), (5,)))
    state, _ = fit(gail(soft_planner(mdp, temperature=0.2), state_table(5, 3), optax.adam(0.02), expert=expert), 1500)
    entropy = lambda d: -(d * np.log(d / d.sum(axis=1, keepdims=True))).sum()  # noqa: E731
    learned, demonstrated = map(entropy, occupancies(mdp, state.policy, log_policy))
    assert learned > demonstrated + 0.02


@pytest.mark.slow
def test_sampled_demonstrations_and_rollouts_with_a_network():
    """Everything noisy: sampled steps on both sides, an MLP on coordinates; the reward found is good to plan with."""
    mdp = gridworld(4, 4, slip=0.1)
    place = jnp.stack(jnp.unravel_index(jnp.arange(16), (4, 4)), axis=1) / 3.0
    reward = -3.0 * jnp.sum((place - jnp.array([[1.0, 0.0]])) ** 2, axis=1)
    log_policy = soft_value_iteration(mdp, reward).log_policy
    demonstrations = sample_trajectories(jax.random.key(5), mdp, log_policy, num=200, length=30)
    mlp = Network.from_linen(networks.MLP((16, 1)), jnp.zeros((1, 2)))
    learn = soft_planner(mdp, rollout=sampled_rollout(mdp, num=20, length=30), tolerance=1e-4)
    algorithm = airl(
        learn, on_states(mlp, place), on_states(mlp, place), optax.adam(0.01), discount=0.9,
        expert=trajectory_transitions(mdp, demonstrations), discriminator_steps=2,
    )  # fmt: skip
    state, _ = fit(algorithm, 600)
    found = mlp.apply(state.params["reward"], place)[:, 0]
    greedy = jnp.log(value_iteration(mdp, found).policy)
    start = expected_value_difference(mdp, reward, jnp.full((16, 5), -jnp.log(5.0)))
    assert expected_value_difference(mdp, reward, greedy) < 0.05 * start
    counted = occupancy_transitions(mdp, visit_counts(mdp, demonstrations, discount=mdp.discount))
    again, _ = jax.jit(algorithm.step)(state, counted)  # a batch takes the place of `expert`
    assert int(again.step) == 601


@pytest.mark.slow
def test_a_reward_of_states_transfers_and_one_of_actions_does_not():
    """Over eight rewards at once: planned for anew where the controls are turned, against GAIL's policy there."""
    home = grid(3)
    turned = home.replace(transition=jax.tree.map(lambda x: x[:, jnp.array([1, 2, 3, 0, 4])], home.transition))

    def run(_, key):
        reward = jax.random.normal(key, (9,))
        _, expert = expert_of(home, reward)
        learn = policy_mirror_descent(home, step_size=1.0)

        def lost(network):
            algorithm = airl(learn, network, state_table(9), optax.adam(0.05), discount=0.9, expert=expert)
            params = train(algorithm, key, None, length=800)[0].params["reward"]
            plan = value_iteration(turned, network.apply(params, jnp.arange(9)))
            return expected_value_difference(turned, reward, jnp.log(plan.policy))

        greedy = policy_mirror_descent(home, step_size=0.1, temperature=0.0)
        imitator = gail(greedy, state_table(9, 5), optax.adam(0.1), expert=expert)
        policy = train(imitator, key, None, length=800)[0].policy
        return lost(state_table(9)), lost(state_table(9, 5)), expected_value_difference(turned, reward, policy)

    states, actions, imitated = sweep(run, None, jax.random.split(jax.random.key(9), 8))
    np.testing.assert_allclose(states, 0.0, atol=1e-3)
    assert (imitated > 1.0).all()
    assert actions.mean() > 1.0


def test_mirror_descent_improves_at_every_step_and_ends_where_planning_does():
    mdp = random_mdp(jax.random.key(6), 6, 3)
    reward = jax.random.normal(jax.random.key(7), (6, 3))
    earn = lambda rows: reward[rows.states, rows.actions]  # noqa: E731
    learn = policy_mirror_descent(mdp, step_size=0.5, temperature=0.7)
    key = jax.random.key(0)

    def step(policy, _):
        policy, metrics = learn.improve(policy, earn, None, key)
        return policy, metrics["soft_return"]

    policy, returns = jax.jit(lambda: jax.lax.scan(step, learn.init(key), None, length=60))()
    assert (jnp.diff(returns) >= -1e-4).all()  # rounding
    plan, metrics = soft_planner(mdp, temperature=0.7).improve(policy, earn, None, key)
    np.testing.assert_allclose(policy, plan, atol=1e-4)
    np.testing.assert_allclose(returns[-1], metrics["soft_return"], rtol=1e-5)


def test_x64_and_missing_demonstrations():
    with jax.enable_x64(True):
        mdp = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, grid(3))
        reward = jax.random.normal(jax.random.key(3), (9,))
        _, expert = expert_of(mdp, reward)
        learn = policy_mirror_descent(mdp, step_size=1.0)
        algorithm = airl(learn, state_table(9), state_table(9), optax.adam(0.1), discount=0.9, expert=expert)
        state, _ = fit(algorithm, 3)
        assert state.policy.dtype == state.params["reward"].dtype == jnp.float64
    bare = adversarial_imitation(soft_planner(grid(3)), gail_reward(state_table(9, 5)), optax.sgd(1.0))
    with pytest.raises(ValueError, match="no demonstrations"):
        bare.step(bare.init(jax.random.key(0)), None)
