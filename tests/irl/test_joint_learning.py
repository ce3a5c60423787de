"""Joint learning of a reward and a model of the human: its parts by hand, what is identified, and what joining buys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from scipy.special import log_expit, rel_entr

from jaxalign import Algorithm, train
from jaxalign.irl.evaluation import expected_value_difference, policy_divergence
from jaxalign.irl.joint_learning import (
    ComparedVisits,
    joint_reward_learning,
    policy_coherence,
    preference_nll,
    trajectory_visits,
)
from jaxalign.irl.max_causal_entropy import max_causal_entropy_irl
from jaxalign.irl.rewards import linear_reward
from jaxalign.irl.trajectories import Trajectories, sample_trajectories
from jaxalign.mdp import (
    dense_transition,
    gridworld,
    occupancy_measure,
    random_mdp,
    soft_value_iteration,
    value_iteration,
)
from jaxalign.statistics import paired_difference_interval


def small_problem(states=4, actions=2):
    mdp = random_mdp(jax.random.key(0), states, actions, discount=0.7)
    return mdp, jax.random.normal(jax.random.key(1), (2, states))


def some_pairs(mdp, reward, num=30, length=5, beta=1.0):
    """Pairs of random walks, labelled by the exact probability that the first is preferred."""
    walk = jnp.zeros((mdp.num_states, mdp.num_actions)) - jnp.log(mdp.num_actions)
    visits = [
        trajectory_visits(mdp, sample_trajectories(key, mdp, walk, num=num, length=length))
        for key in jax.random.split(jax.random.key(5))
    ]
    gap = jnp.einsum("bsa,s->b", visits[0] - visits[1], reward)
    return ComparedVisits(*visits, jax.nn.sigmoid(beta * gap))


def repeated(algorithm, batch):
    """The same batch at every step."""
    return Algorithm(algorithm.init, lambda state, _: algorithm.step(state, batch))


def test_visits_and_preferences_by_hand():
    mdp, _ = small_problem()
    rows = Trajectories(
        jnp.array([[0, 1, 0], [2, 3, 3]]), jnp.array([[1, 0, 1], [0, 0, 1]]), jnp.array([[1, 1, 1], [1, 0, 0]]) > 0
    )
    visits = trajectory_visits(mdp, rows)
    expected = np.zeros((2, 4, 2))
    expected[0, 0, 1], expected[0, 1, 0], expected[1, 2, 0] = 1 + 0.7**2, 0.7, 1.0
    np.testing.assert_allclose(visits, expected, rtol=1e-6)
    reward = jnp.array([1.0, -1.0, 2.0, 0.0])
    gap = (1.49 - 0.7) - 2.0
    pairs = ComparedVisits(visits[:1], visits[1:], jnp.array([True]))
    np.testing.assert_allclose(preference_nll(reward, mdp, pairs, beta=0.5), [-log_expit(0.5 * gap)], rtol=1e-5)
    half = pairs._replace(first_preferred=jnp.array([0.25]))
    by_hand = -0.25 * log_expit(gap) - 0.75 * log_expit(-gap)
    np.testing.assert_allclose(preference_nll(reward, mdp, half), [by_hand], rtol=1e-5)


def test_coherence_sees_policies_only():
    with jax.enable_x64(True):
        mdp, (reward, other) = small_problem()
        apart = policy_coherence(reward, other, mdp)
        p, q = (np.exp(soft_value_iteration(mdp, r, tolerance=1e-13).log_policy) for r in (reward, other))
        np.testing.assert_allclose(apart, (rel_entr(p, q) + rel_entr(q, p)).sum(-1).mean() / 2, rtol=1e-5)
        np.testing.assert_allclose(policy_coherence(other, reward, mdp), apart, rtol=1e-9)
        potential = jax.random.normal(jax.random.key(2), (4,))
        shaped = reward[:, None, None] + 0.7 * potential[None, None, :] - potential[:, None, None]
        shaped = jnp.broadcast_to(shaped, (4, 2, 4)) + 3.0
        np.testing.assert_allclose(policy_coherence(reward, shaped, mdp), 0.0, atol=1e-9)
        first = policy_coherence(reward, other, mdp, state_weights=jnp.array([1.0, 0.0, 0.0, 0.0]))
        np.testing.assert_allclose(first, (rel_entr(p, q) + rel_entr(q, p))[0].sum() / 2, rtol=1e-5)


def test_coherence_transforms():
    with jax.enable_x64(True):
        mdp, rewards = small_problem()
        apart = lambda reward, other: policy_coherence(reward, other, mdp)  # noqa: E731
        check_grads(apart, tuple(rewards), order=1, modes=["rev"], rtol=1e-4)
        lanes = jax.jit(jax.vmap(apart))(rewards, rewards[::-1])
        np.testing.assert_allclose(lanes, jnp.full(2, apart(*rewards)), rtol=1e-6)


@pytest.mark.slow
def test_without_coherence_it_is_max_causal_entropy_irl():
    mdp, (reward, other) = small_problem()
    occupancy = occupancy_measure(mdp, soft_value_iteration(mdp, reward).log_policy)
    network, optimizer = linear_reward(4, scale=0.0), optax.adam(0.1)
    joint = joint_reward_learning(mdp, network, network, optimizer, occupancy, coherence=0.0)
    pairs = some_pairs(mdp, other)
    state, metrics = jax.jit(lambda key: train(repeated(joint, pairs), key, None, length=40))(jax.random.key(0))
    alone = max_causal_entropy_irl(mdp, network, optimizer, occupancy)
    expected, nll = jax.jit(lambda key: train(alone, key, None, length=40))(jax.random.key(0))
    np.testing.assert_allclose(state.params["reward"]["weights"], expected.params["weights"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["demonstration_nll"], nll["loss"], rtol=1e-4)
    assert metrics["coherence"][-1] > 0.02
    np.testing.assert_allclose(state.params["log_beta"], 0.0)


def test_coherence_identifies_beta():
    # Comparisons give beta times the human's reward; the demonstrator's temperature 1 fixes the scale they share.
    mdp, (reward, _) = small_problem()
    reward = 4.0 * reward
    occupancy = occupancy_measure(mdp, soft_value_iteration(mdp, reward).log_policy)
    pairs = some_pairs(mdp, reward, beta=2.5, num=60)
    network = linear_reward(4)

    def fit(key, coherence):
        joint = joint_reward_learning(
            mdp, network, network, optax.adam(0.1, eps=1e-5), occupancy, coherence=coherence, learn_beta=True
        )
        state, metrics = train(repeated(joint, pairs), key, None, length=300)
        return metrics["beta"][-1], state.params

    fits = jax.jit(jax.vmap(fit, in_axes=(None, 0)))(jax.random.key(0), jnp.array([0.0, 10.0]))
    np.testing.assert_allclose(fits[0][1], 2.5, rtol=0.01)
    assert abs(fits[0][0] - 2.5) > 0.2  # found apart, beta is where the optimiser left it
    scaled = soft_value_iteration(mdp, fits[1]["human"]["weights"][1]).log_policy
    assert policy_divergence(mdp, soft_value_iteration(mdp, reward).log_policy, scaled) < 1e-4


@pytest.mark.slow
def test_joint_learning_beats_either_source_alone():
    # Demonstrations end where they leave the left half of a grid, compared trajectories where they leave the right one.
    height, width, seeds = 3, 6, 6
    mdp = gridworld(height, width, slip=0.1, discount=0.8)
    mdp = mdp.replace(transition=dense_transition(mdp.transition))
    left = jnp.tile(jnp.arange(width) < width // 2, height)
    reward = jnp.zeros((height, width)).at[0, 0].set(3.0).at[2, 5].set(3.0).at[1, 1].set(-3.0).at[1, 4].set(-3.0)
    reward = reward.reshape(-1)
    network = linear_reward(height * width)
    walk = jnp.full((mdp.num_states, mdp.num_actions), -jnp.log(mdp.num_actions))
    expert = soft_value_iteration(mdp, reward).log_policy

    def confined(key, log_policy, side, num):
        inside = mdp.replace(initial=side / side.sum())
        rows = sample_trajectories(key, inside, log_policy, num=num, length=8)
        return rows._replace(mask=rows.mask & (jnp.cumsum(~side[rows.states], axis=1) == 0))

    def fit(weights, key):
        demonstration_key, *pair_keys, label_key, run_key = jax.random.split(key, 5)
        demonstrations = confined(demonstration_key, expert, left, 40)
        first, second = (trajectory_visits(mdp, confined(k, walk, ~left, 200)) for k in pair_keys)
        chance = jax.nn.sigmoid(jnp.einsum("bsa,s->b", first - second, reward))
        pairs = ComparedVisits(first, second, jax.random.bernoulli(label_key, chance))
        joint = joint_reward_learning(
            mdp, network, network, optax.adamw(0.3, weight_decay=1e-2), demonstrations,
            demonstration_weight=weights[0], preference_weight=weights[1], coherence=weights[2],
        )  # fmt: skip
        state, _ = train(repeated(joint, pairs), run_key, None, length=60)

        def loss_of(params):
            policy = value_iteration(mdp, params["weights"]).policy
            return expected_value_difference(mdp, reward, jnp.log(policy))

        return loss_of(state.params["reward"]), loss_of(state.params["human"])

    weights = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), seeds)
    by_reward, by_human = jax.jit(jax.vmap(jax.vmap(fit, in_axes=(None, 0)), in_axes=(0, None)))(weights, keys)
    demonstrations, preferences, joint = by_reward[0], by_human[1], by_reward[2]
    for alone in (demonstrations, preferences):
        low, _ = paired_difference_interval(jax.random.key(1), alone, joint)
        assert low > 0.0
        assert joint.mean() < 0.2 * alone.mean()


def test_bad_shapes_are_named():
    mdp, _ = small_problem()
    network = linear_reward(4)
    for features, occupancy, message in (
        (jnp.ones((3, 4)), jnp.ones((4, 2)), "features must be"),
        (None, jnp.ones((4, 3)), "an occupancy must be"),
    ):
        with pytest.raises(ValueError, match=message):
            joint_reward_learning(
                mdp, network, network, optax.sgd(0.1), occupancy, coherence=1.0, features=features
            )
