"""KL estimators against the exact KL they estimate, hand numbers, gradients, and the controller by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import log_softmax, rel_entr

from jaxalign.rl import kl
from jaxalign.rl.kl import adaptive_kl

exact_kl, kl_k1, kl_k2, kl_k3 = (jax.jit(k) for k in (kl.exact_kl, kl.kl_k1, kl.kl_k2, kl.kl_k3))
LOGITS = np.random.default_rng(0).normal(size=(2, 3, 6))


def test_estimators_by_hand():
    x = np.array([-1.0, 0.0, 2.0])
    np.testing.assert_allclose(kl_k1(x), x)
    np.testing.assert_allclose(kl_k2(x), [0.5, 0.0, 2.0])
    np.testing.assert_allclose(kl_k3(x), [np.e - 2.0, 0.0, np.exp(-2) + 1.0], rtol=1e-6)
    assert (np.asarray(kl_k3(np.linspace(-3, 3, 101))) >= 0).all()
    with jax.enable_x64(True):
        small = 1e-5 * np.array([-1.0, 1.0])
        np.testing.assert_allclose(kl_k3(small), kl_k2(small), rtol=1e-4)
        lanes = jax.jit(jax.vmap(lambda x: (kl_k1(x), kl_k2(x), kl_k3(x))))
        check_grads(lanes, (x,), order=1, modes=["rev"])
        np.testing.assert_allclose(lanes(x)[2], np.exp(-x) - 1 + x, rtol=1e-12)


def expectations(logits_p, logits_q):
    """Means under p, summed over every action: no sampling error."""
    log_p, log_q = log_softmax(logits_p, axis=-1), log_softmax(logits_q, axis=-1)
    p, log_ratio = np.exp(log_p), log_p - log_q
    return [np.sum(p * np.asarray(k(log_ratio)), axis=-1) for k in (kl_k1, kl_k2, kl_k3)]


def test_k1_and_k3_are_unbiased_and_k2_nearly_so_when_close():
    p, q = LOGITS
    with jax.enable_x64(True):
        exact = exact_kl(p, q)
        k1, k2, k3 = expectations(p, q)
        np.testing.assert_allclose([k1, k3], [exact, exact], rtol=1e-12)
        assert (np.abs(k2 - exact) > 1e-3).any()
        near = p + 1e-3 * q
        np.testing.assert_allclose(expectations(p, near)[1], exact_kl(p, near), rtol=1e-2)


def test_gradients_at_fixed_samples_are_as_the_docstring_says():
    p, q = jnp.asarray(LOGITS[:, 0])

    def mean_of(k):
        def scalar(logits):
            log_p = jax.nn.log_softmax(logits)
            weights = jax.lax.stop_gradient(jnp.exp(log_p))
            return jnp.sum(weights * k(log_p - jax.nn.log_softmax(q)))

        return jax.jit(jax.grad(scalar))(p)

    np.testing.assert_allclose(mean_of(kl_k1), 0.0, atol=1e-6)
    np.testing.assert_allclose(mean_of(kl_k2), jax.grad(exact_kl)(p, q), atol=1e-6)


def test_exact_kl_matches_scipy():
    p, q = LOGITS
    probability_p, probability_q = (np.exp(log_softmax(x, axis=-1)) for x in (p, q))
    expected = rel_entr(probability_p, probability_q).sum(axis=-1)
    found = exact_kl(p, q)
    assert found.shape == (3,)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(exact_kl(p, p), 0.0, atol=1e-7)
    with jax.enable_x64(True):
        lanes = jax.jit(jax.vmap(exact_kl))
        np.testing.assert_allclose(lanes(p, q), expected, rtol=1e-12)
        check_grads(lanes, (p, q), order=1, modes=["rev"])
    with pytest.raises(AssertionError):
        exact_kl(p, q[:, :1])


def test_impossible_actions():
    p, q = jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, np.log(3.0), -jnp.inf])
    np.testing.assert_allclose(exact_kl(p, q), 0.5 * np.log(4 / 3), rtol=1e-6)
    assert exact_kl(p, q.at[2].set(5.0)) > 1
    gradients = jax.jit(jax.grad(exact_kl, (0, 1)))(p, q)
    assert np.isfinite(gradients).all()
    assert exact_kl(q.at[2].set(0.0), p) == np.inf


def test_controller_by_hand():
    controller = adaptive_kl(initial=0.5, target=6.0, horizon=100)
    step = jax.jit(controller.step)
    coefficient = controller.init()
    assert coefficient.dtype == jnp.float32
    assert step(coefficient, 6.0, 10) == 0.5
    np.testing.assert_allclose(step(coefficient, 6.6, 50), 0.5 * (1 + 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(step(coefficient, 600.0, 100), 0.5 * 1.2, rtol=1e-6)
    np.testing.assert_allclose(step(coefficient, 0.0, 100), 0.5 * 0.8, rtol=1e-6)
    # A policy whose KL falls as the coefficient grows settles at the target.
    settled, _ = jax.lax.scan(lambda c, _: (controller.step(c, 3.0 / c, 20), None), coefficient, length=200)
    np.testing.assert_allclose(3.0 / settled, 6.0, rtol=1e-3)
