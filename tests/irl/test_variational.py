"""Mean-field fits with known optima and evidence; AVRIL's loss in NumPy, its optimum by SciPy, and its imitation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats

from jaxalign import Network, train
from jaxalign.irl.bayesian import (
    boltzmann_policy,
    direct_boltzmann_policy,
    gaussian_prior,
    log_posterior,
    unconstrained,
    uniform_prior,
)
from jaxalign.irl.trajectories import Trajectories, pad_trajectories, sample_trajectories
from jaxalign.irl.variational import (
    DemonstratedTransitions,
    avril,
    demonstrated_transitions,
    mean_field,
    mean_field_samples,
)
from jaxalign.mdp import gridworld, random_mdp


def fit(algorithm, steps, batch=None):
    """The last state, and the mean loss of the last fifth of the steps."""
    run = jax.jit(lambda key: train(algorithm, key, batch, length=steps))
    state, metrics = run(jax.random.key(0))
    assert set(metrics) > {"loss", "gradient_norm"}
    return state, float(metrics["loss"][-steps // 5 :].mean())


def test_a_gaussian_posterior_is_found_with_its_evidence():
    precision = np.array([[2.0, 0.9], [0.9, 1.0]])
    centre = np.array([0.5, -1.0])

    def density(reward):
        return -0.5 * (reward - centre) @ precision @ (reward - centre) + 3.0

    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, 1500))
    algorithm = mean_field(density, gaussian_prior(2), optimizer, num_samples=32)
    state, loss = fit(algorithm, 1500)
    # The best product of Gaussians has the posterior's mean and the diagonal of its precision.
    np.testing.assert_allclose(state.params["mean"], centre, atol=0.03)
    np.testing.assert_allclose(np.exp(-2 * state.params["log_scale"]), np.diag(precision), rtol=0.06)
    elbo = 3.0 + np.log(2 * np.pi) - 0.5 * np.log(np.diag(precision)).sum()
    assert -loss == pytest.approx(elbo, abs=0.03)
    assert elbo < 3.0 + np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]


def test_rewards_in_a_box_get_a_bound_on_the_evidence_and_nearly_the_mean():
    mdp = random_mdp(jax.random.key(0), 2, 2, discount=0.5)
    log_policy = boltzmann_policy(mdp, jnp.array([0.8, -0.3]), beta=4.0)
    demonstrations = sample_trajectories(jax.random.key(1), mdp, log_policy, num=4, length=4)
    prior = uniform_prior(2)
    posterior = log_posterior(mdp, demonstrations, prior, beta=4.0, policy=direct_boltzmann_policy)
    axis = (np.arange(80) + 0.5) / 40 - 1
    grid = np.array(list(itertools.product(axis, axis)))
    log_weights = np.asarray(jax.jit(jax.vmap(posterior))(jnp.asarray(grid, jnp.float32)), np.float64)
    evidence = scipy.special.logsumexp(log_weights) + 2 * np.log(axis[1] - axis[0])
    state, loss = fit(mean_field(posterior, prior, optax.adam(0.03), num_samples=16), 600)
    assert evidence - 0.5 < -loss < evidence + 0.02
    samples = mean_field_samples(jax.random.key(2), state.params, prior, num_samples=4000)
    assert samples.shape == (4000, 2)
    assert jnp.abs(samples).max() <= 1.0
    np.testing.assert_allclose(samples.mean(axis=0), scipy.special.softmax(log_weights) @ grid, atol=0.15)


def test_the_loss_is_the_negative_bound_of_its_own_samples():
    prior = uniform_prior(3)
    algorithm = mean_field(lambda r: -jnp.sum(r**2), prior, optax.sgd(0.0), num_samples=20_000, initial_scale=0.7)
    state = algorithm.init(jax.random.key(0))
    _, metrics = jax.jit(algorithm.step)(state, None)
    mean, scale = np.asarray(state.params["mean"]), np.exp(np.asarray(state.params["log_scale"]))
    np.testing.assert_allclose(scale, 0.7, rtol=1e-6)
    entropy = scipy.stats.norm.entropy(mean, scale).sum()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    points = mean + scale * np.random.default_rng(0).normal(size=(20_000, 3))
    values = jax.vmap(unconstrained(lambda r: -jnp.sum(r**2), prior))(jnp.asarray(points, jnp.float32))
    assert float(metrics["loss"]) == pytest.approx(-float(values.mean()) - entropy, abs=0.05)


def table(rows, columns):
    """A network that looks up row `observation` (an integer) of a table of parameters."""
    return Network(lambda key: 0.1 * jax.random.normal(key, (rows, columns)), lambda params, x: params[x])


def test_transitions_of_demonstrations_by_hand():
    demonstrations = pad_trajectories([([0, 1, 2], [1, 0, 1]), ([2], [0])])
    batch = demonstrated_transitions(demonstrations, jnp.arange(3) * 10, terminated=jnp.array([True, False]))
    np.testing.assert_array_equal(batch.observation, [0, 10, 20, 20, 0, 0])
    np.testing.assert_array_equal(batch.next_observation[:2], [10, 20])
    np.testing.assert_array_equal(batch.next_action[:2], [0, 1])
    np.testing.assert_array_equal(batch.weight, [1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.continues, [1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.terminated, [0, 0, 1, 0, 0, 0])
    assert not demonstrated_transitions(demonstrations, jnp.eye(3)).terminated.any()


def numpy_avril_loss(q, reward, batch, beta, discount, weight, prior_mean, prior_scale):
    """Step by step, with SciPy's densities and the textbook KL."""
    total, steps = 0.0, 0
    for s, a, s2, a2, real, continues, terminated in zip(*map(np.asarray, batch), strict=True):
        if not real:
            continue
        steps += 1
        mean, scale = np.split(reward[s], 2)
        scale = np.exp(scale)
        total -= beta * q[s, a] - scipy.special.logsumexp(beta * q[s])
        total += np.sum(
            np.log(prior_scale / scale) + (scale**2 + (mean - prior_mean) ** 2) / (2 * prior_scale**2) - 0.5
        )
        if continues or terminated:
            implied = q[s, a] - (discount * q[s2, a2] if continues else 0.0)
            total -= weight * scipy.stats.norm.logpdf(implied, mean[a], scale[a])
    return total / steps


def test_avril_loss_is_numpys():
    demonstrations = Trajectories(
        jnp.array([[0, 1, 2, 1], [2, 0, 1, 1]]), jnp.array([[1, 0, 1, 0], [0, 1, 1, 0]]),
        jnp.array([[True] * 4, [True, True, False, False]]),
    )  # fmt: skip
    batch = demonstrated_transitions(demonstrations, jnp.arange(3), terminated=jnp.array([False, True]))
    options = {"beta": 1.5, "discount": 0.8, "constraint_weight": 0.7, "prior_mean": 0.2, "prior_scale": 1.3}
    with jax.enable_x64(True):
        algorithm = avril(table(3, 2), table(3, 4), optax.sgd(0.1), **options)
        state = algorithm.init(jax.random.key(0))
        batch = batch._replace(weight=batch.weight.astype(jnp.float64))
        _, metrics = jax.jit(algorithm.step)(state, batch)
        q, reward = np.asarray(state.params["q"]), np.asarray(state.params["reward"])
        np.testing.assert_allclose(
            metrics["loss"], numpy_avril_loss(q, reward, batch, *options.values()), rtol=1e-10
        )
        parts = -metrics["log_likelihood"] + metrics["kl"] - 0.7 * metrics["constraint"]
        np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-12)


def test_avril_reaches_the_optimum_that_scipy_finds():
    # One state that ends at once; action 0 is taken three times in four.
    steps = jnp.zeros(4, jnp.int32)
    batch = DemonstratedTransitions(
        steps, jnp.array([0, 0, 0, 1]), steps, steps, jnp.ones(4), jnp.zeros(4, bool), jnp.ones(4, bool)
    )

    def loss(x):
        return numpy_avril_loss(x[None, :2], x[None, 2:], batch, 2.0, 0.9, 1.0, 0.0, 1.0)

    best = scipy.optimize.minimize(loss, np.zeros(6), tol=1e-9)
    algorithm = avril(table(1, 2), table(1, 4), optax.adam(0.02), beta=2.0, discount=0.9)
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (1500, *x.shape)), batch)
    state, value = fit(algorithm, 1500, repeated)
    assert value == pytest.approx(best.fun, abs=1e-3)
    np.testing.assert_allclose(state.params["q"][0], best.x[:2], atol=0.01)
    np.testing.assert_allclose(state.params["reward"][0], best.x[2:], atol=0.01)


@pytest.mark.slow
def test_avril_imitates_without_knowing_the_dynamics():
    mdp = gridworld(4, 4, slip=0.1)
    truth = jnp.zeros(16).at[5].set(1.0)
    log_policy = boltzmann_policy(mdp, truth, beta=5.0)
    demonstrations = sample_trajectories(jax.random.key(0), mdp, log_policy, num=200, length=20)
    batch = demonstrated_transitions(demonstrations, jnp.arange(16))
    algorithm = avril(table(16, 5), table(16, 10), optax.adam(0.05), beta=5.0, discount=0.9)
    state, _ = fit(algorithm, 400, jax.tree.map(lambda x: jnp.broadcast_to(x, (400, *x.shape)), batch))
    learned = jax.nn.log_softmax(5.0 * state.params["q"], axis=-1)
    gap = jnp.sum(jnp.exp(log_policy) * (log_policy - learned), axis=-1).mean()
    uniform_gap = jnp.sum(jnp.exp(log_policy) * (log_policy + jnp.log(5.0)), axis=-1).mean()
    assert gap < 0.15 * uniform_gap
    mean = state.params["reward"][:, :5]
    demonstrated = jnp.exp(log_policy) > 0.2
    assert jnp.where(demonstrated, mean, -jnp.inf).max(axis=1).argmax() == 5
