"""One-step and free adversarial training, each against the paper's algorithm written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

from jaxalign.algorithm import Network
from jaxalign.robustness.fast_adversarial_training import fast_adversarial_training, free_adversarial_training

RNG = np.random.default_rng(0)
START = np.array([1.0, -2.0, 0.5])
LOGISTIC = Network(
    lambda key: jnp.asarray(START, jnp.float32), lambda w, x: jnp.stack([jnp.zeros(x.shape[0]), x @ w], axis=1)
)
X = RNG.uniform(size=(3, 4, 3))
Y = RNG.integers(0, 2, (3, 4))


def slopes(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Gradients of mean cross-entropy in w and in x, and its value."""
    error = expit(x @ w) - y
    loss = np.mean(np.logaddexp(0.0, x @ w) - y * (x @ w))
    return error @ x / len(y), error[:, None] * w[None] / len(y), loss


def test_fast_is_one_step_from_a_random_start():
    """A step of twice the radius ends at the worst corner whatever the start, one of 1.25, the default, mostly does."""
    epsilon, batch = 0.125, (jnp.float32(X[0]), jnp.asarray(Y[0]))

    def loss(step_size):
        algorithm = fast_adversarial_training(
            LOGISTIC, optax.sgd(0.5), epsilon=epsilon, step_size=step_size, bounds=None
        )
        return algorithm.step(algorithm.init(jax.random.key(0)), batch)[1]["loss"]

    default, of_size = jax.jit(loss, static_argnums=0)(None), jax.jit(loss)
    sign = np.where(Y[0] == 1, -1.0, 1.0)[:, None] * np.sign(START)[None]
    worst = slopes(START, X[0] + epsilon * sign, Y[0])[2]
    np.testing.assert_allclose(of_size(2.0 * epsilon), worst, rtol=1e-5)
    np.testing.assert_allclose(of_size(1.25 * epsilon), default, rtol=1e-6)
    # From a start at the far edge it comes to 0.25 of the radius.
    assert slopes(START, X[0] + 0.25 * epsilon * sign, Y[0])[2] < default < worst


def test_free_training_is_the_papers_algorithm():
    """Shafahi et al. 2019, algorithm 1: weights and perturbation move on one gradient, and the latter is kept."""
    epsilon, rate, replays = 0.25, 0.5, 3
    algorithm = free_adversarial_training(
        LOGISTIC, optax.sgd(rate), jnp.float32(X[0]), epsilon=epsilon, replays=replays, step_size=0.1
    )
    state, step = algorithm.init(jax.random.key(0)), jax.jit(algorithm.step)
    w, delta = START.copy(), np.zeros_like(X[0])
    for x, y in zip(X, Y, strict=True):
        state, metrics = step(state, (jnp.float32(x), jnp.asarray(y)))
        losses = []
        delta = np.clip(x + delta, 0.0, 1.0) - x
        for _ in range(replays):
            slope_w, slope_x, loss = slopes(w, x + delta, y)
            losses.append(loss)
            w = w - rate * slope_w
            delta = np.clip(x + np.clip(delta + 0.1 * np.sign(slope_x), -epsilon, epsilon), 0.0, 1.0) - x
        np.testing.assert_allclose(state.params, w, rtol=1e-5)
        np.testing.assert_allclose(state.perturbation, delta, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    assert state.step == 3
    assert metrics["epsilon"] == epsilon


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="replays must be at least 1, got 0"):
        free_adversarial_training(LOGISTIC, optax.sgd(0.1), X[0], epsilon=0.1, replays=0)
    algorithm = free_adversarial_training(LOGISTIC, optax.sgd(0.1), jnp.float32(X[0]), epsilon=0.1, replays=1)
    with pytest.raises(ValueError, match=r"x is \(2, 3\), the example is \(4, 3\)"):
        algorithm.step(algorithm.init(jax.random.key(0)), (jnp.float32(X[0, :2]), jnp.asarray(Y[0, :2])))
