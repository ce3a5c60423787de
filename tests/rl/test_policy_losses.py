"""Policy and value losses: hand numbers, NumPy float64, limits, gradients, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.rl.policy_losses import policy_gradient_loss, ppo_policy_loss, ppo_value_loss

ppo = jax.jit(ppo_policy_loss)


def arrays(shape=(4, 7)):
    rng = np.random.default_rng(0)
    log_probs, noise, advantages = -rng.exponential(size=shape), rng.normal(size=shape), rng.normal(size=shape)
    return log_probs, log_probs - 0.5 * noise, 3 * advantages


def clipped(log_probs, old, advantages, low, high, dual=None):
    ratio = np.exp(log_probs - old)
    objective = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual is not None:
        objective = np.where(advantages < 0, np.maximum(objective, dual * advantages), objective)
    return -objective


LOSSES = {
    "policy gradient": (policy_gradient_loss, 2, {}, lambda p, a: -p * a),
    "ppo": (ppo_policy_loss, 3, {"clip_epsilon": 0.2}, lambda *x: clipped(*x, 0.2, 0.2)),
    "clip higher": (
        ppo_policy_loss, 3, {"clip_epsilon": 0.2, "clip_epsilon_high": 0.4}, lambda *x: clipped(*x, 0.2, 0.4)
    ),
    "dual clip": (ppo_policy_loss, 3, {"clip_epsilon": 0.2, "dual_clip": 1.3}, lambda *x: clipped(*x, 0.2, 0.2, 1.3)),
    "value": (ppo_value_loss, 3, {}, lambda v, old, t: (v - t) ** 2 / 2),
    "clipped value": (
        ppo_value_loss, 3, {"clip_epsilon": 0.3},
        lambda v, o, t: np.maximum((v - t) ** 2, (o + np.clip(v - o, -0.3, 0.3) - t) ** 2) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_matches_numpy_under_jit_and_vmap_and_in_both_precisions(name):
    loss, count, options, formula = LOSSES[name]
    data = arrays()[:count]
    bound = lambda *x: loss(*x, **options)  # noqa: E731
    expected = formula(*data)
    single = jax.jit(bound)(*data)
    assert single.shape == (4, 7)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-6)
    assert jax.eval_shape(bound, *(jnp.asarray(x, jnp.bfloat16) for x in data)).dtype == jnp.float32
    with jax.enable_x64(True):
        lanes = jax.jit(jax.vmap(bound))
        np.testing.assert_allclose(lanes(*data), expected, rtol=1e-12)
        check_grads(lanes, data, order=1, modes=["rev"])


def test_ppo_by_hand():
    # ratios 2, 2, 0.5, 0.5 with advantages 1, -1, 1, -1: only moves that would gain are clipped.
    log_probs, advantages = np.log([2.0, 2.0, 0.5, 0.5]), np.array([1.0, -1.0, 1.0, -1.0])
    loss = ppo(log_probs, np.zeros(4), advantages, clip_epsilon=0.2)
    np.testing.assert_allclose(loss, [-1.2, 2.0, -0.5, 0.8], rtol=1e-6)
    slope = jax.jit(jax.grad(lambda x: ppo(x, jnp.zeros(4), advantages, clip_epsilon=0.2).sum()))(log_probs)
    np.testing.assert_allclose(slope, [0.0, 2.0, -0.5, 0.0], rtol=1e-6)
    higher = ppo(log_probs, np.zeros(4), advantages, clip_epsilon=0.2, clip_epsilon_high=1.5)
    np.testing.assert_allclose(higher, [-2.0, 2.0, -0.5, 0.8], rtol=1e-6)
    dual = ppo(log_probs, np.zeros(4), advantages, clip_epsilon=0.2, dual_clip=1.5)
    np.testing.assert_allclose(dual, [-1.2, 1.5, -0.5, 0.8], rtol=1e-6)


def test_at_the_acting_policy_ppo_has_the_policy_gradient():
    log_probs, _, advantages = arrays()
    clipped = jax.jit(jax.grad(lambda x: ppo(x, log_probs, advantages, clip_epsilon=0.2).sum()))(log_probs)
    reinforce = jax.jit(jax.grad(lambda x: policy_gradient_loss(x, advantages).sum()))(log_probs)
    np.testing.assert_allclose(clipped, reinforce, rtol=1e-6)


def test_wide_clips_change_nothing():
    log_probs, old, advantages = arrays()
    plain = -np.exp(log_probs - old) * advantages
    wide = ppo(log_probs, old, advantages, clip_epsilon=1e3, dual_clip=1e3)
    np.testing.assert_allclose(wide, plain, rtol=1e-4, atol=1e-5)
    values = ppo_value_loss(log_probs, old, advantages, clip_epsilon=1e3)
    np.testing.assert_allclose(values, ppo_value_loss(log_probs, old, advantages), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [ppo_policy_loss, ppo_value_loss])
def test_shapes_that_would_broadcast_raise(loss):
    with pytest.raises(AssertionError):
        loss(jnp.zeros((3, 1)), jnp.zeros((3, 2)), jnp.zeros((3, 2)), clip_epsilon=0.2)
    with pytest.raises(AssertionError):
        policy_gradient_loss(jnp.zeros((3, 1)), jnp.zeros(3))
