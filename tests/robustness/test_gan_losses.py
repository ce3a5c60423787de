"""GAN losses and slope penalties: hand numbers, NumPy, and the distributions whose best discriminator is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit

from jaxalign.irl.adversarial import discriminator_loss
from jaxalign.robustness.gan_losses import (
    HINGE,
    NON_SATURATING,
    WASSERSTEIN,
    gradient_penalty,
    r1_penalty,
    wasserstein_discriminator_loss,
)

REAL, FAKE = np.array([2.0, -0.5, 0.0, 30.0]), np.array([-3.0, 0.5, 0.0, -40.0])
# objective: (discriminator's loss, generator's) of REAL and FAKE in float64
EXPECTED = {
    NON_SATURATING: (-log_expit(REAL) - log_expit(-FAKE), -log_expit(FAKE)),
    WASSERSTEIN: (FAKE - REAL, -FAKE),
    HINGE: (np.maximum(0, 1 - REAL) + np.maximum(0, 1 + FAKE), -FAKE),
}


@pytest.mark.parametrize("objective", EXPECTED)
def test_losses_match_numpy_and_are_not_reduced(objective):
    discriminator, generator = objective.discriminator(REAL, FAKE), objective.generator(FAKE)
    assert discriminator.dtype == generator.dtype == jnp.float32
    np.testing.assert_allclose(discriminator, EXPECTED[objective][0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(generator, EXPECTED[objective][1], rtol=1e-5)


def test_gradients_away_from_the_corners_of_the_hinge():
    objectives = (NON_SATURATING, HINGE, WASSERSTEIN)
    slopes = jax.jit(lambda *x: [jax.grad(o.discriminator, argnums=(0, 1))(*x) for o in objectives])(0.3, -0.4)
    expected = [(-expit(-0.3), expit(-0.4)), (-1.0, 1.0), (-1.0, 1.0)]
    np.testing.assert_allclose(slopes, expected, rtol=1e-5)


@pytest.mark.parametrize("objective", EXPECTED)
def test_dtypes_and_shapes(objective):
    assert objective.discriminator(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert objective.generator(jnp.asarray(FAKE)).dtype == jnp.float64
    with pytest.raises(AssertionError, match="shape"):
        objective.discriminator(jnp.zeros(2), jnp.zeros(3))


def test_where_nothing_can_be_told_apart():
    zero = jnp.zeros(1)
    values = [float(o.discriminator(zero, zero)[0]) for o in (NON_SATURATING, HINGE, WASSERSTEIN)]
    np.testing.assert_allclose(values, [2 * np.log(2), 2.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(NON_SATURATING.discriminator(REAL, FAKE), discriminator_loss(REAL, FAKE))


def test_the_best_discriminator_gives_the_jensen_shannon_divergence():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    logits = np.log(p) - np.log(q)
    loss = np.sum(p[:, None] * q[None, :] * NON_SATURATING.discriminator(*np.broadcast_arrays(logits[:, None], logits)))
    middle = (p + q) / 2
    jsd = 0.5 * np.sum(p * np.log(p / middle)) + 0.5 * np.sum(q * np.log(q / middle))
    assert loss == pytest.approx(2 * np.log(2) - 2 * jsd, rel=1e-5)


def test_a_critic_of_slope_one_gives_the_distance_of_two_points():
    real, fake = np.array([[3.0, 4.0]]), np.array([[0.0, 0.0]])
    direction = (real - fake) / np.linalg.norm(real - fake)
    scores = [np.sum(x * direction, axis=1) for x in (real, fake)]
    np.testing.assert_allclose(-wasserstein_discriminator_loss(*scores), [5.0])


def linear(w, x):
    return jnp.sum(w * x.reshape(x.shape[0], -1), axis=1)


def test_penalties_of_a_linear_critic():
    w = jnp.array([[3.0, 0.0, 0.0, 4.0]])
    real, fake = np.random.default_rng(0).normal(size=(2, 5, 2, 2)).astype(np.float32)

    @jax.jit
    def penalties(w):
        critic = functools.partial(linear, w)
        return gradient_penalty(jax.random.key(1), critic, real, fake), r1_penalty(critic, real)

    np.testing.assert_allclose(penalties(w), np.stack([np.full(5, 16.0), np.full(5, 25.0)]), rtol=1e-5)
    np.testing.assert_array_equal(penalties(0 * w), np.stack([np.ones(5), np.zeros(5)]))


def test_the_penalty_is_taken_between_the_two_sides():
    def critic(x):  # its slope at x is x
        return 0.5 * jnp.sum(x**2, axis=1)

    real, fake = jnp.full((2000, 1), 2.0), jnp.full((2000, 1), 4.0)
    penalty = jax.jit(lambda key: gradient_penalty(key, critic, real, fake))(jax.random.key(0))
    slopes = 1 + np.sqrt(penalty)
    assert 2.0 <= slopes.min() < 2.01 < 3.99 < slopes.max() <= 4.0
    assert slopes.mean() == pytest.approx(3.0, abs=0.05)


def test_penalties_have_gradients_where_the_slope_vanishes_and_under_vmap():
    real, fake = jnp.ones((3, 2)), jnp.zeros((3, 2))

    def mean_penalty(w):
        critic = functools.partial(linear, w)
        return jnp.mean(gradient_penalty(jax.random.key(0), critic, real, fake) + r1_penalty(critic, real))

    rows = jnp.array([[[3.0, 4.0]], [[0.0, 0.0]]])
    gradients = jax.jit(jax.vmap(jax.grad(mean_penalty)))(rows)
    # d/dw (|w| - 1)^2 + |w|^2 = 2 (|w| - 1) w / |w| + 2 w
    np.testing.assert_allclose(gradients, [[[10.8, 14.4]], [[0.0, 0.0]]], rtol=1e-5)


def test_a_critic_must_return_one_number_a_row():
    with pytest.raises(AssertionError, match="shape"):
        r1_penalty(lambda x: x, jnp.ones((3, 2)))
