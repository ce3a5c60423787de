"""Gradient masking: no sign in an honest network, and the right signs in two that hide its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.robustness.attack_result import checked_result
from jaxalign.robustness.gradient_masking import EXPECTED, MaskingSigns, gradient_masking, noise_search
from jaxalign.robustness.threat_model import project

X = np.random.default_rng(0).uniform(0.1, 0.9, (64, 6)).astype(np.float32)
KEY = jax.random.key(2)
SMALL = {"steps": 8, "queries": 40, "multiples": (0.5, 1.0, 2.0)}
W = np.array([[2.0, 0.0], [0.5, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], np.float32)


def linear(x):
    return x @ W


def one_guess(key, apply, x, y, epsilon):
    """A poor black box that is quick to compile: towards the middle of all inputs."""
    towards = jnp.mean(x, axis=0, keepdims=True) - x
    x_adv = x + project(towards, epsilon, "l2")
    return checked_result(apply, x, x_adv, y, epsilon, norm="l2", bounds=None)


@pytest.fixture(scope="module")
def report():
    """One program for all networks: logits times `scale`, inputs rounded to `levels` if there are any; wrong labels."""
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(6, 16)).astype(np.float32), rng.normal(size=(16, 3)).astype(np.float32) / 4

    @jax.jit
    def run(scale, levels, epsilon, wrong):
        def apply(x):
            rounded = jnp.round(levels * x) / jnp.maximum(levels, 1.0)
            x = jnp.where(levels > 0, rounded, x)
            return scale * (jnp.tanh((x - 0.5) @ first) @ second)

        logits = apply(X)
        y = jnp.where(wrong, jnp.argmin(logits, axis=1), jnp.argmax(logits, axis=1))
        return gradient_masking(KEY, apply, X, y, epsilon, norm="l2", black_box=one_guess, **SMALL)

    return lambda scale=1.0, levels=0.0, wrong=False: run(scale, levels, 0.3, wrong)


@pytest.fixture(scope="module")
def honest(report):
    return report()


def signs(found) -> set[str]:
    return {name for name in MaskingSigns._fields if getattr(found.suspicious, name)}


def test_an_honest_network_shows_no_sign(honest):
    assert signs(honest) == set()
    assert honest.unbounded_success == 1.0
    assert honest.gradient_cosine > 0.5
    assert honest.linearity_error < 0.3
    assert (np.diff(honest.robust_accuracy) < 0).all()
    np.testing.assert_allclose(honest.radii, [0.15, 0.3, 0.6])


def test_saturated_softmax_hides_its_gradients(report, honest):
    """Logits times 10,000: the same decisions, so the same robustness, but the cross-entropy has no slope left."""
    found = report(scale=1e4)
    assert {"black_box_advantage", "noise_advantage", "unbounded_success", "zero_gradient"} <= signs(found)
    assert found.zero_gradient > 0.8
    assert found.robust_accuracy[1] > honest.robust_accuracy[1] + 0.1
    # The margin is not saturated, so what is measured on it says nothing new.
    np.testing.assert_allclose(found.linearity_error, honest.linearity_error, atol=1e-3)


def test_rounded_input_has_no_gradient_at_all(report):
    found = report(levels=10.0)
    assert {"unbounded_success", "zero_gradient", "linearity_error", "gradient_cosine"} <= signs(found)
    assert (found.zero_gradient, found.linearity_error, found.gradient_cosine) == (1.0, 1.0, 0.0)


def test_where_no_row_is_right_there_is_no_number(report):
    found = report(wrong=True)
    assert np.isnan([getattr(found, name) for name in MaskingSigns._fields if name != "accuracy_rise"]).all()
    assert (found.robust_accuracy == 0).all()
    assert signs(found) == set()


@pytest.mark.slow
def test_a_linear_classifier_in_closed_form_without_a_box():
    y = np.argmax(linear(X), axis=1)
    found = gradient_masking(KEY, linear, X, y, 0.125, bounds=None, **SMALL)
    assert signs(found) == set()
    np.testing.assert_allclose([found.linearity_error, found.gradient_cosine], [0.0, 1.0], atol=1e-5)
    margin = np.abs(linear(X) @ [1.0, -1.0])  # |w_0 - w_1|_1 = 6.5
    np.testing.assert_allclose(found.robust_accuracy, [np.mean(margin > 6.5 * r) for r in found.radii], atol=1e-6)


@pytest.mark.slow
def test_noise_search_keeps_the_best_point_inside_ball_and_box():
    y = np.argmax(linear(X), axis=1)
    found = noise_search(KEY, linear, X, y, jnp.full(64, 0.5), norm="l2", queries=40)
    assert 0 < found.success.sum() < 64
    assert (found.margin <= np.abs(linear(X) @ [1.0, -1.0]) + 1e-6).all()
    assert (np.linalg.norm(found.x_adv - X, axis=1) <= 0.5 + 1e-5).all()


def test_each_number_says_what_it_should_be_and_bad_multiples_are_named():
    assert EXPECTED.keys() == set(MaskingSigns._fields)
    with pytest.raises(ValueError, match=r"hold 1, got \(0.5, 2.0\)"):
        gradient_masking(KEY, linear, X, np.zeros(64, int), 0.1, multiples=(0.5, 2.0))
