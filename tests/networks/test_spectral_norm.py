"""Spectral norms against NumPy's singular values, and what normalised networks promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithm import Network
from jaxalign.networks.mlp import MLP
from jaxalign.networks.spectral_norm import spectral_norm, spectral_normalized

norm_of = jax.jit(spectral_norm, static_argnames="iterations")


def matrix(rows, columns, values, seed=0):
    """A matrix with the given singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (rows, columns))
    return (left[:, : len(values)] * np.array(values)) @ right[:, : len(values)].T


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_equals_the_largest_singular_value(shape):
    kernel = matrix(*shape, [3.0, 1.5, 1.0, 0.2])
    np.testing.assert_allclose(norm_of(kernel), 3.0, rtol=1e-5)


def test_of_a_convolution_kernel_is_that_of_its_matrix():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 4))
    expected = np.linalg.svd(kernel.reshape(18, 4), compute_uv=False)[0]
    assert norm_of(kernel, iterations=100) == pytest.approx(expected, rel=1e-4)


def test_is_never_too_large_and_close_even_where_singular_values_crowd():
    kernels = np.random.default_rng(0).normal(size=(5, 96, 96))
    expected = np.linalg.svd(kernels, compute_uv=False)[:, 0]
    share = jax.jit(jax.vmap(spectral_norm))(kernels) / expected
    assert 0.95 < share.min() < share.max() < 1 + 1e-5


def test_edges():
    np.testing.assert_allclose(norm_of(np.full((4, 1), -2.0)), 4.0, rtol=1e-6)
    assert float(norm_of(np.zeros((7, 5)))) == 0.0
    with pytest.raises(ValueError, match="two axes"):
        spectral_norm(np.ones(3))


def test_gradient_is_the_leading_pair():
    kernel = matrix(4, 3, [2.0, 0.5, 0.1])
    left, _, right = np.linalg.svd(kernel)
    gradient = jax.jit(jax.grad(spectral_norm))(jnp.asarray(kernel, jnp.float32))
    np.testing.assert_allclose(gradient, np.outer(left[:, 0], right[0]), atol=1e-5)


def test_float64():
    with jax.enable_x64(True):
        norm = norm_of(matrix(4, 3, [2.0, 0.2, 0.1]))
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, 2.0, rtol=1e-10)


@pytest.fixture(scope="module")
def plain():
    """A network and parameters that make it steep."""
    network = Network.from_linen(MLP((8, 1)), jnp.zeros((1, 3)))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(lambda leaf: 3.0 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def test_a_normalised_network_is_lipschitz_and_keeps_its_parameters(plain):
    network, params = plain
    normalized = spectral_normalized(network, iterations=40)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(normalized.init, jax.random.key(0)))
    x = np.random.default_rng(1).normal(size=(200, 3)).astype(np.float32)

    def steepest(network):
        slopes = jax.jit(jax.grad(lambda x: network.apply(params, x).sum()))(x)
        return float(np.linalg.norm(slopes, axis=1).max())

    assert steepest(normalized) <= 1.0 + 1e-4 < 5.0 < steepest(network)


def test_a_kernel_is_divided_by_its_norm_and_only_if_selected(plain):
    _, params = plain
    seen = Network(lambda key: None, lambda params: params)
    kernel = np.asarray(params["Dense_0"]["kernel"])
    network = spectral_normalized(seen, bound=2.0, iterations=40, select=lambda name: name.startswith("Dense_0"))
    apply = jax.jit(network.apply)
    used = apply(params)
    np.testing.assert_allclose(used["Dense_0"]["kernel"], 2 * kernel / np.linalg.norm(kernel, 2), rtol=1e-5)
    np.testing.assert_array_equal(used["Dense_0"]["bias"], params["Dense_0"]["bias"])
    np.testing.assert_array_equal(used["Dense_1"]["kernel"], params["Dense_1"]["kernel"])
