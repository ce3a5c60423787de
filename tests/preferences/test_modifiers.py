"""Divergences, mixtures, WPO weights and length-desensitised masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxalign.preferences import (
    alpha_score,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    jensen_shannon_score,
    length_desensitized_masks,
    mixture_loss,
    robust_dpo_loss,
    sequence_log_probs,
    with_divergence,
    wpo_weights,
)

LOGPS = tuple(-np.random.default_rng(5).uniform(1, 9, (4, 6)))
U = np.array([-3.0, -0.2, 0.0, 0.4, 2.5])


def test_scores_are_the_derivatives_of_their_divergences():
    t = np.exp(U)
    generators = {
        jensen_shannon_score: lambda t: t * jnp.log(t) - (t + 1) * jnp.log((t + 1) / 2),
        functools.partial(alpha_score, alpha=1.0): lambda t: t - jnp.log(t),
        functools.partial(alpha_score, alpha=0.3): lambda t: (t**0.7 - 0.7 * t - 0.3) / (0.3 * (0.3 - 1)),
    }
    with jax.enable_x64(True):
        for score, f in generators.items():
            slope = np.asarray(jax.vmap(jax.grad(f))(t))
            shift = np.asarray(score(U)) - slope  # f' is fixed up to a constant, which the pair loss cancels
            np.testing.assert_allclose(shift, shift[0], atol=1e-12)
            np.testing.assert_allclose(score(0.0), 0.0, atol=1e-12)


def test_alpha_score_limits_and_overflow():
    np.testing.assert_allclose(alpha_score(U, alpha=0.0), U, rtol=1e-6)
    np.testing.assert_allclose(alpha_score(U, alpha=1e-3), U, rtol=1e-2)
    slopes = jax.vmap(jax.grad(lambda u: alpha_score(u, alpha=0.0)))(jnp.asarray(U))
    np.testing.assert_allclose(slopes, 1.0)
    assert jnp.isfinite(alpha_score(-500.0, alpha=1.0))


def test_with_divergence_of_the_identity_changes_nothing():
    for loss, extra in [(dpo_loss, {"label_smoothing": 0.1}), (ipo_loss, {}), (hinge_loss, {})]:
        ours = with_divergence(loss, lambda u: u)(*LOGPS, beta=0.2, **extra)
        np.testing.assert_allclose(ours, loss(*LOGPS, beta=0.2, **extra), rtol=1e-6)


def test_forward_kl_dpo_by_hand():
    # c = log 2, r = -log 2: scores 1 - 1/2 and 1 - 2, difference 1.5
    args = tuple(jnp.array([x]) for x in (np.log(2.0), -np.log(2.0), 0.0, 0.0))
    loss = with_divergence(dpo_loss, functools.partial(alpha_score, alpha=1.0))
    np.testing.assert_allclose(loss(*args, beta=1.0), [0.20141328], rtol=1e-6)


def test_mixture_is_the_weighted_sum():
    robust = functools.partial(robust_dpo_loss, label_smoothing=0.2)
    mixed = mixture_loss([dpo_loss, robust, ipo_loss], [0.5, 0.3, 2.0])
    expected = 0.5 * dpo_loss(*LOGPS, beta=0.2) + 0.3 * robust(*LOGPS, beta=0.2) + 2.0 * ipo_loss(*LOGPS, beta=0.2)
    np.testing.assert_allclose(jax.jit(mixed)(*LOGPS, beta=0.2), expected, rtol=1e-6)
    # Weights may be traced, so that a sweep over them compiles once.
    swept = jax.vmap(lambda w: mixture_loss([dpo_loss, ipo_loss], [w, 1 - w])(*LOGPS, beta=0.2))(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(swept, [ipo_loss(*LOGPS, beta=0.2), dpo_loss(*LOGPS, beta=0.2)], rtol=1e-6)


def test_wpo_weights_in_numpy_and_for_a_uniform_policy():
    rng = np.random.default_rng(7)
    logits, tokens = 2 * rng.normal(size=(2, 6, 9)), rng.integers(0, 9, (2, 6))
    mask = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
    logp = scipy.special.log_softmax(logits, axis=-1)
    aligned = [logp[0, t - 1, tokens[0, t]] - np.log((np.exp(logp[0, t - 1]) ** 2).sum()) for t in (2, 3, 4)]
    np.testing.assert_allclose(wpo_weights(logits, tokens, mask), [np.exp(np.mean(aligned)), 1.0], rtol=1e-5)
    np.testing.assert_allclose(wpo_weights(np.zeros((2, 6, 9)), tokens, mask), 1.0, rtol=1e-6)
    assert not jax.grad(lambda x: wpo_weights(x, tokens, mask).sum())(jnp.asarray(logits)).any()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitized_masks_weigh_the_tail(alpha):
    chosen = np.array([[0, 1, 1, 1, 1], [0, 0, 0, 1, 0], [1, 1, 1, 0, 0]])
    rejected = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0]])
    ours = length_desensitized_masks(chosen, rejected, alpha=alpha)
    a = alpha
    np.testing.assert_allclose(ours[0], [[0, 1, 1, a, a], [0, 0, 0, 1, 0], [0, 1, a, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(ours[1], [[0, 0, 1, 1, 0], [0, 1, a, a, a], [0, 1, 0, 0, 0]], rtol=1e-6)


def test_desensitized_masks_feed_sequence_log_probs():
    tokens, mask = np.zeros((1, 5), int), np.array([[0, 1, 1, 1, 1]])
    logits = np.zeros((1, 5, 3))
    weights, _ = length_desensitized_masks(mask, np.array([[0, 1, 0, 0, 0]]), alpha=0.5)
    np.testing.assert_allclose(sequence_log_probs(logits, tokens, weights), [-2.5 * np.log(3)], rtol=1e-6)
