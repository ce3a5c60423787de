"""Reference-free losses and KTO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import expit, log_expit

from jaxalign.preferences import apo_zero_loss, batch_kl, cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss

CHOSEN, REJECTED = -np.array([0.4, 2.0, 0.01, 9.0]), -np.array([1.1, 0.3, 5.0, 9.5])


def test_simpo_and_cpo_by_hand():
    # 2 (-0.5 + 1.5) - 0.5 = 1.5
    chosen, rejected = jnp.array([-0.5]), jnp.array([-1.5])
    np.testing.assert_allclose(simpo_loss(chosen, rejected, beta=2.0, gamma=0.5), [0.20141328], rtol=1e-6)
    np.testing.assert_allclose(cpo_loss(chosen, rejected, beta=1.5), [0.20141328], rtol=1e-6)


def test_simpo_without_margin_is_cpo_is_dpo_with_a_flat_reference():
    flat = np.full(4, -3.0)
    expected = dpo_loss(CHOSEN, REJECTED, flat, flat, beta=2.0, label_smoothing=0.1)
    np.testing.assert_allclose(cpo_loss(CHOSEN, REJECTED, beta=2.0, label_smoothing=0.1), expected, rtol=1e-5)
    simpo = simpo_loss(CHOSEN, REJECTED, beta=2.0, gamma=0.0, label_smoothing=0.1)
    np.testing.assert_allclose(simpo, expected, rtol=1e-5)


def test_orpo_by_hand_and_in_float64():
    # Probabilities 3/4 and 1/2: odds 3 and 1, sigmoid(log 3) = 3/4.
    np.testing.assert_allclose(
        orpo_loss(jnp.log(jnp.array([0.75])), jnp.log(jnp.array([0.5])), beta=0.1), [-0.1 * np.log(0.75)], rtol=1e-5
    )
    p, q = np.exp(CHOSEN), np.exp(REJECTED)
    expected = -0.1 * log_expit(np.log(p / (1 - p)) - np.log(q / (1 - q)))
    np.testing.assert_allclose(orpo_loss(CHOSEN, REJECTED, beta=0.1), expected, rtol=1e-4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(orpo_loss(CHOSEN, REJECTED, beta=0.1), expected, rtol=1e-10)
        check_grads(lambda c, r: orpo_loss(c, r, beta=0.1), (CHOSEN, REJECTED), order=1, modes=["rev"])


def test_orpo_of_certain_completions_is_finite():
    chosen, rejected = jnp.array([0.0, 0.0, -300.0]), jnp.array([0.0, -200.0, 0.0])
    value, gradients = jax.value_and_grad(lambda *a: orpo_loss(*a, beta=1.0).sum(), (0, 1))(chosen, rejected)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in gradients)
    np.testing.assert_allclose(orpo_loss(chosen, rejected, beta=1.0)[0], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 1.5])
def test_kto_in_numpy(kl):
    policy, reference, desirable = CHOSEN, REJECTED, np.array([True, False, False, True])
    u = policy - reference
    good, bad = 1.3 * (1 - expit(0.5 * (u - kl))), 0.7 * (1 - expit(0.5 * (kl - u)))
    with jax.enable_x64(True):
        ours = kto_loss(policy, reference, desirable, beta=0.5, kl=kl, desirable_weight=1.3, undesirable_weight=0.7)
        np.testing.assert_allclose(ours, np.where(desirable, good, bad), rtol=1e-12)
        mapped = jax.vmap(lambda *a: kto_loss(*a, beta=0.5, kl=kl))(policy, reference, desirable)
        np.testing.assert_allclose(mapped, kto_loss(policy, reference, desirable, beta=0.5, kl=kl), rtol=1e-12)


def test_kto_at_the_reference_point_is_half_and_pairs_make_apo_zero():
    policy = jnp.array([-4.0, -4.0])
    half = kto_loss(policy, policy - 2.0, jnp.array([True, False]), beta=3.0, kl=2.0)
    np.testing.assert_allclose(half, 0.5, rtol=1e-6)
    zeros = np.zeros(4)
    both = [kto_loss(x, zeros, np.full(4, d), beta=0.5, kl=0.0) for x, d in ((CHOSEN, True), (REJECTED, False))]
    np.testing.assert_allclose(sum(both), apo_zero_loss(CHOSEN, REJECTED, zeros, zeros, beta=0.5), rtol=1e-5)


def test_kto_has_no_gradient_in_its_reference_point():
    def total(policy, kl):
        return kto_loss(policy, jnp.zeros(4), jnp.array([True, False] * 2), beta=0.5, kl=kl).sum()

    policy_gradient, kl_gradient = jax.grad(total, (0, 1))(jnp.asarray(CHOSEN), 1.0)
    assert kl_gradient == 0.0
    assert (np.sign(policy_gradient) == [-1, 1, -1, 1]).all()


def test_batch_kl_is_a_clamped_mean_over_valid_rows_without_gradient():
    policy, reference = jnp.array([-1.0, -2.0, 50.0]), jnp.array([-3.0, -3.0, -9.0])
    valid = jnp.array([1, 1, 0])
    assert batch_kl(policy, reference, valid=valid) == 1.5
    assert batch_kl(reference, policy) == 0.0
    assert batch_kl(policy, reference, valid=jnp.zeros(3)) == 0.0
    spoiled = policy.at[2].set(jnp.nan)
    assert batch_kl(spoiled, reference, valid=valid) == 1.5
    assert not jax.grad(lambda p: batch_kl(p, reference))(policy).any()


def test_kto_shapes_that_would_broadcast_raise():
    with pytest.raises(AssertionError):
        kto_loss(jnp.zeros(4), jnp.zeros(4), jnp.zeros((4, 1), bool), beta=1.0, kl=0.0)
