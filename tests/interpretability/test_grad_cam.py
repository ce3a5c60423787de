"""Grad-CAM where it is the class activation map, and on a network that looks at one quadrant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.grad_cam import grad_cam
from jaxalign.networks import ConvNet
from jaxalign.networks.sites import site

IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 2)).astype(np.float32)
MIX = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)
HEAD = np.array([1.0, -2.0, 0.5, 3.0], np.float32)


def pooled(x):
    """A convolution of size 1, the mean over places, and a linear output [B]."""
    seen = site(jax.nn.relu(jnp.einsum("bhwc,ck->bhwk", x, MIX)), "maps")
    return jnp.mean(seen, axis=(1, 2)) @ HEAD


def test_after_global_pooling_it_is_the_class_activation_map():
    # The gradient of the mean over 36 places is HEAD / 36 everywhere (Zhou et al. 2016).
    maps = np.maximum(np.einsum("bhwc,ck->bhwk", np.asarray(IMAGES, np.float64), MIX), 0)
    cam, alone, enlarged = jax.jit(
        lambda x: (
            grad_cam(pooled, x, "maps"), grad_cam(pooled, x[:1], "maps"), grad_cam(pooled, x, "maps", size=(12, 12))
        )
    )(IMAGES)  # fmt: skip
    np.testing.assert_allclose(cam, np.maximum(maps @ HEAD / 36, 0), atol=1e-6)
    np.testing.assert_allclose(alone, cam[:1], atol=1e-6)
    assert enlarged.shape == (3, 12, 12)
    np.testing.assert_allclose(enlarged.mean(), cam.mean(), rtol=0.1)


def test_a_network_that_looks_at_one_quadrant_is_seen_to():
    looks = lambda x: pooled(jnp.where(jnp.arange(6)[None, :, None, None] < 3, x, 0.0))  # noqa: E731
    cam = np.asarray(jax.jit(lambda x: grad_cam(looks, x, "maps"))(IMAGES))
    assert (cam[:, 3:] == 0).all()
    assert (cam[:, :3] > 0).any()


def test_our_convolutional_network_has_the_sites():
    module = ConvNet(4, channels=(3, 5), hidden_sizes=(8,))
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    fn = lambda x: module.apply(params, x)[:, 1]  # noqa: E731
    cam = jax.jit(lambda x: grad_cam(fn, x, "conv_post_1", size=(6, 6)))(IMAGES)
    assert cam.shape == (3, 6, 6)
    assert (np.asarray(cam) >= 0).all()
    assert (np.asarray(cam) > 0).any()
    with pytest.raises(ValueError, match=r"no site 'conv_9'; .*conv_post_1"):
        jax.eval_shape(lambda: grad_cam(fn, IMAGES, "conv_9"))
    with pytest.raises(ValueError, match=r"post_0 is \(3, 8\)"):
        jax.eval_shape(lambda: grad_cam(fn, IMAGES, "post_0"))
