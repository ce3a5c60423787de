"""GAN training: one step by hand, targets whose best generator is known, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithm import Network, train
from jaxalign.robustness.gan import gan, sample_generator
from jaxalign.robustness.gan_losses import HINGE, WASSERSTEIN

MEAN, DEVIATION = np.array([1.0, -2.0]), np.array([0.5, 1.5])


def affine_generator(size):
    """a z + b, from a = 1, b = 0."""
    start = {"a": jnp.ones(size), "b": jnp.zeros(size)}
    return Network(lambda key: start, lambda p, z: p["a"][None] * z + p["b"][None])


def quadratic_discriminator(size):
    """u . x + v . x^2 + c: the log-ratio of any two Gaussians with diagonal covariances is one of these."""

    def apply(p, x):
        return jnp.sum(p["u"][None] * x + p["v"][None] * x**2, axis=1) + p["c"]

    return Network(lambda key: {"u": jnp.zeros(size), "v": jnp.zeros(size), "c": jnp.zeros(())}, apply)


def linear_discriminator(size):
    return Network(lambda key: jnp.full(size, 0.5), lambda w, x: jnp.sum(w[None] * x, axis=1))


def test_samples_match_a_gaussian_in_mean_and_deviation():
    generator, steps = affine_generator(2), 1500
    optimizers = optax.adam(1e-2, b1=0.5), optax.adam(3e-2, b1=0.5)
    algorithm = gan(generator, quadratic_discriminator(2), *optimizers, latent_size=2, r1=0.05, average_decay=0.98)

    @jax.jit
    def samples(key):
        noise_key, train_key, sample_key = jax.random.split(key, 3)
        batches = MEAN[None, None] + DEVIATION[None, None] * jax.random.normal(noise_key, (steps, 128, 2))
        state, metrics = train(algorithm, train_key, batches)
        return sample_generator(sample_key, generator, state.generator_average, 4000, latent_size=2), metrics

    made, metrics = samples(jax.random.key(0))
    np.testing.assert_allclose(made.mean(axis=0), MEAN, atol=0.1)
    np.testing.assert_allclose(made.std(axis=0), DEVIATION, atol=0.1)
    # Nothing is left to tell them apart by.
    assert float(metrics["discriminator_loss"][-50:].mean()) == pytest.approx(2 * np.log(2), abs=0.05)
    assert all(np.isfinite(x).all() for x in metrics.values())


@pytest.mark.slow
def test_the_wasserstein_critic_finds_the_distance_of_two_points():
    """Slope w of a critic of two points d apart minimises -d w + penalty (w - 1)^2: w = 1 + d / (2 penalty)."""
    apart, penalty = 3.0, 50.0
    still = Network(lambda key: {"b": jnp.zeros(1)}, lambda p, z: 0.0 * z + p["b"][None])
    algorithm = gan(
        still, linear_discriminator(1), optax.set_to_zero(), optax.sgd(5e-3), latent_size=1, objective=WASSERSTEIN,
        gradient_penalty=penalty,
    )  # fmt: skip
    _, metrics = jax.jit(lambda key: train(algorithm, key, jnp.full((60, 2, 1), apart)))(jax.random.key(0))
    slope = 1 + apart / (2 * penalty)
    assert float(metrics["penalty"][-1]) == pytest.approx(penalty * (slope - 1) ** 2, rel=1e-3)
    assert float((metrics["penalty"] - metrics["discriminator_loss"])[-1]) == pytest.approx(apart * slope, rel=1e-4)


def test_one_step_by_hand():
    """Two updates of the critic on half the batch each, one of the generator at the new critic, and the average."""
    rate, x = 0.1, jnp.arange(8.0)[:, None]
    generator = Network(lambda key: jnp.full(1, 0.25), lambda b, z: 0.0 * z + b[None])
    algorithm = gan(
        generator, linear_discriminator(1), optax.sgd(rate), latent_size=1, objective=WASSERSTEIN, r1=2.0,
        discriminator_steps=2,
    )  # fmt: skip
    after, metrics = jax.jit(lambda key: algorithm.step(algorithm.init(key), x))(jax.random.key(0))
    w, losses = 0.5, []
    for part in (1.5, 5.5):  # means of the two halves; D' = w, so R1 / 2 adds w^2
        losses.append(w * (0.25 - part) + w**2)
        w -= rate * (0.25 - part + 2 * w)
    b = 0.25 + rate * w
    np.testing.assert_allclose(after.params["discriminator"], [w], rtol=1e-5)
    np.testing.assert_allclose(after.params["generator"], [b], rtol=1e-5)
    np.testing.assert_allclose(after.generator_average, [0.1 * 0.25 + 0.9 * b], rtol=1e-5)
    assert float(metrics["discriminator_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["generator_loss"]) == pytest.approx(-w * 0.25, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses) - w * 0.25, rel=1e-5)
    assert float(metrics["generator_gradient_norm"]) == pytest.approx(w, rel=1e-5)
    assert int(after.step) == 1


def test_labels_reach_both_networks():
    generator = Network(lambda key: jnp.zeros((2, 1)), lambda b, z, y: 0.0 * z + b[y])
    critic = Network(lambda key: jnp.zeros((2, 1)), lambda w, x, y: jnp.sum(w[y] * x, axis=1))
    algorithm = gan(generator, critic, optax.sgd(0.1), optax.sgd(0.5), latent_size=1, objective=HINGE, r1=4.0)
    y = np.array([0, 1] * 8)
    x = np.where(y == 0, -1.0, 2.0).astype(np.float32)[:, None]
    batches = jax.tree.map(lambda leaf: np.stack([leaf] * 300), (x, y))

    @jax.jit
    def made(key, labels):
        state, _ = train(algorithm, key, batches)
        return sample_generator(key, generator, state.generator_average, 2, latent_size=1, labels=labels)

    np.testing.assert_allclose(made(jax.random.key(0), np.array([1, 0]))[:, 0], [2.0, -1.0], atol=0.1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (jnp.zeros((4, 3)), r"generator makes \(2, 2\), the data are \(2, 3\)"),
        (jnp.zeros((4, 2), jnp.int32), "real numbers"),
        (jnp.zeros((5, 2)), "2 microbatches"),
    ],
)
def test_bad_batches_are_named(batch, message):
    algorithm = gan(affine_generator(2), linear_discriminator(2), optax.sgd(0.1), latent_size=2, discriminator_steps=2)
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(algorithm.step, state, batch)


def test_a_discriminator_gives_one_logit_a_row():
    wide = Network(lambda key: jnp.zeros(2), lambda w, x: w[None] * x)
    algorithm = gan(affine_generator(2), wide, optax.sgd(0.1), latent_size=2)
    with pytest.raises(ValueError, match="one logit per row"):
        jax.eval_shape(algorithm.step, jax.eval_shape(algorithm.init, jax.random.key(0)), jnp.zeros((4, 2)))
