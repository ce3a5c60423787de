"""Layers that stretch nothing, and a trained network of Lipschitz constant 1 whose certificate meets an attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, gradient_algorithm, train
from jaxalign.certification.lipschitz import lipschitz_radius, lipschitz_upper_bound
from jaxalign.networks.group_sort import group_sort
from jaxalign.networks.orthogonal_dense import LipschitzMLP, OrthogonalDense, orthonormalized
from jaxalign.robustness.pgd import pgd

RNG = np.random.default_rng(0)


def test_group_sort_by_hand():
    x = jnp.array([[3.0, 1.0, -2.0, 5.0]])
    np.testing.assert_array_equal(group_sort(x), [[1, 3, -2, 5]])
    np.testing.assert_array_equal(group_sort(x, 4), [[-2, 1, 3, 5]])
    np.testing.assert_array_equal(group_sort(x, 1), x)
    slopes = jax.jit(jax.jacobian(group_sort))(x[0])
    np.testing.assert_array_equal(slopes, np.eye(4)[[1, 0, 2, 3]])  # a permutation: no gradient is lost
    with pytest.raises(ValueError, match=r"group_size 3 does not divide the last axis of \(1, 4\)"):
        group_sort(x, 3)


@pytest.mark.parametrize("shape", [(12, 12), (20, 6), (6, 20)])
def test_the_nearest_orthonormal_matrix(shape):
    w = RNG.normal(size=shape).astype(np.float32)
    run = jax.jit(orthonormalized)
    found = np.asarray(run(w))
    small = found.T @ found if shape[0] >= shape[1] else found @ found.T
    np.testing.assert_allclose(small, np.eye(min(shape)), atol=1e-5)
    u, _, v = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(found, u @ v, atol=2e-5)
    np.testing.assert_allclose(run(found), found, atol=1e-5)


def test_orthonormal_whatever_the_scale_and_differentiable():
    w = RNG.normal(size=(8, 5)).astype(np.float32)
    run = jax.jit(orthonormalized)
    for scale in (1e-15, 1e15):
        np.testing.assert_allclose(run(scale * w), run(w), atol=1e-6)
    assert not np.any(run(0 * w))
    direction = RNG.normal(size=w.shape).astype(np.float32)
    loss = jax.jit(jax.value_and_grad(lambda w: jnp.sum(orthonormalized(w) * direction)))
    step = 1e-2 * direction
    difference = (loss(w + step)[0] - loss(w - step)[0]) / 2
    np.testing.assert_allclose(jnp.vdot(loss(w)[1], step), difference, rtol=1e-2)
    np.testing.assert_allclose(jnp.vdot(loss(w)[1], w), 0, atol=1e-4)  # the scale of w does not matter
    with pytest.raises(ValueError, match=r"needs a matrix \[I, O\], got shape \(3,\)"):
        orthonormalized(w[:3, 0])


def test_the_layer_keeps_lengths_and_calls_no_lapack():
    layer = OrthogonalDense(7)
    x = RNG.normal(size=(2, 3, 5)).astype(np.float32)
    params = layer.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.3 * RNG.normal(size=p.shape).astype(np.float32), params)
    lowered = jax.jit(layer.apply).lower(params, x)
    assert "custom_call" not in lowered.as_text()
    y = lowered.compile()(params, x)
    assert y.shape == (2, 3, 7)
    lengths = np.linalg.norm(np.asarray(y) - np.asarray(params["params"]["bias"]), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.fixture(scope="module")
def classifier():
    """A LipschitzMLP trained on three rings of a plane, its inputs and classes."""
    angle, y = RNG.uniform(0, 2 * np.pi, 120), np.arange(120) % 3
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (0.5 + y)[:, None]
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)
    network = Network.from_linen(LipschitzMLP((16, 3)), x[:1])

    def objective(params, batch, key):
        logits = 8 * network.apply(params, x)  # logits of slope 1 are small
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), {}

    algorithm = gradient_algorithm(network, objective, optax.adam(2e-2))
    state, metrics = jax.jit(lambda: train(algorithm, jax.random.key(0), None, length=200))()
    assert metrics["loss"][-1] < 0.5 * metrics["loss"][0]
    return jax.jit(functools.partial(network.apply, state.params)), x, y


def test_a_trained_network_of_constant_1_keeps_its_certificate_against_pgd(classifier):
    apply, x, y = classifier
    constant = jax.jit(lambda: lipschitz_upper_bound(lambda v: apply(v[None])[0], x[0]))()
    assert 1 <= constant < 1.01
    logits = apply(x)
    radius = lipschitz_radius(logits, y, constant)
    assert np.mean(radius > 0.05) > 0.8
    attack = functools.partial(pgd, jax.random.key(1), apply, x, y, norm="l2", steps=10, bounds=None)
    inside = attack(0.999 * radius)
    np.testing.assert_array_equal(inside.success, jnp.argmax(logits, axis=1) != y)
    assert np.mean(attack(3 * radius + 0.2).success) > 0.5
    moved = x + RNG.normal(size=x.shape).astype(np.float32)
    slopes = jnp.linalg.norm(apply(moved) - logits, axis=1) / jnp.linalg.norm(moved - x, axis=1)
    assert np.max(slopes) <= 1 + 1e-5
