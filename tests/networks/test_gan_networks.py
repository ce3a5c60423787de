"""Generators and discriminators: shapes, ranges, labels, and which inputs an output depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.networks.discriminator import Discriminator
from jaxalign.networks.generator import Generator, ImageToImage, doubled


def built(module, *inputs):
    """The module as one program, with parameters from NumPy: its own initialisers would be longer to compile."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    return jax.jit(lambda *x: module.apply(params, *x))


def test_doubled_repeats_each_pixel():
    image = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    expected = np.kron(np.array([[1, 2], [3, 4]]), np.ones((2, 2)))
    np.testing.assert_array_equal(jax.jit(doubled)(image)[0, :, :, 0], expected)


def test_a_generator_makes_images_between_0_and_1():
    latents = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    images = built(Generator((4, 8, 2), (3,)), latents)(latents)
    assert images.shape == (3, 4, 8, 2)
    assert float(images.min()) > 0.0
    assert float(images.max()) < 1.0
    assert float(jnp.abs(images[0] - images[1]).max()) > 1e-3


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="6 x 6 must be multiples of 4"):
        built(Generator((6, 6, 1), (4, 4)), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="needs labels"):
        built(Generator((4, 4, 1), (), (4,), num_classes=3), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"\[B, H, W, C\]"):
        built(ImageToImage(), jnp.zeros((1, 8, 8)))


def test_labels_reach_the_output_of_both():
    latents, images = jnp.ones((2, 3)), jnp.full((2, 4, 4, 1), 0.3)
    labels = jnp.array([0, 2])
    made = built(Generator((4, 4, 1), (), (8,), num_classes=3), latents, labels)(latents, labels)
    logits = built(Discriminator((), (8,), num_classes=3), images, labels)(images, labels)
    assert logits.shape == (2,)
    assert float(jnp.abs(made[0] - made[1]).max()) > 1e-3
    assert float(jnp.abs(logits[0] - logits[1])) > 1e-3


def test_each_logit_depends_on_its_own_row_alone():
    images = np.random.default_rng(1).uniform(size=(3, 4, 4, 1)).astype(np.float32)
    jacobian = jax.jit(jax.jacrev(built(Discriminator((4,), (6,)), images)))(images)
    jacobian = np.abs(jacobian).max(axis=(2, 3, 4))
    assert (np.diag(jacobian) > 0).all()
    assert (jacobian[~np.eye(3, dtype=bool)] == 0).all()


def test_image_to_image_keeps_the_shape_and_sees_the_whole_image():
    images = np.random.default_rng(1).uniform(size=(2, 8, 4, 3)).astype(np.float32)
    network = built(ImageToImage((4,), 16), images)
    corner = images.copy()
    corner[0, 0, 0] = 1.0 - corner[0, 0, 0]
    moved = np.abs(network(corner) - network(images)).max(axis=-1)
    assert network(images).shape == images.shape
    assert (moved[0] > 0).all()
    assert (moved[1] == 0).all()
