"""Risk measures by hand, at their limits, against SciPy and optimisers; tails of known distributions; nested risk."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.optimize import minimize_scalar

from jaxalign.mdp import CVaR, TabularMDP, robust_policy_evaluation, worst_case_cvar
from jaxalign.rl.risk import cvar, cvar_advantages, cvar_objective, entropic_risk, value_at_risk
from jaxalign.rl.tail_risk import pareto_tail, tail_risk

KEY = jax.random.key(0)
RETURNS = np.random.default_rng(0).normal(size=37)


def assert_close(x, y, **tolerance):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), **({"atol": 1e-5} | tolerance))


def test_by_hand():
    x = jnp.array([4.0, 1.0, 3.0, 2.0])
    assert_close([cvar(x, a) for a in (0.0, 0.1, 0.25, 0.375, 0.5, 1.0)], [1, 1, 1, (1 + 0.5 * 2) / 1.5, 1.5, 2.5])
    assert_close([value_at_risk(x, a) for a in (0.0, 0.25, 0.26, 0.5, 1.0)], [1, 1, 2, 2, 4])
    assert_close(entropic_risk(jnp.array([0.0, 1.0]), beta=1.0), -np.log((1 + np.exp(-1)) / 2))
    assert_close(cvar_advantages(x, alpha=0.5), [0.0, -2.0, 0.0, 0.0])
    assert_close(cvar_objective(-x, -2.0, alpha=0.5), [-2.0, 0.0, -2.0, -2.0])


@pytest.mark.parametrize("alpha", [0.02, 0.3, 0.5, 0.73, 1.0])
def test_cvar_is_the_best_of_its_objective_and_the_worst_case(alpha):
    losses = -RETURNS
    objective = lambda t: np.mean(t + np.maximum(losses - t, 0) / alpha)  # noqa: E731
    best = min(objective(t) for t in losses)  # piecewise linear: the minimum is at a kink
    assert_close(cvar(RETURNS, alpha), -best)
    assert_close(cvar(RETURNS, alpha), worst_case_cvar(RETURNS, np.full(37, 1 / 37), alpha))
    at_var = cvar_objective(losses, -value_at_risk(RETURNS, alpha), alpha=alpha).mean()
    assert_close(at_var, -cvar(RETURNS, alpha))
    found = minimize_scalar(objective, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).fun
    assert_close(found, best, atol=1e-6)
    assert_close(value_at_risk(RETURNS, alpha), np.quantile(RETURNS, alpha, method="inverted_cdf"))


def test_a_tenth_of_ten_is_one():
    x = jnp.arange(10.0)
    for tenths in range(1, 11):
        assert value_at_risk(x, tenths / 10) == tenths - 1


def test_normal_samples_have_the_normal_tail():
    x, alphas = jax.random.normal(KEY, (200_000,)), jnp.array([0.05, 0.2])
    quantile = scipy.stats.norm.ppf(np.asarray(alphas))
    assert_close(jax.vmap(value_at_risk, (None, 0))(x, alphas), quantile, atol=0.02)
    assert_close(jax.vmap(cvar, (None, 0))(x, alphas), -scipy.stats.norm.pdf(quantile) / np.asarray(alphas), atol=0.02)
    assert_close(entropic_risk(x, beta=0.5), -0.25, atol=0.01)  # -beta variance / 2


def test_entropic_risk_between_mean_and_least():
    betas = np.array([-2.0, -1e-3, 0.0, 1e-6, 1e-3, 0.7, 5.0, 1e5])
    found = jax.jit(jax.vmap(lambda beta: entropic_risk(RETURNS, beta=beta)))(betas)
    with np.errstate(over="ignore"):
        usual = [-np.log(np.mean(np.exp(-b * RETURNS))) / b for b in betas[[0, 1, 4, 5, 6]]]
    assert_close(found[np.array([0, 1, 4, 5, 6])], usual)
    assert_close(found[2], RETURNS.mean())
    assert_close(found[3], RETURNS.mean(), atol=1e-6)
    assert_close(found[7], RETURNS.min(), atol=1e-4)
    assert np.all(np.diff(found) < 1e-6)
    slope = jax.grad(lambda x: entropic_risk(x, beta=0.7))(RETURNS)
    assert_close(slope, np.exp(-0.7 * RETURNS) / np.exp(-0.7 * RETURNS).sum(), rtol=1e-4)


def test_gradients_shapes_and_bad_numbers():
    grid = np.random.default_rng(1).normal(size=(2, 3, 10))
    assert cvar(grid, 0.25).shape == value_at_risk(grid, 0.25).shape == entropic_risk(grid, beta=1.0).shape == (2, 3)
    weights = jax.grad(lambda x: cvar(x, 0.25))(jnp.arange(10.0)[::-1])
    assert_close(weights, [0] * 7 + [0.2, 0.4, 0.4])
    assert np.isnan(cvar(np.array([1.0, np.nan]), 0.5))
    assert np.isnan(value_at_risk(np.array([1.0, np.nan]), 0.5))
    assert cvar(np.array([1.0, np.inf]), 0.5) == 1.0
    assert cvar(np.array([3, 4]), 0.5) == 3.0  # counts become floats
    with jax.enable_x64(True):
        assert cvar(RETURNS, 0.3).dtype == entropic_risk(RETURNS, beta=1.0).dtype == np.float64
    for call, message in [
        (lambda: cvar(RETURNS, 1.2), "cvar: alpha must be in"),
        (lambda: cvar(np.zeros(0), 0.5), "N >= 1"),
        (lambda: cvar_objective(RETURNS, 0.0, alpha=0.0), "must be positive"),
        (lambda: cvar_advantages(RETURNS, alpha=0.0), "must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_advantages_give_the_gradient_of_cvar():
    """Over four outcomes drawn by a softmax, where the expectation over trajectories can be taken exactly."""
    outcomes, counts, alpha = jnp.array([-3.0, 0.0, 1.0, 5.0]), np.array([2, 3, 4, 1]), 0.35
    logits = jnp.log(counts / 10)
    wanted = jax.grad(lambda z: worst_case_cvar(outcomes, jax.nn.softmax(z), alpha))(logits)
    returns = jnp.repeat(outcomes, counts)
    score = jnp.repeat(jax.jacobian(jax.nn.log_softmax)(logits), counts, axis=0)
    assert_close(jnp.mean(cvar_advantages(returns, alpha=alpha)[:, None] * score, axis=0), wanted)


def test_the_objective_trains_for_the_tail():
    """A prediction of skewed y with absolute loss: the mean wants the median, the worst quarter wants the middle."""
    y = jnp.concatenate([jnp.zeros(80), jnp.full(20, 10.0)])

    def descend(objective):
        step = lambda p, i: (p - 5.0 / (i + 10.0) * jax.grad(lambda p: jnp.mean(objective(p)))(p), None)  # noqa: E731
        return jax.lax.scan(step, jnp.array([2.0, 2.0]), jnp.arange(3000.0))[0]

    loss = lambda p: jnp.abs(y - p[0])  # noqa: E731
    assert abs(descend(loss)[0]) < 0.1
    assert_close(descend(lambda p: cvar_objective(loss(p), p[1], alpha=0.25))[0], 5.0, atol=0.3)


def layered(first, second, pays):
    """Two random moves, then the end: state 0, then a branch with its own odds, then an outcome that pays."""
    branches, outcomes = np.shape(second)
    states = 1 + branches + branches * outcomes
    transition = np.zeros((states, 1, states))
    transition[0, 0, 1 : 1 + branches] = first
    for i, odds in enumerate(second):
        transition[1 + i, 0, 1 + branches + i * outcomes :][:outcomes] = odds
    transition[1 + branches :, 0, -1] = 1.0
    reward = np.zeros((states, 1, states))
    for i in range(branches):
        reward[1 + i, 0, 1 + branches + i * outcomes :][:outcomes] = pays[i]
    terminal = np.arange(states) > branches
    mdp = TabularMDP(transition, np.eye(states)[0], terminal, 1.0)
    probability = (np.asarray(first)[:, None] * second).reshape(-1)
    return mdp, reward, np.asarray(pays, float).reshape(-1), probability


def nested_and_static(alpha, first, second, pays):
    mdp, reward, outcomes, probability = layered(first, second, pays)
    nested = robust_policy_evaluation(mdp, jnp.zeros((mdp.num_states, 1)), reward, CVaR(alpha))[0]
    static = [worst_case_cvar(outcomes, probability, a) for a in (alpha, alpha**2)]
    return float(nested), *map(float, static), float(outcomes @ probability)


def test_nested_and_static_risk():
    """A tail of tails is often the lower, but not where the bad luck lies in a branch that is good on average."""
    often = nested_and_static(0.5, [0.5, 0.5], [[0.1, 0.9], [0.5, 0.5]], [[-10, 0], [-1, -1]])
    assert_close(often, [-2.0, -1.9, -2.8, -1.0])
    rarely = nested_and_static(0.5, [0.5, 0.5], [[0.05, 0.95], [0.5, 0.5]], [[-10, 0], [-1, -1]])
    assert_close(rarely, [-1.0, -1.45, -1.9, -0.75])
    random = np.random.default_rng(3)
    for alpha in (0.3, 0.8):
        odds = random.dirichlet(np.ones(3), 4)
        nested, _, deeper, mean = nested_and_static(alpha, odds[0], odds[1:], random.normal(size=(3, 3)))
        assert deeper - 1e-5 <= nested <= mean + 1e-5


def test_static_risk_of_a_policy_by_simulation():
    """All returns of a chain of coin flips, enumerated, beside their CVaR from samples."""
    flips = np.array(list(itertools.product([0, 1], repeat=6)))
    discounted = flips @ 0.9 ** np.arange(6)
    probability = np.prod(np.where(flips, 0.7, 0.3), axis=1)
    exact = worst_case_cvar(discounted, probability, 0.1)
    coins = jax.random.bernoulli(KEY, 0.7, (100_000, 6))
    assert_close(cvar(coins @ jnp.asarray(0.9 ** np.arange(6), jnp.float32), 0.1), exact, atol=0.02)


@pytest.fixture(scope="module")
def measured():
    """tail_risk at two alphas, compiled once per shape."""
    return jax.jit(lambda x, threshold: tail_risk(KEY, x, alphas=(0.05, 0.2), threshold=threshold, resamples=300))


def test_tail_risk(measured):
    returns = jax.random.normal(KEY, (400,))
    risk = measured(returns, -1.0)
    assert_close(risk.mean.value, returns.mean())
    assert_close(risk.cvar.value, [cvar(returns, 0.05), cvar(returns, 0.2)])
    assert_close(risk.value_at_risk.value, [value_at_risk(returns, 0.05), value_at_risk(returns, 0.2)])
    assert risk.worst == returns.min()
    assert risk.below.value == (returns < -1.0).mean()
    for interval in (risk.mean, risk.value_at_risk, risk.cvar, risk.below):
        assert np.all(interval.low <= interval.value)
        assert np.all(interval.value <= interval.high)
        assert np.all(interval.low < interval.high)
    wilson = scipy.stats.binomtest(int((returns < -1.0).sum()), 400).proportion_ci(method="wilson")
    assert risk.below.low <= wilson.low + 1e-5
    assert risk.below.high >= wilson.high - 1e-5
    none = measured(returns, -100.0).below
    assert_close(none, [0.0, 0.0, scipy.stats.binomtest(0, 400).proportion_ci(method="wilson").high], atol=1e-6)


def test_seeds_are_resampled_whole(measured):
    seeds = jnp.repeat(jax.random.normal(KEY, (8, 1)), 50, axis=1)  # all episodes of a seed alike
    by_seed = measured(seeds, 0.0).mean
    pooled = measured(seeds.reshape(-1), 0.0).mean
    assert_close(by_seed.value, pooled.value)
    assert by_seed.high - by_seed.low > 4 * (pooled.high - pooled.low)
    broken = measured(seeds.at[0, 0].set(jnp.nan), 0.0)
    assert all(np.isnan(x).all() for x in jax.tree.leaves((broken.mean, broken.cvar, broken.below, broken.worst)))
    with pytest.raises(ValueError, match="tail_risk: returns must be"):
        tail_risk(KEY, jnp.zeros((2, 3, 4)))


@pytest.mark.slow
def test_the_interval_of_cvar_covers():
    """Of 400 samples of 300 normal returns, about 95% of the intervals of the tenth's CVaR hold the truth."""
    truth = -scipy.stats.norm.pdf(scipy.stats.norm.ppf(0.1)) / 0.1
    keys = jax.random.split(KEY, (400, 2))
    one = lambda k: tail_risk(k[0], jax.random.normal(k[1], (300,)), alphas=(0.1,), resamples=400).cvar  # noqa: E731
    found = jax.jit(lambda: jax.lax.map(one, keys))()
    assert 0.88 < np.mean((found.low <= truth) & (truth <= found.high)) < 0.98


def test_pareto_tail_finds_the_tail_it_was_drawn_from():
    alphas = jnp.array([0.05, 0.001])
    fit = jax.jit(lambda x: pareto_tail(x, alphas=alphas, exceedances=2000))
    for shape in (0.0, 0.2, -0.3):
        tail = scipy.stats.genpareto(shape, scale=2.0)
        # A tenth of returns falls below -1 by a generalised Pareto amount.
        low = -1.0 - tail.rvs(2000, random_state=4)
        found = fit(jnp.asarray(np.r_[low, np.linspace(-1.0, 5.0, 18_000)], jnp.float32))
        assert_close(found.shape, shape, atol=0.08)
        assert_close(found.scale, 2.0, atol=0.15)
        assert_close(found.value_at_risk, -1.0 - tail.ppf(1 - np.asarray(alphas) / 0.1), rtol=0.1)
        levels = np.asarray(alphas)[:, None] * (np.arange(2000) + 0.5)[None, :] / 2000
        assert_close(found.cvar, -1.0 - tail.ppf(1 - levels / 0.1).mean(axis=1), rtol=0.12)
    with pytest.raises(ValueError, match="alphas must be in"):
        pareto_tail(RETURNS, alphas=jnp.array([0.5]), exceedances=4)
    with pytest.raises(ValueError, match="exceedances"):
        pareto_tail(RETURNS, alphas=jnp.array([0.01]), exceedances=37)
