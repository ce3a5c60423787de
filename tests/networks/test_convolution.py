"""Convolution as a product equals XLA's, forwards and backwards, whatever the layout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from jax import lax

from jaxalign.networks import ConvNet, convolve
from jaxalign.programs import has_primitive

LAYOUTS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (2, 9, 7, 3), (3, 2, 3, 5)),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (2, 3, 9, 7), (5, 3, 3, 2)),
    "NWC": (("NWC", "WIO", "NWC"), (2, 9, 3), (4, 3, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 2), (0, -1)]])
def test_equals_xla(layout, stride, padding):
    numbers, image, window = LAYOUTS[layout]
    x = jax.random.normal(jax.random.key(0), image)
    w = jax.random.normal(jax.random.key(1), window)
    spatial = len(image) - 2
    padding = padding if isinstance(padding, str) else padding[:spatial]
    arguments = ((stride,) * spatial, padding, None, (2,) + (1,) * (spatial - 1), numbers)
    expected = lax.conv_general_dilated(x, w, *arguments)
    np.testing.assert_allclose(convolve(x, w, *arguments), expected, rtol=1e-4, atol=1e-5)


def test_by_hand_and_against_scipy():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    out = convolve(x, jnp.ones((2, 2, 1, 1)), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(out[0, :, :, 0], [[8, 12], [20, 24]])
    image, kernel = np.random.default_rng(0).normal(size=(6, 6)), np.random.default_rng(1).normal(size=(3, 3))
    found = convolve(jnp.asarray(image)[None, None], jnp.asarray(kernel)[None, None], (1, 1), "SAME")
    np.testing.assert_allclose(found[0, 0], scipy.signal.correlate2d(image, kernel, mode="same"), rtol=1e-4, atol=1e-5)


def test_gradients_equal_xlas_and_vmap_maps_kernels():
    x, w = jax.random.normal(jax.random.key(0), (2, 5, 5, 3)), jax.random.normal(jax.random.key(1), (4, 3, 3, 3, 2))
    numbers = ("NHWC", "HWIO", "NHWC")

    def loss(conv, x, w):
        return jnp.sum(jnp.sin(conv(x, w, (2, 2), "SAME", dimension_numbers=numbers)))

    ours = jax.jit(jax.vmap(jax.grad(loss, argnums=(1, 2)), in_axes=(None, None, 0)), static_argnums=0)(convolve, x, w)
    theirs = jax.vmap(jax.grad(lambda x, w: loss(lax.conv_general_dilated, x, w), argnums=(0, 1)), in_axes=(None, 0))(
        x, w
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_groups_and_large_windows_are_left_to_xla():
    x, w = jnp.ones((1, 4, 4, 4)), jnp.ones((3, 3, 2, 4))
    grouped = jax.make_jaxpr(
        lambda x, w: convolve(x, w, (1, 1), "SAME", None, None, ("NHWC", "HWIO", "NHWC"), feature_group_count=2)
    )(x, w)
    assert has_primitive(grouped, "conv_general_dilated")


def test_the_convolutional_network_is_the_one_that_flax_would_make():
    net, x = ConvNet(3, channels=(4,), hidden_sizes=(), kernel_size=4), jax.random.normal(jax.random.key(0), (2, 7, 7))
    params = net.init(jax.random.key(1), x)
    conv = nn.Conv(4, (4, 4), strides=(2, 2)).apply({"params": params["params"]["Conv_0"]}, x[..., None])
    dense = params["params"]["MLP_0"]["Dense_0"]
    expected = nn.relu(conv).reshape(2, -1) @ dense["kernel"] + dense["bias"][None, :]
    np.testing.assert_allclose(net.apply(params, x), expected, rtol=1e-4, atol=1e-5)
    on_cpu = jax.default_backend() == "cpu"
    assert has_primitive(jax.make_jaxpr(net.apply)(params, x), "conv_general_dilated") != on_cpu
