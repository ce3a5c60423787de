"""Priors against SciPy, the likelihood against NumPy and logistic regression, PolicyWalk against exact posteriors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.test_util import check_grads

from jaxalign.irl.bayesian import (
    boltzmann_log_likelihood,
    boltzmann_policy,
    direct_boltzmann_policy,
    dirichlet_prior,
    gaussian_move,
    gaussian_prior,
    grid_move,
    laplace_prior,
    log_likelihood,
    log_posterior,
    policy_walk,
    policy_walk_chain,
    soft_policy,
    unconstrained,
    uniform_prior,
)
from jaxalign.irl.trajectories import Trajectories, pad_trajectories, sample_trajectories
from jaxalign.mdp import TabularMDP, dense_transition, gridworld, random_mdp, soft_value_iteration, value_iteration

CONCENTRATION = np.array([0.7, 1.0, 2.5])
# name: (prior over 3 entries, its density by SciPy)
PRIORS = {
    "gaussian": (
        gaussian_prior(3, mean=0.5, scale=jnp.array([1.0, 2.0, 0.3])),
        lambda r: scipy.stats.norm.logpdf(r, 0.5, [1.0, 2.0, 0.3]).sum(),
    ),
    "laplace": (laplace_prior(3, location=-1.0, scale=0.5), lambda r: scipy.stats.laplace.logpdf(r, -1.0, 0.5).sum()),
    "uniform": (uniform_prior(3, low=-2.0, high=1.0), lambda r: scipy.stats.uniform.logpdf(r, -2.0, 3.0).sum()),
    "dirichlet": (
        dirichlet_prior(3, maximum=4.0, concentration=CONCENTRATION),
        # The scale stretches the two free coordinates.
        lambda r: scipy.stats.dirichlet.logpdf(r / r.sum(), CONCENTRATION) - 2 * np.log(4.0),
    ),
}
MEANS = {"gaussian": [0.5] * 3, "laplace": [-1.0] * 3, "uniform": [-0.5] * 3, "dirichlet": 4.0 * CONCENTRATION / 4.2}


@pytest.fixture(params=PRIORS)
def prior_case(request):
    return request.param, *PRIORS[request.param]


def test_prior_density_is_scipys_and_samples_have_its_mean(prior_case):
    name, prior, density = prior_case
    samples = jax.vmap(prior.sample)(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose(samples.mean(axis=0), MEANS[name], atol=0.05)
    for reward in np.asarray(samples[:5], np.float64):
        np.testing.assert_allclose(prior.log_prob(jnp.asarray(reward)), density(reward), rtol=1e-4, atol=1e-4)


def test_bijection_goes_there_and_back_and_its_jacobian_is_that_of_autodiff(prior_case):
    name, prior, _ = prior_case
    free = slice(0, 2) if name == "dirichlet" else slice(0, 3)
    for key in jax.random.split(jax.random.key(1), 3):
        reward = prior.sample(key)
        point = prior.unconstrain(reward)
        back, log_jacobian = prior.constrain(point)
        np.testing.assert_allclose(back, reward, rtol=1e-4, atol=1e-5)
        jacobian = jax.jacobian(lambda p: prior.constrain(p)[0][free])(point)
        np.testing.assert_allclose(log_jacobian, jnp.linalg.slogdet(jacobian)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prior",
    [
        gaussian_prior(2, scale=0.7),
        laplace_prior(2, location=0.3),
        uniform_prior(2, low=0.0, high=5.0),
        dirichlet_prior(3, maximum=2.0, concentration=1.5),
    ],
)
def test_density_over_points_integrates_to_one(prior):
    axis = np.linspace(-25.0, 25.0, 401)
    points = jnp.asarray(list(itertools.product(axis, axis)))
    density = jnp.exp(jax.vmap(unconstrained(prior.log_prob, prior))(points))
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=5e-3)


def test_outside_the_support_is_impossible_and_gradients_far_out_are_finite():
    assert uniform_prior(2).log_prob(jnp.array([0.0, 1.5])) == -jnp.inf
    dirichlet = dirichlet_prior((2, 2), maximum=3.0)
    assert dirichlet.log_prob(jnp.array([[1.0, 1.0], [1.0, 1.0]])) == -jnp.inf
    assert dirichlet.log_prob(jnp.array([[-1.0, 2.0], [1.0, 1.0]])) == -jnp.inf
    assert dirichlet.sample(jax.random.key(0)).shape == (2, 2)
    for prior in (uniform_prior(2), dirichlet_prior(3)):
        gradient = jax.grad(unconstrained(prior.log_prob, prior))(jnp.array([60.0, -150.0]))
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian_prior(2, scale=0.0), "gaussian_prior: scale"),
        (lambda: laplace_prior(2, scale=-1.0), "laplace_prior: scale"),
        (lambda: uniform_prior(2, low=1.0, high=1.0), "uniform_prior: low"),
        (lambda: dirichlet_prior(2, concentration=0.0), "dirichlet_prior: concentration"),
        (lambda: dirichlet_prior(1), "at least 2 entries"),
        (lambda: policy_walk(jax.random.key(0), jnp.sum, jnp.ones(2), num_samples=0, step_size=1.0), "num_samples=0"),
        (
            lambda: policy_walk(
                jax.random.key(0), jnp.sum, jnp.full(2, 3.0), num_samples=1, step_size=1.0, bounds=(-1, 1)
            ),
            "initial is out of bounds",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def world():
    """A grid with a goal and a demonstration cut short: (mdp, trajectories)."""
    mdp = gridworld(3, 3, slip=0.2, goal=8)
    policy = jnp.zeros((9, 5))
    return mdp, sample_trajectories(jax.random.key(4), mdp, policy, num=6, length=7)


def numpy_log_likelihood(mdp, reward, trajectories, beta):
    """Every step looked up on its own, Q* by 2,000 backups in float64."""
    transition, terminal = np.asarray(dense_transition(mdp.transition), np.float64), np.asarray(mdp.terminal)
    value, reward = np.zeros(len(terminal)), np.asarray(reward, np.float64)
    for _ in range(2000):
        q = reward[:, None] + float(mdp.discount) * transition @ value
        value = np.where(terminal, 0.0, q.max(axis=1))
    total = 0.0
    for states, actions, mask in zip(*map(np.asarray, trajectories), strict=True):
        for s, a in zip(states[mask], actions[mask], strict=True):
            total += beta * q[s, a] - scipy.special.logsumexp(beta * q[s])
    return total


def test_likelihood_is_numpys_step_by_step(world):
    mdp, trajectories = world
    assert not np.asarray(trajectories.mask).all()
    reward = jax.random.normal(jax.random.key(0), (9,))
    expected = numpy_log_likelihood(mdp, reward, trajectories, 1.7)
    np.testing.assert_allclose(boltzmann_log_likelihood(reward, mdp, trajectories, beta=1.7), expected, rtol=1e-5)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, mdp)
        exact = boltzmann_log_likelihood(
            np.asarray(reward, np.float64), double, trajectories, beta=1.7,
            policy=functools.partial(boltzmann_policy, tolerance=1e-12),
        )  # fmt: skip
        assert exact.dtype == jnp.float64
        expected = numpy_log_likelihood(double, reward, trajectories, 1.7)
        np.testing.assert_allclose(exact, expected, rtol=1e-9)


def test_padding_counts_nothing(world):
    mdp, trajectories = world
    reward = jnp.arange(9.0)
    garbage = Trajectories(
        jnp.where(trajectories.mask, trajectories.states, 3), jnp.where(trajectories.mask, trajectories.actions, 4),
        trajectories.mask,
    )  # fmt: skip
    np.testing.assert_allclose(
        boltzmann_log_likelihood(reward, mdp, garbage, beta=2.0),
        boltzmann_log_likelihood(reward, mdp, trajectories, beta=2.0),
        rtol=1e-6,
    )


def test_by_hand():
    # Discount 0.5: staying in state 0, which pays 1, is worth 2; leaving it for the terminal state 1.
    stay_or_leave = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    mdp = TabularMDP(stay_or_leave, jnp.array([1.0, 0.0]), jnp.array([False, True]), 0.5)
    trajectories = pad_trajectories([([0, 0], [0, 1])])
    expected = np.log(1 / (1 + np.exp(-1))) + np.log(1 / (1 + np.exp(1)))
    value = boltzmann_log_likelihood(jnp.array([1.0, 7.0]), mdp, trajectories, beta=1.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # beta 0 acts at random whatever the reward.
    np.testing.assert_allclose(
        boltzmann_log_likelihood(jnp.array([1.0, 7.0]), mdp, trajectories, beta=0.0), -2 * np.log(2), rtol=1e-6
    )


def test_without_a_future_it_is_multinomial_logistic_regression():
    mdp = random_mdp(jax.random.key(0), 4, 3, discount=0.0)
    trajectories = sample_trajectories(jax.random.key(1), mdp, jnp.zeros((4, 3)), num=5, length=6)
    logits = jax.random.normal(jax.random.key(2), (4, 3))
    rows = np.asarray(logits)[np.asarray(trajectories.states).ravel()]
    actions = np.asarray(trajectories.actions).ravel()
    probability = scipy.special.softmax(2.0 * rows, axis=1)
    expected = np.log(probability[np.arange(30), actions]).sum()
    for policy in (boltzmann_policy, direct_boltzmann_policy):
        likelihood = log_likelihood(mdp, trajectories, beta=2.0, policy=policy)
        np.testing.assert_allclose(likelihood(logits), expected, rtol=1e-5)
        gradient = np.zeros((4, 3))
        np.add.at(gradient, np.asarray(trajectories.states).ravel(), 2.0 * (np.eye(3)[actions] - probability))
        np.testing.assert_allclose(jax.grad(likelihood)(logits), gradient, rtol=1e-4, atol=1e-5)


def test_soft_policy_is_the_causal_entropy_one_and_meets_the_hard_one_when_sharp(world):
    mdp, trajectories = world
    reward = jax.random.normal(jax.random.key(3), (9,))
    expected = soft_value_iteration(mdp, reward, temperature=0.5).log_policy
    np.testing.assert_allclose(soft_policy(mdp, reward, beta=2.0), expected, rtol=1e-5)
    value = boltzmann_log_likelihood(reward, mdp, trajectories, beta=2.0, policy=soft_policy)
    chosen = np.asarray(expected)[np.asarray(trajectories.states), np.asarray(trajectories.actions)]
    np.testing.assert_allclose(value, chosen[np.asarray(trajectories.mask)].sum(), rtol=1e-5)
    # With Gaussian rewards the best action is unique, and both put all mass on it.
    sharp = [jnp.exp(policy(mdp, reward, beta=200.0))[:8] for policy in (boltzmann_policy, soft_policy)]
    np.testing.assert_allclose(*sharp, atol=1e-2)


@pytest.mark.parametrize("kind", ["grid", "dense", "goal", "action reward"])
def test_direct_policy_is_that_of_value_iteration(kind):
    mdp = {
        "grid": lambda: gridworld(4, 4, slip=0.1),
        "dense": lambda: random_mdp(jax.random.key(0), 12, 3, discount=0.95),
        "goal": lambda: gridworld(4, 4, goal=5),
        "action reward": lambda: random_mdp(jax.random.key(5), 6, 4, branching=2),
    }[kind]()
    shape = (mdp.num_states, mdp.num_actions) if kind == "action reward" else (mdp.num_states,)
    rewards = jax.random.normal(jax.random.key(1), (8, *shape))
    weight = jax.random.normal(jax.random.key(2), (mdp.num_states, mdp.num_actions))

    def scalar(policy, reward):
        return jnp.sum(weight * policy(mdp, reward, beta=1.5))

    direct, iterated = (
        jax.jit(jax.vmap(jax.value_and_grad(functools.partial(scalar, policy))))(rewards)
        for policy in (functools.partial(direct_boltzmann_policy, sweeps=2), boltzmann_policy)
    )
    np.testing.assert_allclose(direct[0], iterated[0], rtol=2e-4, atol=2e-3)
    np.testing.assert_allclose(direct[1], iterated[1], rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize("policy", [boltzmann_policy, direct_boltzmann_policy, soft_policy])
def test_jit_vmap_and_gradients(policy, world):
    _, trajectories = world
    with jax.enable_x64(True):
        mdp = gridworld(3, 3, slip=0.2, goal=8)
        if policy is not direct_boltzmann_policy:
            policy = functools.partial(policy, tolerance=1e-10)
        posterior = log_posterior(mdp, trajectories, gaussian_prior(9), beta=1.3, policy=policy)
        rewards = jax.random.normal(jax.random.key(0), (3, 9), jnp.float64)
        alone = jnp.stack([posterior(reward) for reward in rewards])
        np.testing.assert_allclose(jax.jit(jax.vmap(posterior))(rewards), alone, rtol=1e-7)
        check_grads(posterior, (rewards[0],), order=1, modes=["rev"], eps=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_the_maximum_of_the_likelihood_acts_like_the_demonstrator():
    mdp = gridworld(3, 3, slip=0.1)
    truth = jnp.zeros(9).at[4].set(1.0)
    log_policy = boltzmann_policy(mdp, truth, beta=3.0)
    demonstrations = sample_trajectories(jax.random.key(0), mdp, log_policy, num=400, length=10)
    posterior = log_posterior(mdp, demonstrations, gaussian_prior(9), beta=3.0, policy=direct_boltzmann_policy)
    ascend = jax.jit(lambda r: jax.lax.fori_loop(0, 400, lambda _, r: r + 2e-4 * jax.grad(posterior)(r), r))
    reward = ascend(jnp.zeros(9))
    assert int(jnp.argmax(reward)) == 4
    difference = jnp.exp(boltzmann_policy(mdp, reward, beta=3.0)) - jnp.exp(log_policy)
    assert jnp.abs(difference).mean() < 0.04
    assert posterior(reward) > posterior(truth)


def gaussian_density(reward):
    """N([1, -1], [[1, 0.8], [0.8, 1]])."""
    centred = reward - jnp.array([1.0, -1.0])
    return -0.5 * centred @ jnp.linalg.solve(jnp.array([[1.0, 0.8], [0.8, 1.0]]), centred)


def test_policy_walk_finds_the_moments_of_a_gaussian():
    def chain(key):
        return policy_walk_chain(
            key, gaussian_density, jnp.zeros(2), num_samples=500, step_size=1.2, burn_in=200, thinning=5
        )

    walks = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(0), 64))
    samples = walks.samples.reshape(-1, 2)
    np.testing.assert_allclose(samples.mean(axis=0), [1.0, -1.0], atol=0.05)
    np.testing.assert_allclose(np.cov(samples.T), [[1.0, 0.8], [0.8, 1.0]], atol=0.06)
    assert 0.2 < walks.acceptance_rate.mean() < 0.6
    np.testing.assert_allclose(
        walks.log_posterior[0], jax.vmap(gaussian_density)(walks.samples[0]), rtol=1e-4, atol=1e-5
    )


def walk_to_occupancy(log_density, cells, **options):
    """How often many chains visit each of the cells [n], density over the last axis."""
    starts = jnp.zeros((200, 1))
    chains = jax.vmap(lambda key, start: policy_walk(key, log_density, start, burn_in=100, thinning=3, **options))
    samples = jax.jit(chains)(jax.random.split(jax.random.key(3), 200), starts)
    return np.histogram(np.asarray(samples).ravel(), cells)[0] / samples.size


@pytest.mark.parametrize("slope", [0.0, 2.0])
def test_reflection_at_the_bounds_keeps_the_density_up_to_them(slope):
    cells = np.linspace(-1.0, 1.0, 11)
    found = walk_to_occupancy(lambda r: slope * r[0], cells, num_samples=500, step_size=0.8, bounds=(-1.0, 1.0))
    mass = np.diff(cells if slope == 0 else np.exp(slope * cells))
    assert 0.5 * np.abs(found - mass / mass.sum()).sum() < 0.01


def test_clipping_at_the_bounds_would_be_seen():
    def clipped(key, reward, *, step_size, bounds):
        return jnp.clip(reward + step_size * jax.random.normal(key, reward.shape), *bounds)

    cells = np.linspace(-1.0, 1.0, 11)
    options = {"num_samples": 500, "step_size": 0.8, "bounds": (-1.0, 1.0), "move": clipped}
    found = walk_to_occupancy(lambda r: 0.0 * r[0], cells, **options)
    assert 0.5 * np.abs(found - 0.1).sum() > 0.2


@pytest.mark.slow
def test_grid_walk_has_the_enumerated_posterior():
    mdp = random_mdp(jax.random.key(0), 2, 2, discount=0.5)
    demonstrations = sample_trajectories(jax.random.key(1), mdp, jnp.zeros((2, 2)), num=2, length=3)
    posterior = log_posterior(mdp, demonstrations, uniform_prior(2), beta=4.0)
    axis = np.linspace(-1.0, 1.0, 5)
    grid = jnp.asarray(list(itertools.product(axis, axis)), jnp.float32)
    exact = jax.nn.softmax(jax.vmap(posterior)(grid))

    def chain(key):
        return policy_walk(
            key, posterior, jnp.zeros(2), num_samples=400, step_size=0.5, burn_in=100, thinning=4,
            bounds=(-1.0, 1.0), move=grid_move,
        )  # fmt: skip

    samples = jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(2), 128)).reshape(-1, 2)
    cell = np.rint((np.asarray(samples) + 1.0) / 0.5).astype(int)
    np.testing.assert_allclose(samples, -1.0 + 0.5 * cell, atol=1e-6)
    found = np.bincount(cell @ [5, 1], minlength=25) / len(cell)
    assert 0.5 * np.abs(found - np.asarray(exact)).sum() < 0.02
    assert 0.5 * np.abs(np.asarray(exact) - 1 / 25).sum() > 0.1  # the demonstrations do say something


@pytest.mark.parametrize("move", [gaussian_move, grid_move])
def test_moves_stay_in_bounds_and_are_as_likely_back_as_forth(move):
    low, high = jnp.array([-1.0, 0.0]), jnp.array([1.0, 3.0])
    rewards = jnp.array([[-1.0, 0.0], [0.5, 2.5], [1.0, 3.0]])
    for step_size in (0.5, 7.0):
        keys = jax.random.split(jax.random.key(0), 2000)
        for reward in rewards:
            moved = jax.vmap(lambda key: move(key, reward, step_size=step_size, bounds=(low, high)))(keys)  # noqa: B023
            assert bool(((moved >= low[None]) & (moved <= high[None])).all())
    # Counts of moves among cells, started uniformly, must be symmetric.
    start = jnp.linspace(0.0, 1.0, 5)[jax.random.randint(jax.random.key(1), (40_000, 1), 0, 5)]
    step = functools.partial(move, step_size=0.25, bounds=(0.0, 1.0))
    if move is gaussian_move:
        start = jax.random.uniform(jax.random.key(1), (40_000, 1))
    after = jax.vmap(lambda key, r: step(key, r))(jax.random.split(jax.random.key(2), 40_000), start)
    cell = lambda r: np.minimum(np.asarray(r)[:, 0] * 5, 4).astype(int)  # noqa: E731
    flow = np.zeros((5, 5))
    np.add.at(flow, (cell(start), cell(after)), 1)
    assert (np.abs(flow - flow.T) <= 4 * np.sqrt(flow + flow.T + 1)).all()
    assert np.trace(flow) < 40_000


def test_impossible_and_undefined_rewards_are_never_entered():
    def density(reward):
        return jnp.where(reward[0] > 1.0, jnp.nan, jnp.where(reward[0] < -1.0, -jnp.inf, 0.0))

    walk = policy_walk_chain(jax.random.key(0), density, jnp.array([0]), num_samples=400, step_size=2.0)
    assert jnp.abs(walk.samples).max() <= 1.0
    assert 0.1 < walk.acceptance_rate < 0.9
    assert walk.samples.dtype == jnp.float32


@pytest.mark.slow
def test_thousands_of_rewards_are_one_program():
    mdp = gridworld(5, 5, slip=0.1)
    truth = jax.random.uniform(jax.random.key(7), (25,), minval=-1, maxval=1)
    plan = value_iteration(mdp, truth)
    demonstrations = sample_trajectories(jax.random.key(0), mdp, jax.nn.log_softmax(3 * plan.q), num=20, length=10)
    likelihood = log_likelihood(mdp, demonstrations, beta=3.0)
    rewards = jax.vmap(uniform_prior(25).sample)(jax.random.split(jax.random.key(1), 500))
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(likelihood)))(rewards.at[0].set(truth))
    assert gradients.shape == (500, 25)
    assert bool(jnp.isfinite(gradients).all())
    assert (values < values[0]).mean() > 0.99
