"""Likelihoods of pairs, rankings and ties: hand numbers, limits, and probabilities that sum to one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.preferences import bradley_terry_loss, centering_penalty, davidson_loss, plackett_luce_loss


def test_bradley_terry_by_hand():
    # A lead of log 3 wins three times in four.
    chosen, rejected = jnp.array([np.log(3.0), 0.0]), jnp.array([0.0, np.log(3.0)])
    np.testing.assert_allclose(bradley_terry_loss(chosen, rejected), [-np.log(0.75), -np.log(0.25)], rtol=1e-6)
    smooth = bradley_terry_loss(chosen, rejected, label_smoothing=0.1)
    expected = [-0.9 * np.log(0.75) - 0.1 * np.log(0.25), -0.9 * np.log(0.25) - 0.1 * np.log(0.75)]
    np.testing.assert_allclose(smooth, expected, rtol=1e-6)


def test_margin_moves_the_point_of_indifference():
    chosen, rejected, margin = jnp.array([2.0, 5.0]), jnp.array([1.0, 1.0]), jnp.array([1.0, 4.0])
    np.testing.assert_allclose(bradley_terry_loss(chosen, rejected, margin=margin), np.log(2.0), rtol=1e-6)


def test_far_rewards_stay_finite():
    loss, gradient = jax.value_and_grad(lambda x: bradley_terry_loss(x, 0.0))(-1e4)
    assert (loss, gradient) == (1e4, -1.0)
    assert bradley_terry_loss(1e4, 0.0) == 0.0


def test_shapes_that_would_broadcast_raise():
    with pytest.raises(AssertionError):
        bradley_terry_loss(jnp.zeros((4, 1)), jnp.zeros(4))


def test_half_precision_rewards_are_compared_in_float32():
    assert bradley_terry_loss(jnp.zeros(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert bradley_terry_loss(np.zeros(2), np.zeros(2)).dtype == jnp.float64


def test_plackett_luce_of_two_is_bradley_terry():
    rewards, ranking = jnp.array([[0.3, -1.0], [0.3, -1.0]]), jnp.array([[0, 1], [1, 0]])
    expected = bradley_terry_loss(jnp.array([0.3, -1.0]), jnp.array([-1.0, 0.3]))
    np.testing.assert_allclose(plackett_luce_loss(rewards, ranking), expected, rtol=1e-6)


def test_plackett_luce_against_its_definition_and_its_total():
    rewards = np.array([0.2, -1.3, 2.0, 0.7])
    orders = np.array(list(itertools.permutations(range(4))))
    weights = np.exp(rewards)[orders]
    remaining = np.cumsum(weights[:, ::-1], axis=1)[:, ::-1]
    losses = jax.vmap(plackett_luce_loss, (None, 0))(jnp.asarray(rewards), orders)
    np.testing.assert_allclose(losses, -np.log(weights / remaining).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(np.exp(-losses).sum(), 1.0, rtol=1e-5)
    assert losses.argmin() == np.where((orders == np.argsort(-rewards)).all(axis=1))[0][0]


def test_plackett_luce_gradient_in_float64():
    with jax.enable_x64(True):
        ranking = jnp.array([2, 0, 1])
        check_grads(lambda r: plackett_luce_loss(r, ranking), (np.array([0.5, 1.0, -2.0]),), order=1)


@pytest.mark.parametrize("tie_strength", [0.0, 0.5, 3.0])
def test_davidson_probabilities_sum_to_one(tie_strength):
    a, b = np.array([0.3, -2.0, 40.0]), np.array([0.3, 1.0, -60.0])
    losses = [davidson_loss(a, b, np.full(3, k), tie_strength=tie_strength) for k in range(3)]
    np.testing.assert_allclose(np.exp(-np.array(losses)).sum(axis=0), 1.0, rtol=1e-6)
    weights = np.stack([np.exp(a), np.exp(b), tie_strength * np.exp((a + b) / 2)])[:, :2]
    np.testing.assert_allclose(np.exp(-np.array(losses))[:, :2], weights / weights.sum(axis=0), rtol=1e-5)


def test_davidson_without_ties_is_bradley_terry():
    a, b = jnp.array([0.0, 1.5, -3.0]), jnp.array([0.0, -1.0, 2.0])
    np.testing.assert_allclose(
        davidson_loss(a, b, jnp.zeros(3, int), tie_strength=0.0), bradley_terry_loss(a, b), rtol=1e-6
    )
    np.testing.assert_allclose(
        davidson_loss(a, b, jnp.ones(3, int), tie_strength=0.0), bradley_terry_loss(b, a), rtol=1e-6
    )
    assert np.isinf(davidson_loss(0.0, 0.0, 2, tie_strength=0.0))


def test_davidson_gradients_are_right_at_equality_and_without_ties():
    def reference(a, b, nu):
        return jnp.log(jnp.exp(a) + jnp.exp(b) + nu * jnp.exp((a + b) / 2)) - a

    for point in [(0.0, 0.0, 0.5), (1.0, -1.0, 0.0), (0.2, 0.2, 0.0)]:
        ours = jax.grad(lambda a, b, nu: davidson_loss(a, b, 0, tie_strength=nu), (0, 1, 2))(*point)
        np.testing.assert_allclose(ours, jax.grad(reference, (0, 1, 2))(*point), rtol=1e-5, atol=1e-7)


def test_centering_penalty_by_hand():
    np.testing.assert_allclose(centering_penalty(jnp.array([1.0, 2.0]), jnp.array([-1.0, 1.0])), [0.0, 9.0])
