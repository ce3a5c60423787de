"""Adversarial training: what it does to weak features, its limits, its schedule, and one step by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit

from jaxalign import sweep, train
from jaxalign.algorithm import Network
from jaxalign.robustness.adversarial_training import adversarial_training, ascend
from jaxalign.robustness.labelled_batch import LabelledBatch, as_labelled
from jaxalign.robustness.pgd import fgsm, pgd

WEAK = 16
LINEAR = Network(
    lambda key: {"w": 0.01 * jax.random.normal(key, (1 + WEAK,)), "b": jnp.zeros(())},
    lambda params, x: jnp.stack([jnp.zeros(x.shape[0]), x @ params["w"] + params["b"]], axis=1),
)


def strong_and_weak(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One feature of size 3 that is right 9 times of 10, and many of mean 0.5 and deviation 1 (Tsipras et al. 2019)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, rows)
    sign = 2.0 * y - 1.0
    strong = 3.0 * sign * np.where(rng.random(rows) < 0.9, 1.0, -1.0)
    weak = rng.normal(size=(rows, WEAK)) + 0.5 * sign[:, None]
    return np.concatenate([strong[:, None], weak], axis=1).astype(np.float32), y


X, Y = strong_and_weak(1024)


def one_step(key, apply, x, y, epsilon):
    return fgsm(apply, x, y, epsilon, bounds=None)


@pytest.fixture(scope="module")
def trained():
    """Plain training, at radius 1, and at radius 1 with all the weight on the clean inputs; how often it was traced."""
    traces = []

    def run(hyper, key):
        traces.append(1)
        algorithm = adversarial_training(
            LINEAR, optax.sgd(0.1), attack=one_step, epsilon=hyper["epsilon"], clean_weight=hyper["clean_weight"]
        )
        batches = (jnp.tile(X[None], (150, 1, 1)), jnp.tile(Y[None], (150, 1)))
        state, metrics = train(algorithm, key, batches)
        return state.params, metrics

    hypers = {"epsilon": jnp.array([0.0, 1.0, 1.0]), "clean_weight": jnp.array([0.0, 0.0, 1.0])}
    params, metrics = sweep(run, hypers, jax.random.split(jax.random.key(0), 1))
    return jax.tree.map(lambda leaf: np.asarray(leaf[:, 0]), params), metrics, traces


def test_weak_features_are_given_up_and_robustness_won(trained):
    params, _, traces = trained
    assert len(traces) == 1
    x, y = strong_and_weak(4000, seed=1)
    sign = 2.0 * y - 1.0

    def accuracy(lane, epsilon):
        # The worst case of a linear classifier in closed form: it loses epsilon |w|_1 of its margin.
        margin = sign * (x @ params["w"][lane] + params["b"][lane]) - epsilon * np.abs(params["w"][lane]).sum()
        return np.mean(margin > 0)

    plain, robust, _ = np.abs(params["w"])
    assert plain[1:].sum() > 3 * plain[0]
    assert robust[1:].max() < 0.1 * robust[0]
    assert accuracy(0, 0.0) > 0.97
    assert accuracy(0, 1.0) < 0.5
    # What the strong feature alone is worth, clean as attacked.
    np.testing.assert_allclose([accuracy(1, 0.0), accuracy(1, 1.0)], 0.9, atol=0.02)


def test_all_weight_on_clean_inputs_is_plain_training(trained):
    params, metrics, _ = trained
    np.testing.assert_allclose(params["w"][2], params["w"][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"][2], metrics["loss"][0], rtol=1e-4)
    assert (metrics["accuracy"][1] >= metrics["adversarial_accuracy"][1]).all()
    # Logistic regression by gradient descent, from the same start as lane 0 and in float64.
    key = jax.random.split(jax.random.split(jax.random.key(0), 1)[0])[0]
    w, b = np.asarray(LINEAR.init(key)["w"], np.float64), 0.0
    for _ in range(150):
        residual = Y - expit(X @ w + b)
        w, b = w + 0.1 * residual @ X / len(Y), b + 0.1 * residual.mean()
    np.testing.assert_allclose(params["w"][0], w, rtol=1e-3, atol=1e-5)


def test_one_step_by_hand_with_the_attack_held_fixed():
    """No gradient flows through what the attack owes to the parameters; it comes after the augmentation."""
    network = Network(lambda key: jnp.array([2.0]), lambda w, x: jnp.concatenate([0.0 * x, x * w[None]], axis=1))
    schedule = optax.linear_schedule(0.5, 1.0, 1)
    algorithm = adversarial_training(
        network, optax.sgd(1.0), attack=lambda key, apply, x, y, epsilon: x - epsilon * apply(x)[:, 1:] / 2.0,
        epsilon=schedule, clean_weight=0.25, augment=lambda key, x: x + 1.0,
    )  # fmt: skip
    x, y = np.array([[1.0], [3.0]]), np.array([1, 1])
    step = jax.jit(algorithm.step)
    state, w = algorithm.init(jax.random.key(0)), 2.0
    for epsilon in (0.5, 1.0):
        state, metrics = step(state, {"x": jnp.asarray(x - 1.0, jnp.float32), "y": jnp.asarray(y)})
        x_adv = x - epsilon * w * x / 2
        loss = lambda v, w=w: np.mean(np.log1p(np.exp(-w * v)))  # noqa: E731
        slope = lambda v, w=w: np.mean(-expit(-w * v) * v)  # noqa: E731
        np.testing.assert_allclose(metrics["loss"], 0.75 * loss(x_adv) + 0.25 * loss(x), rtol=1e-6)
        np.testing.assert_allclose([metrics["epsilon"], metrics["accuracy"]], [epsilon, 1.0])
        assert metrics["adversarial_accuracy"] == (w * x_adv > 0).mean()
        w -= 0.75 * slope(x_adv) + 0.25 * slope(x)
        np.testing.assert_allclose(state.params, [w], rtol=1e-6)


@pytest.mark.slow
def test_pgd_trains_a_linear_classifier_as_fgsm_does():
    # The edge of the ball is the worst place for a linear classifier; one row that cannot fall keeps PGD going.
    x = jnp.concatenate([jnp.asarray(X[:32]), jnp.full((1, 1 + WEAK), 50.0)])
    y = jnp.append(jnp.asarray(Y[:32]), 1)
    start = LINEAR.starting_from({"w": jnp.full(1 + WEAK, 0.1), "b": jnp.zeros(())})
    found = []
    for attack, microbatches in [(one_step, 3), (functools.partial(pgd, steps=3, bounds=None), 1)]:
        algorithm = adversarial_training(start, optax.sgd(0.1), attack=attack, epsilon=0.2, microbatches=microbatches)
        state, _ = jax.jit(algorithm.step)(algorithm.init(jax.random.key(1)), LabelledBatch(x, y))
        found.append(state.params["w"])
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 6.0), ("l2", np.sqrt(14.0)), ("l1", 3.0)])
def test_ascent_reaches_the_linear_optimum_and_stays_in_the_box(norm, dual):
    x, slope = np.full((2, 3), 0.5, np.float32), np.array([3.0, -1.0, 2.0], np.float32)

    @jax.jit
    def climb(epsilon, step_size, width):
        return ascend(
            lambda v: v @ slope, x, jnp.zeros_like(x), epsilon,
            norm=norm, steps=8, step_size=step_size, bounds=(0.5 - width, 0.5 + width),
        )  # fmt: skip

    np.testing.assert_allclose((np.asarray(climb(0.3, 0.2, 0.5)) - x) @ slope, 0.3 * dual, rtol=1e-5)
    assert np.abs(np.asarray(climb(9.0, 9.0, 0.125)) - x).max() == 0.125


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clean_weight": 1.5}, r"\[0, 1\], got 1.5"), ({"epsilon": -0.1}, "epsilon must not be negative or NaN")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        algorithm = adversarial_training(LINEAR, optax.sgd(0.1), attack=one_step, **options)
        jax.eval_shape(algorithm.step, jax.eval_shape(algorithm.init, jax.random.key(0)), (X, Y))


def test_batches_in_every_form_and_bad_ones_named():
    x, y = jnp.zeros((3, 2)), jnp.zeros(3, jnp.int32)
    assert as_labelled({"x": x, "y": y, "group": y}).group is y
    assert as_labelled((x, y)).index is None
    assert as_labelled(LabelledBatch({"a": x}, y)).x["a"] is x
    for bad, message in [
        ({"x": x}, "x, y and perhaps group"),
        ({"x": x, "y": y, "label": y}, "label"),
        ((x, y, y), "pair"),
        ((x, x), r"y \[B\] of integers, got \(3, 2\)"),
        ((x, jnp.zeros(3)), "float32"),
        ((x[:2], y), r"B = 3.*\(2, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            as_labelled(bad)
