"""Reinforcement learning from preferences: a known best policy is found, and the true reward stays unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, sweep, train
from jaxalign.environments import bernoulli_bandit, cartpole, flat_size
from jaxalign.preferences.reward_networks import trajectory_reward
from jaxalign.rl import ActorCritic, encode, ppo_optimizer
from jaxalign.rl.policies import categorical
from jaxalign.rlhf.annotators import boltzmann_annotator, return_scorer
from jaxalign.rlhf.human_feedback import Scored
from jaxalign.rlhf.preference_rl import preference_rl, score_ensemble, score_rl

ARMS = jnp.array([0.0, 1.0, 0.25])


def paying(scale, shift):
    """A bandit whose arms pay scale * ARMS + shift."""
    bandit = bernoulli_bandit(np.ones((1, 3)))

    def step(key, state, action):
        return bandit.step(key, state, action)._replace(reward=scale * ARMS[action] + shift)

    return bandit.replace(step=step)


PERFECT = boltzmann_annotator(beta=jnp.inf)
SIZES = {
    "ensemble_size": 2, "segment_length": 2, "queries_per_round": 4, "rollouts_per_round": 2, "reward_steps": 5,
    "reward_batch": 16, "capacity": 64, "num_envs": 8, "num_steps": 8, "num_epochs": 2, "num_minibatches": 2,
    "discount": 0.0,
}  # fmt: skip


def table(world):
    """A policy and values without hidden layers, which compile in half the time."""
    size, actions = flat_size(world.observation_space), flat_size(world.action_space)

    def init(key):
        return {"logits": jnp.zeros((size, actions)), "values": jnp.zeros(size)}

    def seen(observations):
        return encode(world.observation_space, observations)

    return ActorCritic(
        init,
        lambda params, observations: categorical(seen(observations) @ params["logits"]),
        lambda params, observations: seen(observations) @ params["values"],
    )


def learner(make=preference_rl, world=None, **options):
    world = paying(1.0, 0.0) if world is None else world
    width = flat_size(world.observation_space) + flat_size(world.action_space) + 1
    linear = Network(lambda key: 0.1 * jax.random.normal(key, (width,)), lambda params, x: x @ params)
    who = {"scorer": return_scorer()} if make is score_rl else {"annotator": PERFECT}
    return make(
        world,
        table(world),
        ppo_optimizer(0.1),
        trajectory_reward(linear),
        optax.adam(0.05),
        **{**who, **SIZES, **options},
    )


@pytest.fixture(scope="module")
def learned():
    """Eight seeds, [2, 8, ...]: the bandit, and one that pays otherwise, of which the annotator is told the first."""

    def run(pays, key):
        scale, shift = pays
        algorithm = learner(world=paying(scale, shift), judged=lambda steps: (steps.rewards - shift) / scale)
        return train(algorithm, key, None, length=10)

    return sweep(run, (jnp.array([1.0, -4.0]), jnp.array([0.0, 8.0])), jax.random.split(jax.random.key(0), 8))


def test_eight_seeds_learn_the_best_arm_from_comparisons(learned):
    state, metrics = jax.tree.map(lambda x: x[0], learned)
    assert metrics["loss"].shape == (8, 10)
    found = np.asarray(metrics["reward"])
    assert (found[:, 0] < 0.7).all()  # arms at random pay 0.42
    assert np.mean(found[:, -1]) > 0.9  # the best arm pays 1
    np.testing.assert_array_equal(metrics["labels"][:, -1], 40.0)
    np.testing.assert_array_equal(state.buffer.count, 40)
    assert state.reward.bootstrap_key.shape == (8, 2)
    np.testing.assert_array_equal(state.step, 10)
    # Where a round's segments differ, the ensemble orders them well before it is told.
    assert np.nanmean(np.asarray(metrics["episode/agreement"])[:, 3:]) > 0.85


def test_seeds_have_answers_of_their_own(learned):
    outcomes = np.asarray(learned[0].buffer.rows.outcome)[0, :, :40]
    assert len({tuple(row) for row in outcomes}) == 8
    assert set(outcomes.ravel()) == {0, 1}


def test_the_true_reward_reaches_the_annotator_only(learned):
    """The answers were the same, and so is every bit of what was learned, whatever the environment paid."""
    state = learned[0]
    for name in ("params", "opt_state", "reward", "buffer"):
        for leaf in jax.tree.leaves(getattr(state, name)):
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(leaf[0], leaf[1])
    assert not np.array_equal(state.steps.rewards[0], state.steps.rewards[1])


@pytest.mark.slow
def test_scores_teach_as_well():
    run = jax.jit(
        jax.vmap(
            lambda key: train(learner(score_rl, reward_steps=20, entropy_coefficient=0.05), key, None, length=10)[1]
        )
    )
    metrics = run(jax.random.split(jax.random.key(0), 4))
    assert np.mean(np.asarray(metrics["reward"])[:, -1]) > 0.9
    assert np.asarray(metrics["reward/loss"])[:, -1].mean() < 0.05  # squared error of sums of two


def test_score_regression_finds_the_least_squares_weights():
    network = trajectory_reward(Network(lambda key: jax.random.normal(key, (2,)), lambda params, x: x @ params))
    features = jax.random.normal(jax.random.key(0), (16, 3, 2))
    mask = jnp.arange(3)[None] < jnp.array([3, 2] * 8)[:, None]
    sums = np.where(np.asarray(mask)[..., None], np.asarray(features, np.float64), 0.0).sum(axis=1)
    scores = sums @ [1.0, -2.0] + np.random.default_rng(0).normal(size=16)
    batch = Scored(features, mask, jnp.asarray(scores, jnp.float32))
    algorithm = score_ensemble(network, optax.sgd(0.05), size=2)

    def repeat(state, _):
        return algorithm.step(state, batch)

    state, metrics = jax.jit(lambda key: jax.lax.scan(repeat, algorithm.init(key), None, length=300))(jax.random.key(1))
    best, residual, *_ = np.linalg.lstsq(sums, scores)
    np.testing.assert_allclose(state.params, np.stack([best, best]), atol=1e-3)
    np.testing.assert_allclose(metrics["loss"][-1], np.full(2, residual[0] / 16), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "select"), [(preference_rl, "information"), (preference_rl, "random"), (score_rl, "disagreement")]
)
def test_the_other_ways_to_ask_keep_shapes(make, select):
    algorithm = learner(make, cartpole(), select=select, num_steps=8, segment_length=8)
    start = jax.eval_shape(algorithm.init, jax.random.key(0))
    after, metrics = jax.eval_shape(lambda state: algorithm.step(state, None), start)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), start) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    assert {"loss", "labels", "reward/loss", "episode/agreement", "reward/learned"} <= metrics.keys()
    assert ("reward/accuracies" in metrics) == ("feedback/ties" in metrics) == (make is preference_rl)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (preference_rl, {"select": "best"}, "select must be one of disagreement, information, random, got 'best'"),
        (score_rl, {"select": "information"}, "select must be disagreement or random, got 'information'"),
        (preference_rl, {"segment_length": 9}, "needs 1 <= length <= 8 steps"),
        (preference_rl, {"capacity": 3}, "4 rows do not fit a buffer of 3"),
    ],
)
def test_what_makes_no_sense_is_refused(make, options, message):
    def trace():
        algorithm = learner(make, **options)
        return algorithm.step(algorithm.init(jax.random.key(0)), None)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(trace)
