"""Segments, buffers, questions and learned rewards: small cases worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Network
from jaxalign.environments import cartpole, pendulum
from jaxalign.preferences.reward_ensemble import worst_case
from jaxalign.preferences.reward_networks import trajectory_reward
from jaxalign.rl import Steps
from jaxalign.rlhf.annotators import boltzmann_annotator, return_scorer, segment_returns
from jaxalign.rlhf.human_feedback import (
    add_rows,
    at_random,
    choose_pairs,
    comparisons,
    disagreement,
    draw_rows,
    graded_segments,
    information_gain,
    init_buffer,
    learned_reward,
    pairwise_agreement,
    scored_feedback,
    segments,
    step_features,
)


def steps_with(done, rewards=None, truncated=False):
    """Steps [T, N] that end where `done` says; observation and action tell time and environment."""
    done = jnp.asarray(done, bool)
    count, lanes = done.shape
    time = jnp.broadcast_to(jnp.arange(count, dtype=float)[:, None], (count, lanes))
    lane = jnp.broadcast_to(jnp.arange(lanes)[None], (count, lanes))
    seen = jnp.stack([time, lane.astype(float)], axis=-1)
    rewards = jnp.ones(done.shape) if rewards is None else jnp.asarray(rewards, float)
    none = jnp.zeros_like(done)
    ends = (none, done) if truncated else (done, none)
    return Steps(seen, lane % 2, rewards, seen, *ends, jnp.zeros(done.shape), {})


@pytest.mark.parametrize("truncated", [False, True])
def test_segments_stop_where_episodes_do(truncated):
    done = np.zeros((6, 2), bool)
    done[1, 0] = done[4, 1] = True
    steps = steps_with(done, truncated=truncated)
    pool = segments(steps, steps.observations, 10.0 * steps.rewards, 3)
    assert pool.features.shape == (4, 3, 2)  # starts 0 and 3, environments 0 and 1
    np.testing.assert_array_equal(pool.mask, [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(pool.features[3], [[3, 1], [4, 1], [5, 1]])
    np.testing.assert_array_equal(segment_returns(pool.rewards, pool.mask), [20, 30, 30, 20])
    overlapping = segments(steps, steps.observations, steps.rewards, 3, stride=1)
    assert overlapping.mask.shape == (8, 3)
    np.testing.assert_array_equal(overlapping.features[2, :, 0], [1, 2, 3])


@pytest.mark.parametrize(("length", "stride"), [(0, None), (7, None), (3, 0)])
def test_segments_that_do_not_fit(length, stride):
    steps = steps_with(np.zeros((6, 2)))
    with pytest.raises(ValueError, match=f"needs 1 <= length <= 6 steps and stride >= 1, got {length}"):
        segments(steps, steps.observations, steps.rewards, length, stride=stride)


def test_features_are_observation_action_and_end():
    steps = steps_with([[0], [1]])._replace(observations=jnp.arange(8.0).reshape(2, 1, 4))
    found = step_features(cartpole())(steps)
    np.testing.assert_array_equal(found[:, 0], [[0, 1, 2, 3, 1, 0, 0], [4, 5, 6, 7, 1, 0, 1]])
    steps = steps._replace(observations=jnp.ones((2, 1, 3)), actions=jnp.full((2, 1, 1), 0.5))
    np.testing.assert_array_equal(step_features(pendulum())(steps)[1, 0], [1, 1, 1, 0.5, 1])


def test_a_buffer_keeps_the_newest():
    row = {"x": jnp.zeros((2, 3)), "n": jnp.zeros(2, jnp.int32)}
    buffer = init_buffer(row, 5)
    add = jax.jit(add_rows)
    drawn = draw_rows(jax.random.key(0), buffer, 4)
    assert drawn["x"].shape == (4, 3)
    np.testing.assert_array_equal(drawn["x"], 0.0)
    for first in (1, 3, 5):
        buffer = add(buffer, {"x": jnp.ones((2, 3)), "n": jnp.arange(first, first + 2)})
        drawn = draw_rows(jax.random.key(first), buffer, 200)
        assert set(np.asarray(drawn["n"])) == set(range(max(1, first - 3), first + 2))
    np.testing.assert_array_equal(buffer.rows["n"], [6, 2, 3, 4, 5])
    assert int(buffer.count) == 6
    with pytest.raises(ValueError, match="6 rows do not fit a buffer of 5"):
        add_rows(buffer, {"x": jnp.ones((6, 3)), "n": jnp.arange(6)})


def test_what_is_worth_asking():
    key = jax.random.key(0)
    # Members that agree, that disagree, and that all expect a coin.
    gaps = jnp.array([[30.0, 30.0, 0.0], [30.0, -30.0, 0.0]])
    none = jnp.zeros_like(gaps)
    np.testing.assert_allclose(disagreement(key, gaps, none), [0.0, 0.25, 0.0], atol=1e-6)
    np.testing.assert_allclose(information_gain(key, gaps, none), [0.0, np.log(2.0), 0.0], atol=1e-6)
    # In float64 by NumPy: entropy of the mean less the mean entropy.
    a, b = np.random.default_rng(0).normal(size=(2, 4, 6))
    p = 1.0 / (1.0 + np.exp(b - a))
    entropy = lambda p: -p * np.log(p) - (1 - p) * np.log(1 - p)  # noqa: E731
    expected = entropy(p.mean(axis=0)) - entropy(p).mean(axis=0)
    np.testing.assert_allclose(information_gain(key, jnp.array(a), jnp.array(b)), expected, atol=1e-6)
    np.testing.assert_allclose(disagreement(key, jnp.array(a), jnp.array(b)), p.var(axis=0), atol=1e-6)


def test_pairs_are_of_different_segments_and_the_best_are_kept():
    rewards = jnp.array([[0.0, 0.0, 0.0, 30.0], [0.0, 0.0, 0.0, -30.0]])  # the members differ about the last only
    first, second = jax.jit(lambda key: choose_pairs(key, rewards, queries=5, candidates=50))(jax.random.key(0))
    assert first.shape == (5,)
    assert (np.asarray(first) != np.asarray(second)).all()
    assert ((np.asarray(first) == 3) | (np.asarray(second) == 3)).all()
    first, second = choose_pairs(jax.random.key(1), rewards, queries=400, candidates=400, acquisition=at_random)
    pairs = np.asarray(first) * 4 + np.asarray(second)
    assert len(set(pairs.tolist())) == 12  # each ordered pair
    with pytest.raises(ValueError, match="got 3, 2 and 4"):
        choose_pairs(jax.random.key(0), rewards, queries=3, candidates=2)


def test_answers_become_comparisons():
    steps = steps_with(np.zeros((4, 2)))
    pool = segments(steps, steps.observations, steps.rewards, 2)
    rows = comparisons(pool, jnp.array([0, 3]), jnp.array([1, 2]), jnp.array([1, 2]), jnp.array([7, 8]))
    np.testing.assert_array_equal(rows.chosen, pool.features[jnp.array([0, 3])])
    np.testing.assert_array_equal(rows.rejected, pool.features[jnp.array([1, 2])])
    np.testing.assert_array_equal(rows.outcome, [1, 2])
    np.testing.assert_array_equal(rows.index, [7, 8])


LINEAR = trajectory_reward(Network(lambda key: jnp.zeros(2), lambda params, x: x @ params))


def test_the_ensemble_pays_each_step():
    steps = steps_with(np.zeros((3, 2)), rewards=np.full((3, 2), np.nan))  # what the environment pays does not matter
    params = jnp.array([[1.0, 0.0], [4.0, 4.0]])
    pays = learned_reward(LINEAR, lambda steps: steps.observations, params)
    kept, pay, metrics = jax.jit(pays.apply)(pays.init(jax.random.key(0)), steps, jax.random.key(1))
    np.testing.assert_array_equal(kept, params)
    time, lane = np.arange(3.0)[:, None] + np.zeros((3, 2)), np.arange(2.0)[None] + np.zeros((3, 2))
    members = [time, 4 * (time + lane)]
    scaled = [x / np.sqrt(np.mean(x**2)) for x in members]
    np.testing.assert_allclose(pay, np.mean(scaled, axis=0), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward/learned"], np.mean(members), rtol=1e-5)
    np.testing.assert_allclose(metrics["reward/disagreement"], np.std(scaled, axis=0).mean(), rtol=1e-4)
    raw = learned_reward(LINEAR, lambda steps: steps.observations, aggregate=worst_case, normalize=False)
    np.testing.assert_allclose(raw.apply(params, steps, jax.random.key(1))[1], members[0], rtol=1e-6)


def test_a_constant_reward_keeps_its_sign():
    """Where episodes differ in length the offset says whether to go on; a mean of 0 would not."""
    constant = trajectory_reward(Network(lambda key: jnp.zeros(1), lambda params, x: 0.0 * x[..., 0] + params[0]))
    pays = learned_reward(constant, lambda steps: steps.observations)
    for value in (0.01, -300.0):
        _, pay, _ = pays.apply(jnp.full((2, 1), value), steps_with(np.zeros((3, 2))), jax.random.key(0))
        np.testing.assert_allclose(pay, np.sign(value), rtol=1e-3)


def test_scores_are_added_by_the_rule():
    done = np.zeros((4, 1), bool)
    done[0, 0] = True
    steps = steps_with(done, rewards=[[1.0], [2.0], [3.0], [4.0]])
    _, pay, metrics = jax.jit(scored_feedback(return_scorer(), segment_length=2).apply)((), steps, jax.random.key(0))
    # Windows (1 | 2), whose episodes are scored apart, and (3, 4).
    np.testing.assert_allclose(pay[:, 0], [1 + 0.1, 2 + 0.2, 3 + 0.7, 4 + 0.7], rtol=1e-6)
    np.testing.assert_allclose(metrics["feedback/score"], (1 + 2 + 7 + 7) / 4)
    with pytest.raises(ValueError, match="4 steps are no multiple of segment_length=3"):
        scored_feedback(return_scorer(), segment_length=3).apply((), steps, jax.random.key(0))


def test_agreement_counts_pairs():
    # Pairs: (0, 1) right, (0, 2) wrong, (1, 2) equal in truth: not counted, (., 3): one predicted equal, two right.
    found = pairwise_agreement(jnp.array([1.0, 2.0, 0.5, 2.0]), jnp.array([0.0, 1.0, 1.0, 3.0]))
    np.testing.assert_allclose(found, (1 + 0 + 1 + 0.5 + 1) / 5)
    assert np.isnan(pairwise_agreement(jnp.arange(3.0), jnp.ones(3)))
    a, b = np.random.default_rng(1).normal(size=(2, 12))
    from scipy.stats import kendalltau

    np.testing.assert_allclose(pairwise_agreement(a, b), (kendalltau(a, b).statistic + 1) / 2, rtol=1e-6)


def test_graded_episodes_go_from_the_policys_to_random():
    world = cartpole()

    def always_right(key, observations):
        return jnp.ones(len(observations), jnp.int32), jnp.zeros(len(observations))

    graded = jax.jit(lambda key: graded_segments(key, world, always_right, step_features(world), count=6, length=40))(
        jax.random.key(0)
    )
    assert graded.features.shape == (6, 40, 7)
    pushes_right = np.asarray(graded.features[..., 5])
    real = np.asarray(graded.mask)
    assert pushes_right[0][real[0]].all()  # the policy
    assert not pushes_right[5][real[5]].all()  # at random
    returns = np.asarray(segment_returns(graded.rewards, graded.mask))
    np.testing.assert_array_equal(returns, real.sum(axis=1))
    assert 8 <= returns[0] <= 11
    assert np.asarray(graded.features[0, int(returns[0]) - 1, 6]) == 1.0  # its last real step terminated


def test_the_order_can_be_learned_from_answers():
    """Perfect answers about segments of a known linear reward: the ensemble orders new segments as it does."""
    import optax

    from jaxalign import train
    from jaxalign.preferences.reward_ensemble import ensemble_rewards, reward_ensemble
    from jaxalign.rlhf.human_feedback import Segments

    network = trajectory_reward(Network(lambda key: 0.1 * jax.random.normal(key, (3,)), lambda params, x: x @ params))
    weights = jnp.array([1.0, -2.0, 0.5])
    features = jax.random.normal(jax.random.key(0), (80, 5, 3))
    mask = jnp.arange(5)[None] < jax.random.randint(jax.random.key(1), (80, 1), 1, 6)
    pool = Segments(features, features @ weights, mask)

    def run(key):
        answer_key, train_key, draw_key = jax.random.split(key, 3)
        first, second = jnp.arange(0, 40), jnp.roll(jnp.arange(0, 40), 7)
        outcome = boltzmann_annotator(beta=jnp.inf)(
            answer_key, pool.rewards[first], mask[first], pool.rewards[second], mask[second]
        )
        rows = comparisons(pool, first, second, outcome, jnp.arange(40))
        buffer = add_rows(init_buffer(rows, 40), rows)
        batches = jax.vmap(lambda k: draw_rows(k, buffer, 32))(jax.random.split(draw_key, 200))
        state, _ = train(reward_ensemble(network, optax.adam(0.05), size=3), train_key, batches)
        return ensemble_rewards(network, state.params, features[40:], mask[40:])

    predicted = jax.jit(run)(jax.random.key(2)).mean(axis=0)
    assert pairwise_agreement(predicted, segment_returns(pool.rewards, mask)[40:]) > 0.9
