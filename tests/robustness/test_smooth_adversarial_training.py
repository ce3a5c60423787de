"""SmoothAdv: plain noise at radius 0, the linear worst case in closed form, one noise for attack and update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxalign.algorithm import Network
from jaxalign.robustness.smooth_adversarial_training import gaussian_augmentation, smooth_adversarial_training

W = np.array([[1.0, -2.0], [0.5, 0.0], [-1.0, 3.0]], np.float32)
LINEAR = Network(lambda key: jnp.asarray(W), lambda w, x: x @ w)
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
Y = np.array([0, 1, 1, 0])
OPTIMIZER = optax.sgd(0.1)


@jax.jit
def augmented(x, sigma):
    algorithm = gaussian_augmentation(LINEAR, OPTIMIZER, sigma=sigma, samples=3)
    return algorithm.step(algorithm.init(jax.random.key(0)), (x, Y))


@jax.jit
def attacked(x, sigma, epsilon):
    algorithm = smooth_adversarial_training(
        LINEAR, OPTIMIZER, sigma=sigma, epsilon=epsilon, steps=3, samples=3, bounds=None
    )
    return algorithm.step(algorithm.init(jax.random.key(0)), (x, Y))


def test_radius_0_is_gaussian_augmentation():
    (state, metrics), (plain, plain_metrics) = attacked(X, 0.5, 0.0), augmented(X, 0.5)
    np.testing.assert_allclose(state.params, plain.params, rtol=1e-6)
    for name, value in plain_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_attack_of_a_linear_classifier_and_shared_noise():
    """The soft smoothed classifier's gradient lies along w_1 - w_0, whatever the noise: x_adv is known."""
    state, metrics = attacked(X, 0.5, 0.4)
    away = (W[:, 1] - W[:, 0]) / np.linalg.norm(W[:, 1] - W[:, 0])
    x_adv = X + 0.4 * np.where(Y == 0, 1.0, -1.0)[:, None].astype(np.float32) * away[None]
    expected, expected_metrics = augmented(x_adv, 0.5)
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    assert metrics["loss"] > augmented(X, 0.5)[1]["loss"] + 0.1


def test_without_noise_it_is_the_cross_entropy_itself():
    log_p = scipy.special.log_softmax(X @ W, axis=1)
    np.testing.assert_allclose(augmented(X, 0.0)[1]["loss"], -log_p[np.arange(4), Y].mean(), rtol=1e-5)


@pytest.mark.slow
def test_the_climb_is_of_the_soft_smoothed_loss():
    """Of a curved classifier the mean loss and the loss of the mean probability climb to different places."""
    network = Network(lambda key: jnp.ones(()), lambda w, x: jnp.concatenate([0.0 * x, w * jnp.sin(3.0 * x)], axis=1))
    algorithm = smooth_adversarial_training(
        network, OPTIMIZER, sigma=1.0, epsilon=0.01, steps=1, samples=2, step_size=0.01, bounds=None
    )
    state, rows = algorithm.init(jax.random.key(0)), 400
    x = np.linspace(-2.0, 2.0, rows)
    noise = np.asarray(jax.random.normal(jax.random.split(state.key)[1], (2 * rows, 1))).reshape(2, rows)
    _, metrics = jax.jit(algorithm.step)(state, (jnp.float32(x[:, None]), jnp.ones(rows, jnp.int32)))

    def losses(points):
        """[2, rows] cross-entropies of the noisy copies."""
        return np.logaddexp(0.0, -np.sin(3.0 * (points[None] + noise)))

    def reached(climbed):
        return losses(x + 0.01 * np.sign(climbed(x + 1e-5) - climbed(x - 1e-5))).mean()

    of_mean = reached(lambda v: -np.log(np.exp(-losses(v)).mean(axis=0)))
    of_each = reached(lambda v: losses(v).mean(axis=0))
    assert abs(of_mean - of_each) > 1e-5
    np.testing.assert_allclose(metrics["loss"], of_mean, atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        gaussian_augmentation(LINEAR, OPTIMIZER, sigma=0.1, samples=0)
