"""The off-switch game: closed forms, quadrature by SciPy, and the same game solved as an assistance game."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import integrate, special, stats

from jaxalign.irl.assistance import PedagogicHuman, literal_human
from jaxalign.irl.assistance_solvers import solve_assistance
from jaxalign.irl.off_switch import (
    ACT,
    OFF,
    WAIT,
    discrete_off_switch_values,
    normal_bins,
    off_switch_game,
    off_switch_values,
)


def test_a_rational_human_and_a_standard_normal():
    values = off_switch_values(0.0, 1.0)
    np.testing.assert_allclose(values.wait, 0.398942, rtol=1e-6)
    np.testing.assert_allclose(values, [0.0, 0.0, 1 / np.sqrt(2 * np.pi), 1 / np.sqrt(2 * np.pi)], rtol=1e-6)


@pytest.mark.parametrize("mean", [-20.0, -1.0, 0.0, 0.3, 5.0])
@pytest.mark.parametrize("temperature", [1e-3, 0.5, 30.0])
def test_waiting_equals_scipy_quadrature(mean, temperature):
    with jax.enable_x64(True):
        for std in (0.01, 1.0, 5.0):
            low, high = mean - 12 * std, mean + 12 * std
            breaks = [x for x in (mean, -5 * temperature, 0.0, 5 * temperature) if low < x < high]
            expected, _ = integrate.quad(
                lambda u, std=std: u * special.expit(u / temperature) * stats.norm.pdf(u, mean, std),
                low, high, points=breaks, limit=500, epsabs=1e-13, epsrel=1e-11,
            )  # fmt: skip
            found = off_switch_values(mean, std, temperature=temperature).wait
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * std)


def test_limits():
    # A robot that knows U; a human who flips a coin; a human ever more rational; a robot ever surer that U > 0.
    np.testing.assert_allclose(off_switch_values(2.0, 0.0).incentive, 0.0)
    np.testing.assert_allclose(off_switch_values(-2.0, 0.0).wait, 0.0)
    np.testing.assert_allclose(off_switch_values(1.0, 0.0, temperature=2.0).wait, special.expit(0.5), rtol=1e-6)
    np.testing.assert_allclose(off_switch_values(0.7, 1.0, temperature=1e6).wait, 0.35, rtol=1e-5)
    np.testing.assert_allclose(off_switch_values(0.2, 1.0, temperature=1e-4).wait, off_switch_values(0.2, 1.0).wait)
    np.testing.assert_allclose(off_switch_values(20.0, 1.0).incentive, 0.0, atol=1e-5)
    waits = off_switch_values(0.0, 1.0, temperature=jnp.linspace(0.0, 5.0, 50)).wait
    assert (jnp.diff(waits) < 0.0).all()
    assert (waits > 0.0).all()


def test_when_to_leave_the_switch_to_the_human():
    means, stds = jnp.meshgrid(jnp.linspace(-3.0, 3.0, 13), jnp.array([0.0, 0.1, 1.0, 4.0]))
    assert (off_switch_values(means, stds).incentive >= -1e-6).all()
    # Where std^2 = 2 temperature |mean| the integrand of wait - max(act, off) is odd in U: there it changes sign.
    mean, temperature = jnp.array([0.5, 1.0, -2.0]), jnp.array([1.0, 0.2, 0.7])
    edge = jnp.sqrt(2.0 * temperature * jnp.abs(mean))
    np.testing.assert_allclose(off_switch_values(mean, edge, temperature=temperature).incentive, 0.0, atol=1e-6)
    assert (off_switch_values(mean, 0.9 * edge, temperature=temperature).incentive < 0.0).all()
    assert (off_switch_values(mean, 1.1 * edge, temperature=temperature).incentive > 0.0).all()


def test_transformations():
    with jax.enable_x64(True):
        wait = lambda mean, std, t: off_switch_values(mean, std, temperature=t).wait  # noqa: E731
        check_grads(wait, (0.4, 1.3, 0.6), order=1, modes=["rev"])
        # With a rational human: Phi(mean / std), phi(mean / std), and no first-order loss from a first mistake.
        gradient = jax.grad(wait, (0, 1, 2))(0.2, 1.0, 0.0)
        np.testing.assert_allclose(gradient, [stats.norm.cdf(0.2), stats.norm.pdf(0.2), 0.0], rtol=1e-9)
        lanes = jnp.array([-1.0, 0.0, 2.0])
        together = jax.jit(jax.vmap(lambda mean: wait(mean, 1.0, 0.5)))(lanes)
        np.testing.assert_allclose(together, wait(lanes, 1.0, 0.5), rtol=1e-12)
        np.testing.assert_allclose(together, [wait(mean, 1.0, 0.5) for mean in lanes], rtol=1e-12)
    assert off_switch_values(0, 1).wait.dtype == jnp.float32
    np.testing.assert_allclose(off_switch_values(0.3, 1.0, temperature=0.5).wait, wait(0.3, 1.0, 0.5), rtol=1e-5)


def test_normal_bins():
    utilities, probabilities = normal_bins(0.5, 2.0, num=40)
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose((utilities * probabilities).sum(), 0.5, rtol=1e-5)
    edges = stats.norm.ppf([0.25, 0.275])
    mean = integrate.quad(lambda z: z * stats.norm.pdf(z), *edges)[0] / 0.025
    np.testing.assert_allclose(utilities[10], 0.5 + 2.0 * mean, rtol=1e-4)


def test_the_same_game_as_an_assistance_game():
    utilities, probabilities = normal_bins(0.0, 1.0, num=20)
    game = off_switch_game(utilities, probabilities)
    together = solve_assistance(game, horizon=2)
    np.testing.assert_allclose(together.value, 0.398942, rtol=1e-5)
    rational = solve_assistance(game, horizon=2, human=literal_human(game, beta=jnp.inf))
    np.testing.assert_allclose(rational.value, 0.398942, rtol=1e-5)
    by_points = solve_assistance(game, horizon=2, human=PedagogicHuman(), beliefs=game.prior[None])
    np.testing.assert_allclose(by_points.value, 0.398942, rtol=1e-5)


@pytest.mark.parametrize(("mean", "temperature", "choice"), [(0.2, 0.5, WAIT), (0.2, 5.0, ACT), (-1.0, 5.0, OFF)])
def test_an_erring_human_in_the_assistance_game(mean, temperature, choice):
    utilities, probabilities = normal_bins(mean, 1.0, num=10)
    game = off_switch_game(utilities, probabilities)
    plan = solve_assistance(game, horizon=2, human=literal_human(game, beta=1 / temperature))
    values = discrete_off_switch_values(utilities, probabilities, temperature=temperature)
    np.testing.assert_allclose(plan.value, max(values[:3]), rtol=1e-5, atol=1e-6)
    assert plan.robot_action[0, 0, plan.start[0]] == choice == int(np.argmax(values[:3]))


def test_discrete_values_by_hand():
    values = discrete_off_switch_values(jnp.array([2.0, -1.0]), jnp.array([0.25, 0.75]))
    np.testing.assert_allclose(values, [-0.25, 0.0, 0.5, 0.5])
    noisy = discrete_off_switch_values([2, -1], [0.25, 0.75], temperature=0.5)
    np.testing.assert_allclose(noisy.wait, 0.5 * special.expit(4.0) - 0.75 * special.expit(-2.0), rtol=1e-6)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="std must be at least 0"):
        off_switch_values(0.0, -1.0)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        off_switch_values(0.0, 1.0, temperature=-0.1)
