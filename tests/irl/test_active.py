"""Active reward learning: information gain, batches, volume removal, the tables of questions, and the experiment."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.special import expit, log_softmax, logsumexp, softmax

from jaxalign.irl.active import (
    comparison_information_gain,
    effective_hypotheses,
    expected_information_gain,
    hypothesis_entropy,
    joint_information_gain,
    query_loop,
    random_queries,
    select_queries,
    update_weights,
    volume_removal,
)
from jaxalign.irl.queries import (
    action_log_likelihood,
    all_pairs,
    choice_log_likelihood,
    demonstration_information_gain,
    demonstration_log_likelihood,
    trajectory_returns,
)
from jaxalign.irl.trajectories import Trajectories, sample_trajectories
from jaxalign.mdp import arrival_reward, expected_return, gridworld, random_mdp, soft_value_iteration, value_iteration
from jaxalign.statistics import paired_difference_interval

SCORES = (expected_information_gain, volume_removal, random_queries)


def random_table(seed, n, q, k, impossible=0.0):
    """log-likelihood [n, q, k] and log-weights [n] in float64; some answers and hypotheses impossible."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, q, k))
    logits[:, :, 1:][rng.random((n, q, k - 1)) < impossible] = -np.inf
    weights = rng.normal(size=n)
    weights[1:][rng.random(n - 1) < impossible / 2] = -np.inf
    return log_softmax(logits, axis=-1), weights


def entropy(p):
    p = np.asarray(p, np.float64)
    return -sum(x * np.log(x) for x in p.ravel() if x > 0)


def gain_by_entropies(table, log_weights):
    """H(answer) - E H(answer | hypothesis), one query at a time."""
    w, p = softmax(log_weights), np.exp(table)
    return np.array([
        entropy(w @ p[:, q]) - sum(w[n] * entropy(p[n, q]) for n in range(len(w))) for q in range(p.shape[1])
    ])  # fmt: skip


def joint_information(table, log_weights, batch):
    """I(reward; answers to all of `batch`), every joint answer enumerated."""
    w, p = softmax(log_weights), np.exp(table)
    joint = np.ones((len(w), 1))
    for q in batch:
        joint = (joint[:, :, None] * p[:, q][:, None, :]).reshape(len(w), -1)
    return entropy(w @ joint) - sum(w[n] * entropy(joint[n]) for n in range(len(w)))


def greedy_batch(table, log_weights, k):
    chosen = []
    for _ in range(k):
        rest = [q for q in range(table.shape[1]) if q not in chosen]
        chosen.append(max(rest, key=lambda q: joint_information(table, log_weights, [*chosen, q])))
    return chosen


@pytest.mark.parametrize(("right", "nats"), [(1.0, np.log(2)), (0.9, 0.3680642), (0.5, 0.0)])
def test_two_equal_hypotheses_by_hand(right, nats):
    with np.errstate(divide="ignore"):
        table = np.log([[[right, 1 - right]], [[1 - right, right]]])
    np.testing.assert_allclose(expected_information_gain(table, np.zeros(2)), [nats], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impossible", [0.0, 0.4])
def test_gain_matches_entropies_and_kl_in_numpy(impossible):
    table, weights = random_table(0, 7, 5, 3, impossible)
    expected = gain_by_entropies(table, weights)
    single = expected_information_gain(table.astype(np.float32), weights.astype(np.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        double = expected_information_gain(table, weights + 3.0)
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, expected, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(jax.jit(expected_information_gain)(table, weights), expected, rtol=1e-11, atol=1e-14)
        lanes = jax.vmap(expected_information_gain, in_axes=(None, 0))(table, np.stack([weights, weights[::-1]]))
        np.testing.assert_allclose(lanes[1], gain_by_entropies(table, weights[::-1]), rtol=1e-11, atol=1e-14)


def test_gain_is_that_of_equally_weighted_samples_in_bits():
    table, _ = random_table(1, 50, 4, 2)
    p = np.exp(table)
    bits = np.sum(p * np.log2(50 * p / p.sum(axis=0)), axis=(0, 2)) / 50  # Bıyık et al. 2019
    np.testing.assert_allclose(expected_information_gain(table, np.zeros(50)), bits * np.log(2), rtol=1e-5)


@jax.jit
def gain_and_entropies_after(table, weights):
    after = jax.vmap(lambda answer: hypothesis_entropy(update_weights(table[:, 0], weights, answer)))
    return expected_information_gain(table, weights)[0], after(jnp.arange(table.shape[2]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, 2), (5, 2), (4, 3)]), st.floats(0, 0.6))
def test_gain_is_bounded_and_is_the_expected_fall_of_entropy(seed, shape, impossible):
    table, weights = random_table(seed, shape[0], 1, shape[1], impossible)
    gain, after = gain_and_entropies_after(table, weights)
    assert 0.0 <= gain <= min(np.log(shape[1]), entropy(softmax(weights))) + 1e-6
    answers = softmax(weights) @ np.exp(table[:, 0])
    left = sum(p * h for p, h in zip(answers, np.asarray(after), strict=True) if p > 0)
    np.testing.assert_allclose(gain, entropy(softmax(weights)) - left, atol=3e-6)


@pytest.mark.slow
def test_gradient_is_finite_where_answers_and_hypotheses_are_impossible():
    table, weights = random_table(3, 6, 4, 3, 0.5)
    table[:, 0] = np.log([1.0, 1e-300, 1e-300])
    table[:, 0, 1:] = -np.inf  # no hypothesis allows these answers
    gradients = jax.grad(lambda t, w: expected_information_gain(t, w).sum(), (0, 1))(table, weights)
    assert np.isneginf(table).any()
    assert np.isneginf(weights).any()
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0][np.isneginf(table)], 0.0)
    # 1e-60 underflows in float32: neither 0 log 0 nor a division by it.
    tiny = np.log([[[1.0, 1e-60]], [[1.0, 1e-30]]])
    value, gradient = jax.value_and_grad(lambda t: expected_information_gain(t, np.zeros(2))[0])(tiny)
    assert abs(value) < 1e-7
    assert np.isfinite(gradient).all()
    with jax.enable_x64(True):
        check_grads(expected_information_gain, random_table(4, 4, 3, 3), order=1, modes=["rev"])


def test_many_hypotheses_that_agree_leave_no_rounding():
    # The mean over 5,000 hypotheses is off by up to 2e-6 of itself in float32; the gain must not be.
    rng = np.random.default_rng(12)
    weights, p = rng.normal(size=5000), rng.uniform(0.01, 0.99, 50)
    table = np.tile(np.log(np.stack([p, 1 - p], axis=-1)), (5000, 1, 1))
    assert expected_information_gain(table, weights).max() < 3e-7
    returns = np.tile(rng.normal(size=10), (5000, 1))
    assert comparison_information_gain(returns, weights, beta=1.0).max() < 3e-7


@pytest.mark.parametrize("trajectories", [2, 5, 6])
def test_all_pairs_at_once(trajectories):
    rng = np.random.default_rng(5)
    returns, weights = 3 * rng.normal(size=(9, trajectories)), rng.normal(size=9)
    expected = np.zeros((trajectories, trajectories))
    w = softmax(weights)
    for i, j in itertools.product(range(trajectories), repeat=2):
        p = expit(0.7 * (returns[:, i] - returns[:, j]))
        expected[i, j] = entropy([w @ p, w @ (1 - p)]) - sum(w[n] * entropy([p[n], 1 - p[n]]) for n in range(9))
    gains = comparison_information_gain(returns, weights, beta=0.7)
    np.testing.assert_allclose(gains, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gains, gains.T)
    np.testing.assert_array_equal(np.diag(gains), 0.0)
    table = choice_log_likelihood(returns, all_pairs(trajectories), beta=0.7)
    upper = np.triu_indices(trajectories, 1)
    np.testing.assert_allclose(gains[upper], expected_information_gain(table, weights), rtol=1e-4, atol=1e-7)
    jitted = jax.jit(lambda r, w, beta: comparison_information_gain(r, w, beta=beta))(returns, weights, 0.7)
    np.testing.assert_allclose(jitted, gains, rtol=1e-5, atol=1e-7)
    with jax.enable_x64(True):
        double = comparison_information_gain(returns, weights, beta=0.7)
        np.testing.assert_allclose(double, expected, rtol=1e-10, atol=1e-13)


def test_all_pairs_gradient_and_limits():
    returns, weights = np.random.default_rng(6).normal(size=(4, 5)), np.zeros(4)
    returns[0] = 0.0  # a reward that cannot tell them apart is on the edge of |margin|
    with jax.enable_x64(True):
        check_grads(lambda r, b: comparison_information_gain(r, weights, beta=b), (returns, 1.3), 1, modes=["rev"])
    returns[0] = [1.0, 2.0, 3.0, 4.0, 5.0]
    returns[:, 3] = returns[:, 1]
    assert comparison_information_gain(returns, weights, beta=2.0)[1, 3] < 1e-7
    np.testing.assert_array_equal(comparison_information_gain(returns, weights, beta=0.0), np.zeros((5, 5)))
    # A person without noise says who is ahead: the gain is the entropy of that.
    ahead = np.mean(returns[:, 0] > returns[:, 1])
    gains = comparison_information_gain(returns, weights, beta=1e4)
    np.testing.assert_allclose(gains[0, 1], entropy([ahead, 1 - ahead]), atol=1e-6)
    assert comparison_information_gain(returns[:, :1], weights, beta=1.0).shape == (1, 1)


def test_joint_information_of_a_batch():
    table, weights = random_table(10, 6, 5, 3, 0.3)
    for batch in ([2], [4, 1], [0, 3, 0, 2]):
        expected = joint_information(table, weights, batch)
        gain = jax.jit(joint_information_gain)(table, weights, jnp.array(batch))
        np.testing.assert_allclose(gain, expected, rtol=1e-5, atol=1e-6)
    single = joint_information_gain(table, weights, np.array([2]))
    np.testing.assert_allclose(single, expected_information_gain(table, weights)[2], rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_batch_is_the_exact_greedy_one(seed):
    table, weights = random_table(seed, 8, 7, 2 + seed % 2, 0.2)
    chosen = select_queries(table, weights, 4)
    assert chosen.dtype == jnp.int32
    assert chosen.tolist() == greedy_batch(table, weights, 4)
    assert int(chosen[0]) == int(jnp.argmax(expected_information_gain(table, weights)))
    if seed == 0:
        assert jax.jit(select_queries, static_argnums=2)(table, weights, 4).tolist() == chosen.tolist()
        lanes = jax.vmap(lambda w: select_queries(table, w, 3))(np.stack([weights, weights[::-1]]))
        assert lanes[1].tolist() == greedy_batch(table, weights[::-1], 3)


def bits_table(bits, error):
    """2^bits equal hypotheses; query b asks for bit b, answered wrong with probability `error`."""
    bit = (np.arange(2**bits)[:, None] >> np.arange(bits)) & 1
    wrong = np.stack([bit, 1 - bit], axis=-1)
    with np.errstate(divide="ignore"):
        return np.log(np.where(wrong == 1, error, 1 - error))


def test_batch_passes_over_the_same_question_put_again():
    sure, vague = bits_table(3, 0.0), bits_table(3, 0.2)
    pool = np.concatenate([sure[:, :1], sure[:, :1], sure[:, :1], vague[:, 1:2], sure[:, 2:]], axis=1)
    singles = np.argsort(-np.asarray(expected_information_gain(pool, np.zeros(8))), kind="stable")
    assert singles[:3].tolist() == [0, 1, 2]
    assert sorted(select_queries(pool, np.zeros(8), 2).tolist()) == [0, 4]
    assert sorted(select_queries(pool, np.zeros(8), 3).tolist()) == [0, 3, 4]
    assert sorted(select_queries(pool, np.zeros(8), 5).tolist()) == [0, 1, 2, 3, 4]


def noiseless(answers):
    """answers [N, Q] in 0, 1, or 0.5 for a coin whatever the reward."""
    p = np.asarray(answers, np.float64)
    with np.errstate(divide="ignore"):
        return np.log(np.stack([1 - p, p], axis=-1))


def test_batch_with_answers_that_exclude_each_other():
    # Six hypotheses cannot give all 16 joint answers to four questions; question 0 tells nothing.
    rng = np.random.default_rng(13)
    pool = noiseless(np.concatenate([np.full((6, 1), 0.5), rng.integers(0, 2, (6, 4))], axis=1))
    pool[:, 4] = np.log([0.4, 0.6])
    pool[:3, 4] = np.log([0.6, 0.4])
    weights = rng.normal(size=6)
    expected = greedy_batch(pool, weights, 4)
    assert 0 not in expected
    assert select_queries(pool, weights, 4).tolist() == expected


def test_drawn_answers_come_with_their_probabilities():
    # Question 0 comes first. Where its answer is 1 (probability 3/4) question 1 tells more, else question 2 does.
    pool = noiseless([[0, 0.5, 0], [0, 0.5, 1]] + [[1, i % 2, 0.5] for i in range(6)])
    select = jax.vmap(lambda key: select_queries(pool, np.zeros(8), 2, key=key, max_scenarios=1))
    batches = np.asarray(select(jax.random.split(jax.random.key(0), 400)))
    assert (batches[:, 0] == 0).all()
    assert abs(np.mean(batches[:, 1] == 1) - 0.75) < 4 * np.sqrt(0.1875 / 400)
    assert select_queries(pool, np.zeros(8), 2).tolist() == [0, 1]


@pytest.mark.parametrize("max_scenarios", [1, 16, 40])
def test_batch_beyond_the_exact_table(max_scenarios):
    # 10 bits asked for three times each: the exact table would be 2^9. Sure answers leave no doubt about repeats.
    pool = np.tile(bits_table(10, 0.0), (1, 3, 1))
    chosen = select_queries(pool, np.zeros(1024), 10, key=jax.random.key(2), max_scenarios=max_scenarios)
    assert sorted(q % 10 for q in chosen.tolist()) == list(range(10))


def test_sampled_batch_is_nearly_as_good_as_the_exact_one():
    table, weights = random_table(11, 12, 30, 2)
    exact = joint_information(table, weights, greedy_batch(table, weights, 6))
    select = jax.jit(jax.vmap(lambda key: select_queries(table, weights, 6, key=key, max_scenarios=24)))
    batches = select(jax.random.split(jax.random.key(0), 4)).tolist()
    sampled = [joint_information(table, weights, batch) for batch in batches]
    gains = np.asarray(expected_information_gain(table, weights))
    singles = joint_information(table, weights, np.argsort(-gains)[:6])
    assert min(sampled) > 0.97 * exact
    assert exact > singles


def test_volume_removal_prefers_what_tells_nothing():
    table, weights = random_table(7, 6, 5, 3)
    expected = np.min(np.einsum("n,nqk->qk", softmax(weights), 1 - np.exp(table)), axis=-1)
    np.testing.assert_allclose(volume_removal(table, weights), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(volume_removal)(table, weights), expected, rtol=1e-5)
    returns = np.array([[1.0, 1.0, 0.0], [0.2, 0.2, 0.3], [0.0, 0.0, 0.7]])  # trajectories 0 and 1 are the same
    pairs = choice_log_likelihood(returns, all_pairs(3), beta=5.0)
    removed, gains = volume_removal(pairs, np.array([1.0, 0, 0])), expected_information_gain(pairs, np.zeros(3))
    assert (int(jnp.argmax(removed)), int(jnp.argmin(gains))) == (0, 0)
    np.testing.assert_allclose(removed[0], 0.5, rtol=1e-6)
    assert gains[0] < 1e-7 < 0.1 < gains[1]


def test_update_by_hand_and_in_sequence():
    table = np.log([[[0.9, 0.1]], [[0.3, 0.7]]])[:, 0]
    np.testing.assert_allclose(jnp.exp(update_weights(table, np.zeros(2), 0)), [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(jax.jit(update_weights)(table, np.zeros(2), 1)), [0.125, 0.875], rtol=1e-6)
    many, weights = random_table(8, 5, 6, 3, 0.2)
    expected = weights + many[:, :, 0].sum(axis=1)
    posterior = weights
    for q in range(6):
        posterior = update_weights(many[:, q], posterior, 0)
    np.testing.assert_allclose(np.exp(posterior), np.exp(expected - logsumexp(expected)), rtol=1e-5)


def test_effective_hypotheses_and_entropy():
    half = np.array([0.0, 0.0, -np.inf, -np.inf])
    np.testing.assert_allclose(effective_hypotheses(half), 2.0, rtol=1e-6)
    np.testing.assert_allclose(hypothesis_entropy(half), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(effective_hypotheses(np.full(7, 5.0)), 7.0, rtol=1e-6)
    np.testing.assert_allclose(effective_hypotheses(np.log([0.5, 0.25, 0.25])), 8 / 3, rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_loop_keeps_the_posterior_and_asks_nothing_twice(score):
    table, weights = random_table(9, 6, 8, 3)

    def run(key):
        return query_loop(key, table, weights, table[2], score, num_queries=8)

    keys, alone = jax.random.split(jax.random.key(4), 3), jax.jit(run)
    together = jax.jit(jax.vmap(run))(keys)
    for lane, key in enumerate(keys):
        history = alone(key)
        assert sorted(history.queries.tolist()) == list(range(8))
        np.testing.assert_array_equal(together.queries[lane], history.queries)
        posterior = log_softmax(weights)
        np.testing.assert_allclose(history.log_weights[0], posterior, rtol=1e-5)
        for t, (query, answer) in enumerate(zip(*history[:2], strict=True)):
            posterior = posterior + table[:, query, answer]
            np.testing.assert_allclose(history.log_weights[t + 1], log_softmax(posterior), rtol=1e-4, atol=1e-5)
    assert query_loop(keys[0], table, weights, table[2], score, num_queries=0).log_weights.shape == (1, 6)


def test_loop_searches_by_halves_and_each_question_has_one_answer():
    # 16 hypotheses, 4 telling questions without noise among 20 that tell nothing.
    pool = np.concatenate([np.full((16, 20, 2), np.log(0.5)), bits_table(4, 0.0)], axis=1)
    answers = {}
    for score in SCORES:
        history = query_loop(jax.random.key(6), pool, np.zeros(16), pool[11], score, num_queries=4)
        if score is expected_information_gain:
            assert sorted(history.queries.tolist()) == [20, 21, 22, 23]
            np.testing.assert_allclose(np.exp(history.log_weights[-1]), np.eye(16)[11], atol=1e-6)
        for query, answer in zip(history.queries.tolist(), history.answers.tolist(), strict=True):
            assert answers.setdefault(query, answer) == answer
    first = jax.vmap(lambda k: query_loop(k, pool, np.zeros(16), pool[0], random_queries, num_queries=1).queries[0])
    counts = np.bincount(first(jax.random.split(jax.random.key(0), 2400)), minlength=24)
    assert np.sum((counts - 100) ** 2 / 100) < 50  # chi-squared with 23 degrees of freedom: P < 0.001


def test_returns_are_discounted_masked_sums():
    mdp = random_mdp(jax.random.key(0), 6, 3, discount=0.8)
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 6, 3)).astype(np.float32)
    trajectories = Trajectories(*(jnp.asarray(x) for x in (
        rng.integers(0, 6, (5, 7)), rng.integers(0, 3, (5, 7)), np.arange(7)[None] < rng.integers(1, 8, 5)[:, None]
    )))  # fmt: skip
    expected = np.zeros((4, 5))
    for n, m, t in itertools.product(range(4), range(5), range(7)):
        s, a, kept = (np.asarray(x)[m, t] for x in trajectories)
        expected[n, m] += kept * 0.8**t * rewards[n, s, a]
    np.testing.assert_allclose(trajectory_returns(mdp, rewards, trajectories), expected, rtol=1e-5, atol=1e-6)
    by_state = trajectory_returns(mdp, rewards[:, :, 0], trajectories)
    same = trajectory_returns(mdp, np.repeat(rewards[:, :, :1], 3, axis=2), trajectories)
    np.testing.assert_allclose(by_state, same, rtol=1e-6)


def test_choices_are_boltzmann():
    returns = np.array([[1.0, 2.0, 4.0], [0.0, -1.0, 800.0]])
    pairs = choice_log_likelihood(returns, all_pairs(3), beta=0.5)
    assert all_pairs(3).tolist() == [[0, 1], [0, 2], [1, 2]]
    np.testing.assert_allclose(np.exp(pairs[0, :, 0]), expit(0.5 * np.array([-1.0, -3.0, -2.0])), rtol=1e-6)
    np.testing.assert_allclose(np.exp(pairs).sum(axis=-1), 1.0, rtol=1e-6)
    best = choice_log_likelihood(returns, np.array([[2, 0, 1]]), beta=0.5)
    np.testing.assert_allclose(best[:, 0], log_softmax(0.5 * returns[:, [2, 0, 1]], axis=-1), rtol=1e-6)


def test_actions_without_a_future_are_multinomial_logistic():
    mdp = random_mdp(jax.random.key(1), 5, 3, discount=0.0)
    rewards = np.random.default_rng(1).normal(size=(4, 5, 3))
    table = action_log_likelihood(mdp, rewards, beta=1.7)
    np.testing.assert_allclose(table, log_softmax(1.7 * rewards, axis=-1), rtol=1e-5, atol=1e-6)


@functools.cache
def small_grid():
    """A 2 x 3 grid without slip and a goal, and the policies of 5 rewards."""
    mdp = gridworld(2, 3, discount=0.9, goal=(1, 2))
    rewards = jax.vmap(lambda r: arrival_reward(mdp, r))(jax.random.normal(jax.random.key(2), (5, 6)))
    return mdp, action_log_likelihood(mdp, rewards, beta=1.5)


@pytest.mark.slow
def test_every_demonstration_enumerated():
    mdp, policies = small_grid()
    table = demonstration_log_likelihood(mdp, policies, np.array([0, 4, 5]), length=3)
    assert table.shape == (5, 3, 125)
    np.testing.assert_allclose(np.exp(table).sum(axis=-1), 1.0, rtol=1e-5)
    # From cell 0: right to 1, down to 4, left to 3.
    answer = 1 * 25 + 2 * 5 + 3
    np.testing.assert_allclose(
        table[:, 0, answer], policies[:, 0, 1] + policies[:, 1, 2] + policies[:, 4, 3], rtol=1e-5
    )
    # From cell 4, right is the goal, after which actions tell nothing.
    np.testing.assert_allclose(table[:, 1, 1 * 25 + 7], policies[:, 4, 1] - 2 * np.log(5), rtol=1e-5)
    gains = expected_information_gain(table, np.zeros(5))
    actions = expected_information_gain(policies, np.zeros(5))
    assert gains[2] < 1e-6
    assert (gains[:2] > actions[np.array([0, 4])]).all()
    one = demonstration_log_likelihood(mdp, policies, np.arange(6), length=1)
    np.testing.assert_allclose(one[:, :5], policies[:, :5], rtol=1e-6)


def test_simulated_demonstrations_agree_with_enumerated_ones():
    mdp, policies = small_grid()
    starts, weights = np.arange(6), np.linspace(0.0, 1.0, 5)
    exact = expected_information_gain(demonstration_log_likelihood(mdp, policies, starts, length=4), weights)
    simulate = jax.jit(demonstration_information_gain, static_argnames=("length", "num_samples"))
    gain, error = simulate(jax.random.key(0), mdp, policies, weights, starts, length=4, num_samples=500)
    assert (np.abs(gain - exact) <= 4 * error + 1e-6).all()
    assert (error < 0.05).all()
    gain, error = simulate(jax.random.key(0), mdp, policies, weights, starts, length=1, num_samples=2)
    np.testing.assert_allclose(gain[:5], expected_information_gain(policies, weights)[:5], rtol=1e-5)
    assert gain[5] < 1e-7
    assert (error < 1e-7).all()


@pytest.mark.slow
def test_simulated_demonstrations_under_random_dynamics():
    mdp = random_mdp(jax.random.key(3), 3, 2, discount=0.9)
    policies = action_log_likelihood(mdp, 2 * jax.random.normal(jax.random.key(4), (4, 3, 2)), beta=1.0)
    transition, table = np.asarray(mdp.transition, np.float64), np.asarray(policies, np.float64)
    joint = []  # [N] probability of each trajectory s0 a0 s1 a1 s2 a2 from state 0
    for a0, s1, a1, s2, a2 in itertools.product(range(2), range(3), range(2), range(3), range(2)):
        chance = transition[0, a0, s1] * transition[s1, a1, s2]
        joint.append(chance * np.exp(table[:, 0, a0] + table[:, s1, a1] + table[:, s2, a2]))
    joint = np.stack(joint, axis=1)
    np.testing.assert_allclose(joint.sum(axis=1), 1.0, rtol=1e-5)
    exact = entropy(joint.mean(axis=0)) - np.mean([entropy(row) for row in joint])
    gain, error = demonstration_information_gain(
        jax.random.key(5), mdp, policies, np.zeros(4), np.array([0]), length=3, num_samples=2000
    )
    assert abs(gain[0] - exact) < 4 * error[0]
    assert error[0] < 0.02 * exact


@pytest.mark.slow
def test_information_gain_beats_random_questions():
    """32 seeds, the truth one of the hypotheses: less regret, better aligned and surer than random, paired by seed."""
    mdp = gridworld(4, 4, discount=0.9)
    keys = jax.random.split(jax.random.key(1), 5)
    features = jax.nn.one_hot(jax.random.randint(keys[0], (16,), 0, 4), 4)
    theta = jax.random.normal(keys[1], (128, 4))
    rewards = theta @ features.T

    def wander(key, reward):
        return sample_trajectories(key, mdp, soft_value_iteration(mdp, reward).log_policy, num=1, length=8)

    pool = jax.jit(jax.vmap(wander))(jax.random.split(keys[2], 20), jax.random.normal(keys[3], (20, 4)) @ features.T)
    returns = trajectory_returns(mdp, rewards, jax.tree.map(lambda x: x[:, 0], pool))
    table = choice_log_likelihood(returns, all_pairs(20), beta=2.0)

    truth_keys, loop_keys = jax.random.split(keys[4], (2, 32))
    truths = jax.vmap(lambda key: jax.random.randint(key, (), 0, 128))(truth_keys)

    @functools.partial(jax.jit, static_argnums=0)
    def final_weights(score):
        loop = lambda key, truth: query_loop(key, table, jnp.zeros(128), table[truth], score, num_queries=6)  # noqa: E731
        return jax.vmap(loop)(loop_keys, truths).log_weights[:, -1]

    @jax.jit
    @jax.vmap
    def quality(log_weights, truth):
        mean = jax.nn.softmax(log_weights) @ theta
        cosine = mean @ theta[truth] / (jnp.linalg.norm(mean) * jnp.linalg.norm(theta[truth]))
        policy = jnp.log(value_iteration(mdp, features @ mean).policy)
        best = mdp.initial @ value_iteration(mdp, rewards[truth]).value
        regret = best - expected_return(mdp, policy, rewards[truth])
        return jnp.stack([-regret, cosine, -hypothesis_entropy(log_weights)])

    asked, at_random = (quality(final_weights(s), truths) for s in (expected_information_gain, random_queries))
    low, _ = paired_difference_interval(jax.random.key(0), asked, at_random)
    assert (low > 0).all(), low


TABLE = np.log(np.full((3, 4, 2), 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_information_gain(TABLE, np.zeros(4)), r"log_weights \[N\].*\(4,\)"),
        (lambda: volume_removal(TABLE[0], np.zeros(4)), r"\[N, Q, K\].*\(4, 2\)"),
        (lambda: comparison_information_gain(TABLE, np.zeros(3), beta=1.0), r"returns must be \[N, M\]"),
        (lambda: joint_information_gain(TABLE, np.zeros(3), 1), r"batch must be \[k\]"),
        (lambda: select_queries(TABLE, np.zeros(3), 5), r"k must be in 1..4, got 5"),
        (lambda: select_queries(TABLE, np.zeros(3), 2, max_scenarios=0), "max_scenarios"),
        (lambda: update_weights(TABLE[:, 0], np.zeros(3), 2), r"answer must be in 0..1, got 2"),
        (lambda: update_weights(TABLE, np.zeros(3), 1), r"log_likelihood must be \[N, K\]"),
        (lambda: update_weights(bits_table(1, 0.0)[:, 0], np.array([0.0, -np.inf]), 1), "no hypothesis"),
        (lambda: query_loop(jax.random.key(0), TABLE, np.zeros(3), TABLE[0], random_queries, num_queries=5), "0..4"),
        (lambda: query_loop(jax.random.key(0), TABLE, np.zeros(3), TABLE, random_queries, num_queries=1), "true_log"),
        (lambda: choice_log_likelihood(np.zeros((2, 3)), np.array([[0, 3]]), beta=1.0), r"slates must be in 0..2"),
        (lambda: choice_log_likelihood(np.zeros((2, 3)), np.zeros((1, 2)), beta=1.0), r"slates integers \[Q, K\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_demonstration_questions_are_named():
    mdp, policies = small_grid()
    slippery = gridworld(2, 3, slip=0.2)
    with pytest.raises(ValueError, match="use demonstration_information_gain"):
        demonstration_log_likelihood(slippery, policies, np.array([0]), length=2)
    with pytest.raises(ValueError, match=r"starts must be in 0..5, got 0..6"):
        demonstration_log_likelihood(mdp, policies, np.array([0, 6]), length=2)
    with pytest.raises(ValueError, match=r"log_policies must be \[N, S, A\]"):
        demonstration_log_likelihood(mdp, policies[0], np.array([0]), length=2)
    with pytest.raises(ValueError, match="num_samples"):
        demonstration_information_gain(
            jax.random.key(0), mdp, policies, np.zeros(5), np.array([0]), length=2, num_samples=1
        )
