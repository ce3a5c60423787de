"""Faithfulness of attributions that are right, wrong and reversed, on functions where that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxalign.algorithm import Network
from jaxalign.interpretability.attribution import input_gradient
from jaxalign.interpretability.attribution_faithfulness import (
    attribution_faithfulness,
    cascading_randomization,
    deletion_curve,
    infidelity,
    insertion_curve,
)

KEY = jax.random.key(0)
W = np.array([1.0, 5.0, 3.0, 0.0], np.float32)


def linear(x):
    return x @ W


def test_curves_of_a_linear_function_by_hand():
    # From 9, the terms 5, 3, 1, 0 go one after another.
    ones = np.ones(4, np.float32)
    deleted, inserted, halves = jax.jit(
        lambda x: (
            deletion_curve(linear, x[None], W[None], 0.0),
            insertion_curve(linear, x, W, 0.0, points=4, chunk=2),
            deletion_curve(linear, x, W, 0.0, points=2),
        )
    )(ones)
    np.testing.assert_allclose(deleted.fraction, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(deleted.value, [[9, 4, 1, 0, 0]])
    np.testing.assert_allclose(deleted.area, [(4.5 + 4 + 1) / 4])
    np.testing.assert_allclose(inserted.value, [0, 5, 8, 9, 9])
    np.testing.assert_allclose(inserted.area, (5 + 8 + 9 + 4.5) / 4)
    np.testing.assert_allclose(halves.value, [9, 1, 0])


def test_scores_of_pixels_replace_all_their_channels():
    images, scores = np.ones((2, 2, 2, 3), np.float32), np.array([[[1.0, 4.0], [3.0, 2.0]]] * 2)
    fn = lambda x: jnp.sum(x * np.array([[1.0, 10.0], [100.0, 1000.0]])[None, :, :, None], axis=(1, 2, 3))  # noqa: E731
    value = jax.jit(lambda x: deletion_curve(fn, x, scores, 0.0, points=4))(images).value
    np.testing.assert_allclose(value, [[3333, 3303, 3003, 3, 0]] * 2)


def test_right_attributions_beat_random_orders_reversed_ones_lose_and_random_ones_do_neither():
    rng = np.random.default_rng(0)
    x, weights = rng.uniform(0.5, 1, size=(24, 8)).astype(np.float32), np.linspace(-1, 2, 8, dtype=np.float32)
    fn = lambda x: jax.nn.softplus(x @ weights)  # noqa: E731
    check = jax.jit(lambda scores: attribution_faithfulness(KEY, fn, x, scores, 0.0, points=8))
    own = x * weights[None]
    right, reverse, chance = check(own), check(-own), check(rng.normal(size=x.shape).astype(np.float32))
    for gain in (right.deletion_gain, right.insertion_gain):
        assert gain[1] <= gain[0] <= gain[2]
        assert gain[1] > 0
    assert reverse.deletion_gain[2] < 0
    assert reverse.insertion_gain[2] < 0
    assert chance.deletion_gain[1] < 0 < chance.deletion_gain[2]
    # Deleting in one order is inserting in the other.
    np.testing.assert_allclose(right.deletion.value, reverse.insertion.value[:, ::-1], rtol=1e-5)
    expected = np.trapezoid(right.deletion.value, right.deletion.fraction, axis=1)
    np.testing.assert_allclose(right.deletion.area, expected, rtol=1e-5)


def test_slopes_of_a_linear_function_have_no_infidelity_and_wrong_ones_have_what_they_err():
    x, right = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), np.broadcast_to(W, (3, 4))
    run = jax.jit(lambda slopes: infidelity(KEY, linear, x, slopes, sigma=0.3, samples=8000, chunk=100))
    np.testing.assert_allclose(run(right), np.zeros(3), atol=1e-10)
    # With slopes wrong by d the error n . d has variance sigma^2 |d|^2.
    np.testing.assert_allclose(run(right + 1), np.full(3, 0.09 * 4), rtol=0.06)


def test_randomised_weights_change_gradients_and_not_a_blind_attribution():
    sizes = {"first": (10, 16), "second": (16, 16), "last": (16, 1)}

    def init(key):
        keys = zip(sizes.items(), jax.random.split(key, 3), strict=True)
        return {name: {"kernel": jax.random.normal(k, size) / 4} for (name, size), k in keys}

    def apply(params, x):
        h = jax.nn.relu(jax.nn.relu(x @ params["first"]["kernel"]) @ params["second"]["kernel"])
        return h @ params["last"]["kernel"]

    def gradients(params):
        return input_gradient(lambda x: apply(params, x)[:, 0], x)

    network, layers = Network(jax.jit(init), apply), ("last", "second", "first")
    params, x = network.init(jax.random.key(1)), np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)

    run = lambda attribute: cascading_randomization(KEY, network, params, attribute, layers)  # noqa: E731
    similar, blind = jax.jit(lambda: (run(gradients), run(lambda _: x)))()
    assert similar.shape == (4, 6)
    np.testing.assert_allclose(similar[0], np.ones(6), rtol=1e-5)
    assert np.abs(similar[-1]).mean() < 0.6
    np.testing.assert_allclose(blind, np.ones((4, 6)), rtol=1e-5)
    magnitudes = jax.jit(lambda params: jnp.abs(gradients(params)))
    expected = scipy.stats.spearmanr(magnitudes(network.init(KEY))[2], magnitudes(params)[2]).statistic
    np.testing.assert_allclose(similar[-1, 2], expected, rtol=1e-4)
    with pytest.raises(ValueError, match="no parameter of layer 'lost'; there are first/kernel"):
        cascading_randomization(KEY, network, params, gradients, ("lost",))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deletion_curve(linear, np.ones((2, 4)), np.ones((2, 3)), 0.0), r"attributions \(2, 3\)"),
        (lambda: deletion_curve(linear, np.ones((2, 4)), np.ones((2, 4)), 0.0, points=0), "points must be at least 1"),
        (lambda: attribution_faithfulness(KEY, linear, np.ones(4), W, 0.0), "intervals are over examples"),
        (lambda: insertion_curve(linear, np.ones(4), W * np.nan, 0.0), "attributions have NaN"),
        (lambda: infidelity(KEY, linear, np.ones((2, 4)), W, sigma=1.0), "the shape of x"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
