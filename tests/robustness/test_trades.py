"""TRADES: the loss against SciPy, its limits, and a classifier that gives up what an attacker can use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from jaxalign import sweep, train
from jaxalign.algorithm import Network
from jaxalign.robustness.trades import trades, trades_loss

RNG = np.random.default_rng(0)
CLEAN, ADVERSARIAL = RNG.normal(size=(2, 6, 4)) * 3
LABELS = RNG.integers(0, 4, 6)


@jax.jit
def evaluate(clean, adversarial, beta):
    """(losses [B], their sum's gradients in both logits), a row at a time."""

    def rows(clean, adversarial):
        one = lambda c, a, y: trades_loss(c[None], a[None], y[None], beta=beta)[0]  # noqa: E731
        losses = jax.vmap(one)(clean, adversarial, LABELS)
        return losses.sum(), losses

    slopes, losses = jax.grad(rows, (0, 1), has_aux=True)(clean, adversarial)
    return losses, slopes


def test_loss_by_hand():
    # p_clean = 1/4 each, p_adv = (1/2, 1/6, 1/6, 1/6): KL(p_clean || p_adv) = log(1/2) / 4 + 3/4 log(3/2)
    logits = np.tile(np.array([np.log(3.0), 0.0, 0.0, 0.0]), (6, 1))
    losses, _ = evaluate(np.zeros((6, 4)), logits, 6.0)
    np.testing.assert_allclose(losses, np.log(4.0) + 6.0 * (0.25 * np.log(0.5) + 0.75 * np.log(1.5)), rtol=1e-6)


def test_loss_against_scipy_in_float64_and_its_gradients():
    p, q = scipy.special.softmax(CLEAN, axis=1), scipy.special.softmax(ADVERSARIAL, axis=1)
    expected = -np.log(p[np.arange(6), LABELS]) + 2.5 * scipy.special.rel_entr(p, q).sum(axis=1)
    with jax.enable_x64(True):
        found, slopes = evaluate(CLEAN, ADVERSARIAL, 2.5)
        assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(slopes[1], 2.5 * (q - p), atol=1e-12)
    log_ratio = np.log(p / q)
    through_clean = p * (log_ratio - (p * log_ratio).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(slopes[0], p - np.eye(4)[LABELS] + 2.5 * through_clean, atol=1e-12)
    np.testing.assert_allclose(evaluate(CLEAN, ADVERSARIAL, 2.5)[0], expected, rtol=1e-5)


def test_loss_in_its_limits():
    plain = -scipy.special.log_softmax(CLEAN, axis=1)[np.arange(6), LABELS]
    np.testing.assert_allclose(evaluate(CLEAN, ADVERSARIAL, 0.0)[0], plain, rtol=1e-5)
    np.testing.assert_allclose(evaluate(CLEAN, CLEAN + 7.0, 9.0)[0], plain, rtol=1e-4)
    far = 400.0 * np.eye(4)[LABELS]  # a probability of 0 in float32
    losses, slopes = evaluate(far, -far, 1.0)
    np.testing.assert_allclose(losses, 400.0 + np.log(3.0), rtol=1e-6)
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trades_loss(CLEAN, ADVERSARIAL[:, :3], LABELS, beta=1.0), AssertionError, "shape"),
        (lambda: trades_loss(CLEAN, ADVERSARIAL, LABELS, beta=-1.0), ValueError, "beta must not be negative"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(call)


def test_divergence_at_the_attack_and_what_beta_buys():
    """A strong feature beside many weak ones: the weak ones an attacker can turn round, so a large beta drops them."""
    network = Network(
        lambda key: 0.1 + 0.01 * jax.random.normal(key, (9,)),
        lambda w, x: jnp.stack([jnp.zeros(x.shape[0]), x @ w], axis=1),
    )
    y = RNG.integers(0, 2, 512)
    sign = 2.0 * y - 1.0
    strong = 3.0 * sign * np.where(RNG.random(512) < 0.9, 1.0, -1.0)
    x = np.concatenate([strong[:, None], RNG.normal(size=(512, 8)) + 0.5 * sign[:, None]], axis=1)
    traces = []

    def run(beta, key):
        traces.append(1)
        algorithm = trades(network, optax.sgd(0.1), epsilon=1.0, beta=beta, steps=4, bounds=None)
        batches = jnp.tile(jnp.asarray(x, jnp.float32)[None], (150, 1, 1)), jnp.tile(jnp.asarray(y)[None], (150, 1))
        state, metrics = train(algorithm, key, batches)
        return state.params, metrics

    w, metrics = sweep(run, jnp.array([0.0, 6.0]), jax.random.split(jax.random.key(0), 1))
    assert len(traces) == 1
    plain, robust = np.asarray(w[:, 0])
    # For two classes with logits (0, f) the divergence is largest where |f| moves most: by epsilon |w|_1.
    first = np.asarray(network.init(jax.random.split(jax.random.split(jax.random.key(0), 1)[0])[0]))
    f, moved = x @ first, np.abs(first).sum()
    softmax = lambda f: np.stack([scipy.special.expit(-f), scipy.special.expit(f)], axis=1)  # noqa: E731
    apart = [scipy.special.rel_entr(softmax(f), softmax(f + s * moved)).sum(axis=1) for s in (-1.0, 1.0)]
    # The climb goes the way its start fell: somewhere between the two ends.
    assert np.minimum(*apart).mean() <= metrics["divergence"][0, 0, 0] <= np.maximum(*apart).mean() * 1.0001
    assert np.abs(robust[1:]).sum() / robust[0] < 0.2 * np.abs(plain[1:]).sum() / plain[0]
    margin = lambda w: sign * (x @ w) - np.abs(w).sum()  # noqa: E731
    assert (margin(robust) > 0).mean() > (margin(plain) > 0).mean() + 0.2
