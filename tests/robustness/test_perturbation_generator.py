"""Generators of perturbations: bounds by construction, and linear classifiers whose worst perturbation is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithm import Network, train
from jaxalign.robustness.attack_result import within
from jaxalign.robustness.perturbation_generator import (
    adversarial_generator_training,
    generated_attack,
    perturbation_generator,
    perturbed,
)
from jaxalign.robustness.pgd import fgsm

IDENTITY = Network(lambda key: jnp.ones(()), lambda scale, x: jax.tree.map(lambda leaf: scale * leaf, x))
LINEAR = Network(lambda key: 0.1 * jax.random.normal(key, (2, 2)), lambda w, x: 5.0 * (x - 0.5) @ w)
SHIFT = Network(lambda key: jnp.zeros(()), lambda shift, x: 0.0 * x + shift)
FALLING = optax.linear_schedule(0.5, 0.01, 400)
WEIGHTS = jnp.array([1.0, -2.0])
X = np.random.default_rng(0).uniform(0.2, 0.8, (64, 2)).astype(np.float32)


def classify(x, weights=WEIGHTS):
    """Class 1 where weights . (x - 0.5) > 0."""
    z = (x - 0.5) @ weights
    return jnp.stack([-z, z], axis=1) / 2


Y = np.argmax(classify(X), axis=1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_perturbation_stays_in_ball_and_box(norm):
    rng = np.random.default_rng(1)
    x = {name: rng.uniform(size=(5, *shape)).astype(np.float32) for name, shape in (("a", (2, 2)), ("b", (3,)))}
    epsilon = jnp.array([0.0, 0.01, 0.1, 0.5, 2.0])

    @jax.jit
    def attacked(x):
        x_adv = perturbed(IDENTITY, 50.0, x, epsilon, norm=norm)
        return x_adv, within(x, x_adv, epsilon, norm=norm, bounds=(0.0, 1.0))

    x_adv, inside = attacked(x)
    assert inside.all()
    assert all(np.asarray(x_adv[name] != x[name]).any() for name in x)
    np.testing.assert_array_equal(x_adv["a"][0], x["a"][0])


def test_perturbed_by_hand():
    x = jnp.array([[0.3, 0.4]])
    of = jax.jit(functools.partial(perturbed, IDENTITY), static_argnames="norm")
    np.testing.assert_allclose(of(10.0, x, 0.5, norm="l2"), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(of(1.0, x, 0.2), x + 0.2 * np.tanh(x), rtol=1e-6)
    # Of the ball of radius 4 the box leaves [0, 1].
    np.testing.assert_allclose(of(1.0, x, 4.0), 0.5 + 0.5 * np.tanh(x), rtol=1e-6)
    # A number at the edge of the box still has a slope, on either side of no change.
    slopes = jax.jit(jax.vmap(jax.grad(lambda s: perturbed(SHIFT, s, jnp.zeros((1, 1)), 0.5)[0, 0])))
    assert (slopes(jnp.array([-1.0, 0.0, 1.0])) > 0.1).all()
    with pytest.raises(ValueError, match=r"makes \(1,\), x is \(1, 2\)"):
        perturbed(Network(lambda key: None, lambda _, x: x[:, 0]), None, x, 0.5)


def stacked(batch, steps):
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (steps, *leaf.shape)), batch)


@pytest.fixture(scope="module")
def trained():
    """A generator trained on a linear classifier: its attack, compiled, and the metrics."""
    algorithm = perturbation_generator(LINEAR, classify, optax.adam(0.1), epsilon=0.15, confidence=1.0)
    state, metrics = jax.jit(lambda key: train(algorithm, key, stacked((X, Y), 400)))(jax.random.key(1))
    attack = generated_attack(LINEAR, state.params["generator"], epsilon=0.15)
    return jax.jit(functools.partial(attack, jax.random.key(0), classify)), metrics


def test_a_generator_learns_the_worst_perturbation_of_a_linear_classifier(trained):
    """It is -epsilon sign(weights) for class 1, and takes epsilon |weights|_1 off the distance |z| of every input."""
    attack, metrics = trained
    result = attack(X, Y)
    z = np.abs((np.asarray(X) - 0.5) @ np.asarray(WEIGHTS))
    best = z < 0.15 * 3.0
    assert 0.3 < best.mean() < 0.9
    assert np.asarray(result.success)[z < 0.95 * 0.45].all()
    assert not np.asarray(result.success)[~best].any()
    assert float(metrics["success"][-1]) == pytest.approx(float(result.success.mean()), abs=0.02)
    assert float(metrics["loss"][-1]) < float(metrics["loss"][0])
    # Of class 1, where the tanh has saturated.
    delta = np.asarray(result.x_adv - X)[(np.asarray(Y) == 1) & (z > 0.3)]
    np.testing.assert_allclose(delta, np.broadcast_to([-0.15, 0.15], delta.shape), atol=0.03)


def test_the_attack_takes_another_radius_and_leaves_the_misclassified_alone(trained):
    attack, _ = trained
    flipped = np.where(np.arange(64) < 4, 1 - Y, Y)
    result = attack(X, flipped, 1e-4)
    np.testing.assert_array_equal(result.x_adv[:4], X[:4])
    assert result.success.tolist() == [True] * 4 + [False] * 60
    assert float(jnp.abs(result.x_adv - X).max()) <= 1.01e-4


def test_a_discriminator_holds_the_generator_to_the_data():
    """Of a classifier that anything fools, what is left is to be taken for data: the ends of the line give it away."""
    x = np.linspace(0.4, 0.6, 32, dtype=np.float32)[:, None]
    shift = Network(lambda key: jnp.full(1, 0.5), lambda b, x: 0.0 * x + b[None])
    judge = Network(lambda key: jnp.zeros(2), lambda w, x: w[0] * (x[:, 0] - 0.5) + w[1])
    fooled = lambda x: jnp.tile(jnp.array([[-1.0, 1.0]]), (x.shape[0], 1))  # noqa: E731
    make = functools.partial(
        perturbation_generator, shift, fooled, optax.sgd(0.2), epsilon=0.3, discriminator=judge,
        discriminator_optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0)),
    )  # fmt: skip

    @jax.jit
    def final(realism):
        algorithm = make(realism=realism)
        return train(algorithm, jax.random.key(0), stacked((x, np.zeros(32, np.int32)), 400))

    state, metrics = final(1.0)
    assert abs(float(state.params["generator"][0])) < 0.05 < 0.5
    assert float(metrics["discriminator_loss"][-1]) == pytest.approx(2 * np.log(2), abs=0.02)
    assert float(metrics["realism_loss"][0]) == pytest.approx(np.log(2), rel=0.1)
    state, _ = final(0.0)
    assert float(state.params["generator"][0]) == 0.5


def test_training_against_a_generator_drops_the_feature_that_it_can_flip():
    """Feature 1 separates by 0.3 and feature 2 by 0.05, of which an epsilon of 0.1 leaves nothing.

    The worst-case loss of weights w is softplus(-(0.3 w_1 + 0.05 w_2 - 0.1 |w|_1)), so w_2 is best at 0; clean training
    moves both in the ratio of the separations, 6 to 1.
    """
    y = np.array([0, 1] * 16)
    side = np.where(y == 1, 1, -1).astype(np.float32)[:, None]
    x = 0.5 + side * np.array([[0.3, 0.05]], np.float32)
    linear = Network(lambda key: jnp.zeros(2), lambda w, x: classify(x, w))

    @jax.jit
    def weights(clean_weight):
        algorithm = adversarial_generator_training(
            linear,
            LINEAR,
            optax.sgd(FALLING),
            optax.adam(0.05, b1=0.0),
            epsilon=0.1,
            clean_weight=clean_weight,
            generator_steps=2,
        )
        state, metrics = train(algorithm, jax.random.key(0), stacked((x, y), 400))
        return state.params["classifier"], metrics

    (plain, _), (robust, metrics) = weights(1.0), weights(0.0)
    assert float(plain[1] / plain[0]) == pytest.approx(1 / 6, rel=1e-3)
    assert abs(float(robust[1] / robust[0])) < 0.02
    assert all(np.isfinite(m).all() for m in metrics.values())
    assert float(metrics["adversarial_accuracy"][-1]) == 1.0
    # Points that feature 2 alone decides: only the clean classifier believes it, and FGSM turns it against it.
    weak = 0.5 + side * np.array([[0.107, 0.05]], np.float32)

    @jax.jit
    def accuracy(w):
        x_adv = fgsm(functools.partial(classify, weights=w), weak, y, 0.1)
        return jnp.mean(jnp.argmax(classify(x_adv, w), axis=1) == y)

    assert [float(accuracy(w)) for w in (plain, robust)] == [0.0, 1.0]
