"""Action distributions: densities that integrate to 1, entropies by quadrature against SciPy, safe at the limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from jaxalign.environments import Box, Discrete, cartpole, pendulum
from jaxalign.rl.actor_critic import act_with, actor_critic, draw, encode
from jaxalign.rl.policies import TanhNormal, categorical, diagonal_normal

LOW, HIGH = -2.0, 6.0


def numpy_log_density(action, mean, scale):
    """One action between LOW and HIGH, by the change of variables, float64."""
    inside = (action - (HIGH + LOW) / 2) / ((HIGH - LOW) / 2)
    x = np.arctanh(inside)
    return stats.norm.logpdf(x, mean, scale) - np.log((HIGH - LOW) / 2 * (1 - inside**2))


def squashed(mean, scale):
    return TanhNormal(jnp.array([mean]), jnp.array([scale]), low=LOW, high=HIGH)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-0.8, 0.3), (1.5, 0.7)])
def test_the_squashed_density_is_that_of_the_change_of_variables(mean, scale):
    actions = np.linspace(LOW + 0.1, HIGH - 0.1, 9)
    found = jax.vmap(lambda a: squashed(mean, scale).log_prob(a))(jnp.asarray(actions, jnp.float32)[:, None])
    np.testing.assert_allclose(found, numpy_log_density(actions, mean, scale), rtol=1e-4, atol=1e-4)
    total, _ = integrate.quad(lambda a: np.exp(numpy_log_density(a, mean, scale)), LOW, HIGH)
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-0.8, 0.3), (1.0, 0.05)])
def test_the_entropy_is_minus_the_mean_log_density(mean, scale):
    def integrand(x):
        action = (HIGH + LOW) / 2 + (HIGH - LOW) / 2 * np.tanh(x)
        return -stats.norm.pdf(x, mean, scale) * numpy_log_density(action, mean, scale)

    expected, _ = integrate.quad(integrand, mean - 6 * scale, mean + 6 * scale)
    assert float(squashed(mean, scale).entropy()) == pytest.approx(expected, abs=2e-3)


def test_actions_stay_inside_and_their_densities_finite():
    wide = TanhNormal(jnp.zeros((1000, 2)), jnp.full((1000, 2), 30.0), low=LOW, high=HIGH)
    actions, log_probs = draw(jax.random.key(0), wide)
    assert (actions > LOW).all()
    assert (actions < HIGH).all()
    assert np.isfinite(log_probs).all()
    gradient = jax.grad(lambda m: TanhNormal(m, jnp.ones(1), low=LOW, high=HIGH).log_prob(jnp.array([HIGH])))
    assert np.isfinite(gradient(jnp.zeros(1))).all()
    assert float(squashed(0.0, 1.0).mode()[0]) == pytest.approx(2.0)


def test_a_drawn_action_has_the_density_it_was_said_to_have():
    for distribution in (
        categorical(jnp.array([[0.0, 1.0, -1.0]] * 4)),
        diagonal_normal(jnp.ones((4, 2)), jnp.full((1, 2), 0.5)),
        TanhNormal(jnp.ones((4, 2)), jnp.full((4, 2), 0.5), low=-1.0, high=1.0),
    ):
        actions, log_probs = draw(jax.random.key(1), distribution)
        np.testing.assert_allclose(log_probs, distribution.log_prob(actions), rtol=1e-5)
        assert log_probs.shape == (4,)


def test_networks_fit_their_spaces():
    model = actor_critic(cartpole(), hidden=(8,))
    params = model.init(jax.random.key(0))
    assert params.keys() == {"actor", "critic"}
    seen = jnp.zeros((3, 2, 4))
    assert model.value(params, seen).shape == (3, 2)
    np.testing.assert_allclose(model.policy(params, seen).entropy(), np.log(2.0), atol=1e-3)  # nearly uniform at first
    shared = actor_critic(pendulum(), hidden=(8,), shared=True, initial_scale=0.5)
    params = shared.init(jax.random.key(0))
    assert params.keys() == {"actor", "critic", "torso", "log_scale"}
    np.testing.assert_allclose(np.exp(params["log_scale"]), [0.5], rtol=1e-6)
    action = act_with(shared, params, greedy=True)(jax.random.key(0), jnp.zeros(3))
    assert action.shape == (1,)
    assert abs(float(action[0])) < 0.2


def test_observations_become_rows():
    np.testing.assert_array_equal(encode(Discrete(3), jnp.array([[2], [0]])), [[[0, 0, 1]], [[1, 0, 0]]])
    assert encode(Box(0, 1, (2, 3)), jnp.zeros((5, 2, 3))).shape == (5, 6)
    assert encode(Box(0, 1, (2,), jnp.int32), jnp.zeros((2,), jnp.int32)).dtype == jnp.float32


def test_action_spaces_that_no_policy_fits_are_refused():
    for space, message in (
        (Box(-1.0, np.inf, (2,)), "limits some actions only"),
        (Box(-1.0, 1.0, (2, 2)), "they must be"),
    ):
        with pytest.raises(ValueError, match=message):
            actor_critic(pendulum().replace(action_space=space))


def test_networks_start_orthogonal():
    model = actor_critic(cartpole(), hidden=(6,))
    params = model.init(jax.random.key(3))
    for name, scale in (("actor", 0.01), ("critic", 1.0)):
        first, last = (np.asarray(params[name][f"Dense_{i}"]["kernel"]) for i in (0, 1))
        np.testing.assert_allclose(first @ first.T, 2.0 * np.eye(4), atol=1e-4)
        np.testing.assert_allclose(last.T @ last, scale**2 * np.eye(last.shape[1]), atol=1e-4)
        assert not np.asarray(params[name]["Dense_0"]["bias"]).any()
