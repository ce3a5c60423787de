"""Lipschitz bounds: exact where they can be, never below any slope that is seen, and what they certify."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxalign import Network
from jaxalign.certification.interpreter import UnsupportedPrimitive
from jaxalign.certification.lipschitz import (
    lipschitz_radius,
    lipschitz_upper_bound,
    local_lipschitz_bound,
    spectral_norm_upper_bound,
)
from jaxalign.networks import MLP

RNG = np.random.default_rng(0)
A, C = (RNG.normal(size=shape).astype(np.float32) for shape in ((4, 5), (5, 4)))


@pytest.fixture(scope="module")
def mlp():
    network = Network.from_linen(MLP((6, 3)), jnp.zeros(4))
    params = jax.jit(network.init)(jax.random.key(0))
    return lambda x: network.apply(params, x), [np.asarray(params[f"Dense_{i}"]["kernel"]) for i in range(2)]


def upper_bound(fn, x, norm="l2"):
    return float(jax.jit(lambda: lipschitz_upper_bound(fn, x, norm=norm))())


def sigma(matrix):
    return np.linalg.norm(np.asarray(matrix, np.float64), 2)


def test_spectral_norms_are_bounded_from_above():
    scale = np.array([1.0, 1.0, 1e-20, 1e15])
    matrices = (scale[:, None, None] * RNG.normal(size=(4, 20, 7))).astype(np.float32)
    truth = np.array([sigma(m) for m in matrices])
    for steps, slack in ((0, 0.6), (12, 2e-4)):
        bound = spectral_norm_upper_bound(matrices, steps=steps)
        assert np.all(bound >= truth)
        np.testing.assert_allclose(bound, truth, rtol=slack)
    wide = spectral_norm_upper_bound(np.swapaxes(matrices, 1, 2), steps=12)
    np.testing.assert_allclose(wide, truth, rtol=2e-4)


def test_spectral_norms_by_hand_and_their_gradient():
    np.testing.assert_allclose(spectral_norm_upper_bound(np.diag([3.0, -4.0])), 4, rtol=1e-5)
    assert spectral_norm_upper_bound(np.zeros((2, 3))) == 0
    gradient = jax.grad(spectral_norm_upper_bound)(jnp.diag(jnp.array([1.0, -4.0])))
    np.testing.assert_allclose(gradient, [[0, 0], [0, -1]], atol=1e-3)
    with jax.enable_x64(True):
        np.testing.assert_allclose(spectral_norm_upper_bound(np.asarray(A, np.float64)), sigma(A), rtol=1e-3)
    with pytest.raises(ValueError, match=r"needs a matrix .* got shape \(3,\)"):
        spectral_norm_upper_bound(np.zeros(3))


def test_a_sequence_of_layers_is_the_product_of_their_norms(mlp):
    fn, (first, second) = mlp
    np.testing.assert_allclose(upper_bound(fn, jnp.zeros(4)), sigma(first) * sigma(second), rtol=2e-3)
    rows = np.abs(first).sum(axis=0).max() * np.abs(second).sum(axis=0).max()
    np.testing.assert_allclose(upper_bound(lambda x: fn(x[None])[0], jnp.zeros(4), "linf"), rows, rtol=1e-4)


@pytest.mark.parametrize(
    ("fn", "l2", "linf"),
    [
        (lambda x: 3 * x - 1, 3, 3),
        (lambda x: x / jnp.array([1.0, 2.0, -0.25, 1.0]), 4, 4),
        (lambda x: x + jnp.tanh(2 * x), 3, 3),  # a residual branch adds
        (lambda x: jnp.concatenate([x, 2 * x]), np.sqrt(5), 2),
        (lambda x: (x, jax.nn.relu(x)), np.sqrt(2), 1),
        (lambda x: jnp.maximum(x, 2 * x), np.sqrt(5), 2),
        (lambda x: jnp.mean(x), 0.5, 1),
        (lambda x: jnp.sum(x[:2]), np.sqrt(2), 2),
        (lambda x: jnp.sort(x)[::-1], 1, 1),
        (lambda x: jax.nn.softmax(x), 0.5, 0.5),
        (lambda x: jax.nn.log_softmax(x), 2, 2),
        (lambda x: jnp.max(jnp.clip(x, 0, 1)), 1, 1),
        (lambda x: 5.0, 0, 0),
    ],
)
def test_rules_by_hand(fn, l2, linf):
    both = jax.jit(lambda: [lipschitz_upper_bound(fn, jnp.zeros(4), norm=norm) for norm in ("l2", "linf")])
    np.testing.assert_allclose(both(), [l2, linf], rtol=1e-5)


def test_steepest_slopes_of_activations():
    x = jnp.linspace(-6, 6, 4801)
    exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
    for fn in (jax.nn.silu, jax.nn.gelu, exact_gelu, jax.nn.sigmoid, jax.nn.softplus, lax.erf):
        steepest = np.max(np.abs(jax.jit(jax.vmap(jax.grad(fn)))(x)))
        bound = upper_bound(fn, jnp.zeros(2))
        assert steepest <= bound * (1 + 1e-6)
        np.testing.assert_allclose(bound, steepest, rtol=3e-3)


def test_convolutions_written_out_or_through_their_patches(monkeypatch):
    kernel = RNG.normal(size=(3, 3, 2, 3)).astype(np.float32)
    conv = lambda x: lax.conv_general_dilated(  # noqa: E731
        x[None], kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    x = jnp.zeros((6, 6, 2))
    matrix = np.asarray(jax.jit(jax.jacobian(conv))(x)).reshape(-1, x.size)
    np.testing.assert_allclose(upper_bound(conv, x), sigma(matrix), rtol=3e-3)
    np.testing.assert_allclose(upper_bound(conv, x, "linf"), np.abs(matrix).sum(1).max(), rtol=1e-4)
    monkeypatch.setattr("jaxalign.certification.lipschitz.LARGEST_OPERATOR", 0)
    wide = upper_bound(conv, x)
    assert sigma(matrix) <= wide <= 1.001 * 2 * sigma(kernel.reshape(-1, 3))  # a pixel lies in at most 2 x 2 patches


def test_local_bounds_of_a_known_piece_and_of_several():
    fn = lambda x: jax.nn.relu(x @ A) @ C  # noqa: E731
    run = jax.jit(lambda low, high, norm: local_lipschitz_bound(fn, low, high, norm=norm), static_argnums=2)
    x = RNG.normal(size=4).astype(np.float32)
    piece = (C.T * (x @ A > 0)) @ A.T
    np.testing.assert_allclose(run(x, x, "linf"), np.abs(piece).sum(axis=1).max(), rtol=1e-5)
    np.testing.assert_allclose(run(x, x, "l2"), sigma(np.abs(piece)), rtol=2e-3)
    low, high = x - 0.5, x + 0.5
    slopes = [np.asarray((C.T * (v @ A > 0)) @ A.T) for v in RNG.uniform(low, high, size=(200, 4))]
    for norm, size in (("l2", sigma), ("linf", lambda m: np.abs(m).sum(axis=1).max())):
        bound = run(low, high, norm)
        assert max(map(size, slopes)) <= bound < np.inf
    assert run(low, high, "linf") <= np.abs(A).T.sum(axis=1).max() * np.abs(C).T.sum(axis=1).max()


def test_radius_by_hand():
    logits, y = jnp.array([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0]]), jnp.array([0, 1])
    np.testing.assert_allclose(lipschitz_radius(logits, y, 2.0), [1 / np.sqrt(2), 0], rtol=1e-6)
    np.testing.assert_allclose(lipschitz_radius(logits, y, jnp.array([0.5, 1.0]), norm="linf"), [2, 0])
    np.testing.assert_array_equal(lipschitz_radius(-logits, jnp.array([-1, 3]), 1.0), 0)  # no such class
    with pytest.raises(ValueError, match=r"logits \[..., C\] and y \[...\], got \(2, 3\) and \(3,\)"):
        lipschitz_radius(logits, jnp.zeros(3, int), 1.0)


def test_bounds_train_under_jit(mlp):
    del mlp
    bound = jax.jit(jax.value_and_grad(lambda w: lipschitz_upper_bound(lambda x: jax.nn.relu(x @ w), jnp.zeros(4))))
    value, gradient = bound(A)
    np.testing.assert_allclose(value, sigma(A), rtol=2e-3)
    np.testing.assert_allclose(jnp.vdot(gradient, A), value, rtol=1e-3)  # homogeneous of degree 1


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x * x[::-1], "`mul`"),
        (jnp.exp, "`exp`"),
        (jnp.sign, "`sign`"),
        (lambda x: lax.sort((x, jnp.arange(4.0)))[1], "`sort`"),
        (lambda x: jnp.where(x > 0, x, 1.0), "`gt`"),
        (lambda x: 1 / x, "`div`"),
    ],
)
def test_functions_without_a_global_constant_are_named(fn, message):
    with pytest.raises(UnsupportedPrimitive, match=message):
        lipschitz_upper_bound(fn, jnp.zeros(4))


def test_unknown_norms_and_integers_are_named():
    with pytest.raises(ValueError, match="norm must be one of l2, linf, got 'l1'"):
        lipschitz_upper_bound(jnp.tanh, jnp.zeros(2), norm="l1")
    with pytest.raises(ValueError, match="floating point"):
        lipschitz_upper_bound(jnp.abs, jnp.zeros(2, jnp.int32))
