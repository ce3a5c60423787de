"""Best-of-n against hand numbers, every subset and sampling; its KL by enumeration; laws; the study in miniature."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import comb

from jaxalign import sweep
from jaxalign.environments import check_environment
from jaxalign.environments.point_mass import PointMassState, point_mass
from jaxalign.preferences.comparisons import Comparisons
from jaxalign.preferences.reward_ensemble import ensemble_rewards
from jaxalign.preferences.reward_networks import trajectory_reward
from jaxalign.rl.actor_critic import actor_critic
from jaxalign.rlhf.overoptimization import (
    best_of_n,
    best_of_n_kl,
    fit_best_of_n_law,
    fit_reinforcement_law,
    law_intervals,
)
from jaxalign.rlhf.overoptimization_study import Setting, over_optimization, roll_out
from jaxalign.rlhf.proxy_rewards import fit_proxy, masked_mlp

estimate = jax.jit(best_of_n)


@pytest.fixture
def rewards():
    return np.random.default_rng(1).normal(size=(2, 7))


def over_subsets(proxy, gold, n):
    """Means over every subset of size n; where several are best, each counts the same."""
    best = []
    for subset in itertools.combinations(range(len(proxy)), n):
        chosen = [i for i in subset if proxy[i] == max(proxy[j] for j in subset)]
        best.append((proxy[chosen[0]], np.mean(gold[chosen])))
    return np.mean(best, axis=0)


def test_three_samples_by_hand():
    # Of the subsets {1,2}, {1,3}, {2,3} the best proxies are 2, 3, 3, worth 6, 3, 3.
    proxy, gold = estimate(jnp.array([3.0, 1.0, 2.0]), jnp.array([3.0, 0.0, 6.0]), jnp.array([1, 2, 3]))
    np.testing.assert_allclose(proxy, [2, 8 / 3, 3], rtol=1e-6)
    np.testing.assert_allclose(gold, [3, 4, 3], rtol=1e-6)


def test_equals_the_mean_over_every_subset(rewards):
    for proxy in (rewards[0], np.round(rewards[0])):  # without ties, and with
        expected = [over_subsets(proxy, rewards[1], n) for n in range(1, 8)]
        with jax.enable_x64(True):
            found = estimate(proxy, rewards[1], np.arange(1, 8))
            np.testing.assert_allclose(np.stack(found, 1), expected, rtol=1e-12)
        np.testing.assert_allclose(np.stack(estimate(proxy, rewards[1], np.arange(1, 8)), 1), expected, atol=1e-5)


def test_one_is_the_mean_and_all_is_the_maximum():
    proxy, gold = np.random.default_rng(2).normal(size=(2, 4096)).astype(np.float32)
    best_proxy, best_gold = estimate(proxy, gold, np.array([1, 4096]))
    np.testing.assert_allclose(best_proxy, [proxy.mean(), proxy.max()], atol=1e-5)
    np.testing.assert_allclose(best_gold, [gold.mean(), gold[proxy.argmax()]], atol=1e-5)
    one_value = estimate(np.zeros(4096), gold, np.array([7]))  # all tied: any of them
    np.testing.assert_allclose(one_value[1], gold.mean(), atol=1e-5)


def test_weights_keep_their_digits_in_single_precision():
    size, n = 4096, 300
    exact = [float(comb(i - 1, n - 1, exact=True) / comb(size, n, exact=True)) for i in range(1, size + 1)]
    # Each sample's weight is the gradient of the result by its gold reward.
    weight = jax.jit(jax.grad(lambda gold: best_of_n(jnp.arange(float(size)), gold, jnp.array([n]))[1][0]))
    weights = weight(jnp.zeros(size))
    np.testing.assert_allclose(weights, exact, rtol=1e-4, atol=1e-12)


def test_agrees_with_sampling():
    rng = np.random.default_rng(3)
    proxy = rng.normal(size=50)
    gold = proxy - 0.5 * proxy**2
    drawn = np.stack([rng.choice(50, 8, replace=False) for _ in range(20_000)])
    best = np.take_along_axis(drawn, proxy[drawn].argmax(axis=1, keepdims=True), 1)[:, 0]
    found = estimate(proxy, gold, np.array([8]))
    for mean, values in zip(found, (proxy[best], gold[best]), strict=True):
        assert abs(mean[0] - values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_vmap_traced_n_and_what_is_refused(rewards):
    lanes = np.stack([rewards, rewards[:, ::-1] ** 2], axis=1)
    together = jax.jit(jax.vmap(best_of_n, (0, 0, None)))(*lanes, jnp.array([2, 5]))
    alone = [estimate(*lanes[:, i], jnp.array([2, 5])) for i in range(2)]
    np.testing.assert_allclose(np.stack(together), np.stack(alone, 1), rtol=1e-6)
    with pytest.raises(ValueError, match=r"must be in 1\.\.7"):
        best_of_n(*rewards, np.array([8]))
    assert np.isnan(estimate(*rewards, np.array([8]))[0][0])
    assert np.isnan(estimate(np.append(rewards[0], np.nan), np.zeros(8), np.array([8]))[0][0])
    with pytest.raises(AssertionError):
        best_of_n(rewards[0][:, None], rewards[1], np.array([1]))


def test_kl_of_best_of_n():
    np.testing.assert_allclose(best_of_n_kl(np.array([1, 2, 4])), [0, np.log(2) - 0.5, np.log(4) - 0.75], atol=1e-7)
    # Of M equally likely samples the i-th is the best of n with probability (i/M)^n - ((i-1)/M)^n.
    size = 100_000
    edges = np.arange(size + 1) / size
    for n in (2, 9):
        p = np.diff(edges**n)
        exact = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) * size), 0))
        np.testing.assert_allclose(jax.jit(best_of_n_kl)(n), exact, rtol=1e-4)


@pytest.mark.parametrize(
    ("law", "shape", "peak"),
    [
        (fit_best_of_n_law, lambda d: d * (2 - 0.5 * d), (2.0, 2.0)),
        (fit_reinforcement_law, lambda d: d * (2 - 0.5 * np.log(np.maximum(d, 1e-9))), (np.exp(3), 0.5 * np.exp(3))),
    ],
)
def test_laws_are_recovered(law, shape, peak):
    law = jax.jit(law)
    d = np.tile(np.linspace(0, 4, 9), (6, 1))
    np.testing.assert_allclose(law(d, shape(d)), [2, 0.5, *peak], rtol=1e-4)
    design = np.stack([d.ravel(), shape(d).ravel() / 0.5 - 4 * d.ravel()], 1)  # d and -d^2, or -d log d
    gain = shape(d) + np.random.default_rng(0).normal(size=d.shape)
    expected = np.linalg.lstsq(design, gain.ravel(), rcond=None)[0]
    np.testing.assert_allclose(law(d, gain)[:2], expected, rtol=1e-3)
    low, high = law_intervals(jax.random.key(0), law, d, gain, resamples=200)
    assert low.alpha < law(d, gain).alpha < high.alpha
    assert low.beta < law(d, gain).beta < high.beta
    assert np.isinf(law(d, d * (1 + d)).peak_distance)  # it only rises
    assert np.isnan(law(np.ones((2, 3)), np.ones((2, 3))).alpha)  # one distance tells nothing


def test_more_of_n_than_there_are_samples_is_refused():
    one = jnp.zeros(1)
    with pytest.raises(ValueError, match=r"ns in 1\.\.8"):
        over_optimization(Setting(4, 10, one, one > 0, one), jax.random.key(0), ns=(1, 16), samples=8)


def test_the_point_mass_by_hand():
    world = point_mass(horizon=2)
    check_environment(world)
    state = PointMassState(jnp.array([0.9, 0.0]), jnp.array([0.8, 0.0]), jnp.zeros((), jnp.int32))
    step = jax.jit(world.step)
    # velocity 0.9 * 0.8 + 0.25 * 0.32 = 0.8, position 0.9 + 0.25 * 0.8 = 1.1: inside the hazard, 0.9 from the goal
    first = step(jax.random.key(0), state, jnp.array([0.32, 0.0]))
    np.testing.assert_allclose(first.observation, [1.1, 0, 0.8, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(first.reward, -0.9 - 3 - 0.02 * 0.32**2, rtol=1e-6)
    assert not first.terminated
    last = step(jax.random.key(0), first.state, jnp.array([30.0, 0.0]))  # away, at a cost of 18
    np.testing.assert_allclose(last.reward, -abs(1.1 + 0.25 * (0.72 + 7.5) - 2) - 18, rtol=1e-5)
    assert last.terminated


def test_the_kl_of_episodes_is_the_sum_over_their_steps():
    world = point_mass(horizon=5)
    model = actor_critic(world, hidden=(4,))
    shift = jnp.array([0.3, -0.4])

    @jax.jit
    def roll(key):
        reference = model.init(key)
        # Unit normals whose means are moved by `shift` at every state: half its square a step.
        moved = jax.tree.map(lambda x: x + shift if x.shape == (2,) else x, reference["actor"])
        policy = {**reference, "actor": moved}
        return roll_out(key, world, model, policy, reference, episodes=3, num_steps=5)

    trajectories = roll(jax.random.key(0))
    assert trajectories.features.shape == (3, 5, 6)
    np.testing.assert_allclose(trajectories.kl.sum(axis=1), 5 * 0.5 * 0.25, rtol=1e-4)
    # The features hold the force and the velocity after it, v <- 0.9 v + 0.25 force.
    velocity, force = trajectories.features[..., 2:4], trajectories.features[..., 4:]
    np.testing.assert_allclose(velocity[:, 1:], 0.9 * velocity[:, :-1] + 0.25 * force[:, 1:], atol=1e-5)


def test_a_masked_network_is_the_narrow_one():
    x = jax.random.normal(jax.random.key(1), (4, 5, 3))

    @jax.jit
    def both(key, width):
        wide = masked_mlp(3, width, max_width=8)
        params = wide.init(key)
        narrow = {
            "kernels": [params["kernels"][0][:, :2], params["kernels"][1][:2, :2], params["kernels"][2][:2]],
            "biases": [b[:2] for b in params["biases"]],
        }
        gradient = jax.grad(lambda p: wide.apply(p, x).sum())(params)["kernels"][1]
        return wide.apply(params, x), masked_mlp(3, 2, max_width=2).apply(narrow, x), gradient

    wide, narrow, gradient = both(jax.random.key(0), jnp.array(2))
    np.testing.assert_allclose(wide, narrow, rtol=1e-5)
    assert gradient[:2, :2].all()
    assert not gradient[2:].any()
    assert not gradient[:, 2:].any()


def test_a_proxy_learns_from_the_first_preferences_only():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 200, 3, 2)).astype(np.float32)
    returns = x[..., 0].sum(axis=-1)
    mask = jnp.ones((200, 3), bool)
    # The first 100 are compared by their first feature; the others the wrong way round.
    outcome = jnp.asarray((returns[0] < returns[1]) ^ (np.arange(200) >= 100), jnp.int32)
    first, second = jnp.asarray(x)
    data = Comparisons(first, mask, second, mask, outcome=outcome, index=jnp.arange(200))
    network = masked_mlp(2, 4, max_width=4)

    @jax.jit
    def agreement(key, preferences):
        params = fit_proxy(key, network, data, preferences, members=2, steps=200, evaluations=4)
        rewards = [ensemble_rewards(trajectory_reward(network), params, side, mask) for side in (first, second)]
        return jnp.mean((rewards[0] > rewards[1]) == (returns[0] > returns[1])[None], axis=1)

    assert (agreement(jax.random.key(0), 100) > 0.9).all()
    assert (agreement(jax.random.key(0), 200) < 0.9).all()


@pytest.fixture(scope="module")
def study():
    """Two settings and four seeds of the whole experiment, with ensembles of two pursued in two ways."""
    run = functools.partial(
        over_optimization, ns=(1, 4, 64), members=2, max_width=8, max_preferences=512, samples=512, reward_steps=300,
        checks=2, rollouts_per_check=2, horizon=12, learning_rate=2e-3, beta=1.0,
    )  # fmt: skip
    ways = {"caution": jnp.zeros((2, 2)), "worst": jnp.array([[False, True]] * 2), "kl_coefficient": jnp.zeros((2, 2))}
    settings = Setting(jnp.array([8, 8]), jnp.array([10, 512]), **ways)
    return sweep(run, settings, jax.random.split(jax.random.key(0), 4), mode="map")


@pytest.mark.slow
def test_the_study_begins_at_the_reference(study):
    assert study.gold.shape == study.kl.shape == (2, 4, 2, 3)
    np.testing.assert_allclose(study.best_gold[..., 0], 0, atol=1e-4)  # the best of one is the reference
    np.testing.assert_allclose(study.best_proxy[:, :, 0, 0], 0, atol=1e-4)  # the members' mean is standardised
    assert (study.best_proxy[:, :, 1, 0] < 0).all()  # the worst of them is below
    np.testing.assert_array_equal(study.kl[..., 0], 0)
    assert (study.kl[..., -1] > 0.01).all()


@pytest.mark.slow
def test_the_study_learns_and_pursues_a_proxy(study):
    few, many = study.accuracy.mean(axis=1)
    assert many > 0.75
    assert many > few
    assert study.best_gold[1, :, 0, -1].mean() > study.best_gold[0, :, 0, -1].mean()
    assert (np.diff(study.best_proxy, axis=-1) > 0).all()  # more choice, more proxy
    assert (study.proxy[1, ..., -1] > study.proxy[1, ..., 0]).all()
    assert all(np.isfinite(x).all() for x in study)
