"""Pictures: Fourier images against NumPy, transformations by hand, and objectives whose optimum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
import scipy.special

from jaxalign.interpretability.feature_visualization import feature_visualization
from jaxalign.interpretability.image_parameterization import colour_root, fourier_image, pixel_image
from jaxalign.interpretability.image_transformations import (
    jitter,
    pad,
    random_rotation,
    random_scale,
    transformed,
)
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_encode
from jaxalign.interpretability.visualization_objectives import (
    channel_objective,
    direction_objective,
    diversity,
    latent_objective,
    logit_objective,
    neuron_objective,
    smoothness,
    weighted,
)
from jaxalign.networks.sites import site

KEY = jax.random.key(0)
MIX = np.array([[1.0, -1.0, 0.5]], np.float32)


def network(images):
    """[N, H, W, 1] -> [N, 2]; "maps" [N, H, W, 3]."""
    maps = site(jnp.einsum("nhwc,ck->nhwk", images, MIX) ** 2, "maps")
    return jnp.stack([jnp.mean(maps, axis=(1, 2, 3)), images[:, 0, 0, 0]], axis=1)


@pytest.mark.parametrize("shape", [(2, 6, 7, 3), (5, 8), (4, 4, 1)])
def test_a_fourier_image_is_numpys_inverse_transform(shape):
    images, height, width, channels = (1, *shape, 1) if len(shape) == 2 else (1, *shape) if len(shape) == 3 else shape
    parameterization = fourier_image(shape, decay=1.3, bounds=(-1.0, 2.0))
    rng, size = np.random.default_rng(0), (images, height, width // 2 + 1, channels)
    params = {name: rng.normal(size=size).astype(np.float32) for name in ("real", "imaginary")}
    assert jax.tree.map(jnp.shape, jax.eval_shape(parameterization.init, KEY)) == jax.tree.map(jnp.shape, params)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    power = np.maximum(frequency, 1 / max(height, width)) ** -1.3
    twice = np.full(width // 2 + 1, 2.0)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    scale = power / np.sqrt(np.sum((power * twice) ** 2)) * height * width
    spectrum = params["real"] + 1j * params["imaginary"]
    raw = np.fft.irfft2(spectrum * scale[None, :, :, None], s=(height, width), axes=(1, 2))
    expected = (-1 + 3 / (1 + np.exp(-raw))).reshape(shape)
    np.testing.assert_allclose(jax.jit(parameterization.image)(params), expected, atol=1e-5)


def test_a_start_has_the_deviation_asked_for_and_colours_their_covariance():
    for parameterization in (pixel_image((40, 30, 2), deviation=0.1), fourier_image((4, 40, 30, 2), deviation=0.1)):
        image = jax.jit(lambda key, p=parameterization: p.image(p.init(key)))(KEY)
        np.testing.assert_allclose(np.std(scipy.special.logit(image)), 0.1, rtol=0.3)
    pixels = np.random.default_rng(0).normal(size=(3, 8, 8, 2)) @ np.array([[1.0, 2.0], [0.0, 0.5]])
    root = np.asarray(jax.jit(colour_root)(pixels))
    covariance = np.cov(pixels.reshape(-1, 2), rowvar=False)
    np.testing.assert_allclose(root @ root.T / (root @ root.T)[0, 0], covariance / covariance[0, 0], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(root, axis=0).max(), 1, rtol=1e-5)


def test_colours_are_mixtures_of_the_channels():
    plain, mixed = fourier_image((4, 4, 2)), fourier_image((4, 4, 2), colours=np.array([[1.0, 0.0], [3.0, 0.0]]))
    both = jax.jit(lambda params: (plain.image(params), mixed.image(params)))(
        {name: np.random.default_rng(i).normal(size=(1, 4, 3, 2)) for i, name in enumerate(("real", "imaginary"))}
    )
    raw, colours = (scipy.special.logit(image) for image in both)
    np.testing.assert_allclose(colours, np.stack([raw[..., 0], 3 * raw[..., 0]], axis=-1), atol=1e-4)


def test_transformations_by_hand_and_against_scipy():
    image = np.random.default_rng(0).normal(size=(6, 7, 2)).astype(np.float32)

    @jax.jit
    def changed(image):
        crops = jax.vmap(lambda key: jitter(1)(key, image))(jax.random.split(KEY, 20))
        same = random_rotation(0.0)(KEY, random_scale(1.0, 1.0)(KEY, image))
        turned = random_rotation(30.0)(KEY, image), jax.random.uniform(KEY, minval=-1.0) * jnp.pi / 6
        return pad(2, value=0.25)(KEY, image), crops, same, random_scale(1.5, 1.5)(KEY, image), turned

    padded, crops, same, enlarged, (turned, angle) = changed(image)
    np.testing.assert_array_equal(padded, np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=0.25))
    allowed = np.stack([image[r : r + 5, c : c + 6] for r in (0, 1) for c in (0, 1)])
    found = (np.asarray(crops)[:, None] == allowed[None]).all(axis=(2, 3, 4))
    np.testing.assert_array_equal(found.sum(axis=1), np.ones(20))
    assert found.any(axis=0).all()
    np.testing.assert_allclose(same, image, atol=1e-5)
    centre = np.array([2.5, 3.0])
    bilinear = {"order": 1, "mode": "nearest"}
    expected = scipy.ndimage.affine_transform(image[..., 0], np.eye(2) / 1.5, centre - centre / 1.5, **bilinear)
    np.testing.assert_allclose(enlarged[..., 0], expected, atol=1e-5)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = scipy.ndimage.affine_transform(image[..., 1], matrix, centre - matrix @ centre, **bilinear)
    np.testing.assert_allclose(turned[..., 1], expected, atol=1e-5)


def test_a_known_picture_is_found_through_both_parameterizations():
    target = np.random.default_rng(0).uniform(0.1, 0.9, size=(6, 6)).astype(np.float32)
    objective = lambda image: -jnp.mean((image - target) ** 2)  # noqa: E731
    for parameterization in (None, pixel_image((6, 6))):
        run = jax.jit(
            lambda key, p=parameterization: feature_visualization(
                key, objective, (6, 6), transforms=(), parameterization=p, steps=300, optimizer=optax.adam(0.1)
            )
        )
        found = run(KEY)
        np.testing.assert_allclose(found.images, target, atol=0.05)
        assert found.history.shape == (300,)
        assert found.value > found.history[0]


def test_seeds_vmap_and_transformed_pictures_reach_a_bright_objective():
    objective = logit_objective(network, jnp.array([0, 1]))
    run = jax.jit(jax.vmap(lambda key: feature_visualization(key, objective, (2, 5, 5, 1), steps=60)))
    found = run(jax.random.split(KEY, 3))
    assert found.images.shape == (3, 2, 5, 5, 1)
    assert found.history.shape == (3, 60, 2)
    assert (found.value > np.array([[0.3, 0.9]])).all()  # from 0.19 and 0.5
    images = np.asarray(found.images)
    assert ((images > 0) & (images < 1)).all()
    assert (images[0] != images[1]).any()


def test_objectives_by_hand():
    images = np.random.default_rng(0).uniform(size=(3, 4, 4, 1)).astype(np.float32)
    direction, mix = np.array([1.0, 0.0, -2.0], np.float32), np.array([[1.0, 0.0], [1.0, 1.0], [0.0, -8.0]], np.float32)
    sae = {"W_enc": mix, "b_enc": np.zeros(2), "W_dec": mix.T, "b_dec": np.zeros(3)}
    names = np.array([0, 2, 1])
    found = {
        "channel": channel_objective(network, "maps", 2),
        "channels": channel_objective(network, "maps", names),
        "neuron": neuron_objective(network, "maps", (1, 3, 2)),
        "logit": logit_objective(network, 1),
        "direction": direction_objective(network, "maps", direction),
        "cosine": direction_objective(network, "maps", direction, cosine_power=2.0),
        "latent": latent_objective(network, "maps", lambda a: sae_encode(sae, a, SAEConfig(3, 2, "relu")), 0),
        "diversity": diversity(network, "maps"),
        "smoothness": smoothness,
        "both": weighted((2.0, logit_objective(network, 1)), (0.5, smoothness)),
    }
    found = jax.jit(lambda images: {name: objective(images) for name, objective in found.items()})(images)
    maps = np.asarray(images) ** 2 * np.array([1, 1, 0.25])
    along = maps @ direction
    cosine = along / np.linalg.norm(maps, axis=-1) / np.sqrt(5)
    variation = sum(np.abs(np.diff(images, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2))
    expected = {
        "channel": maps[..., 2].mean(axis=(1, 2)),
        "channels": maps.mean(axis=(1, 2))[np.arange(3), names],
        "neuron": maps[:, 1, 3, 2],
        "logit": images[:, 0, 0, 0],
        "direction": along.mean(axis=(1, 2)),
        "cosine": (along * np.maximum(0.1, cosine) ** 2).mean(axis=(1, 2)),
        "latent": (maps[..., 0] + maps[..., 1]).mean(axis=(1, 2)),
        "diversity": -np.ones(3),  # every image has the same style
        "smoothness": -variation,
        "both": 2 * images[:, 0, 0, 0] - 0.5 * variation,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)


def test_diversity_tells_styles_apart_and_has_a_gradient_for_silent_images():
    channels = lambda x: site(x, "channels")  # noqa: E731
    apart = np.zeros((2, 2, 2, 2), np.float32)
    apart[0, ..., 0] = apart[1, ..., 1] = 1
    objective = diversity(channels, "channels")
    run = jax.jit(lambda x: (objective(x), jax.grad(lambda x: objective(x).sum())(x)))
    np.testing.assert_allclose(run(apart)[0], [0, 0], atol=1e-6)
    assert np.isfinite(run(0 * apart)[1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_visualization(KEY, jnp.sum, (8,)), "an image is"),
        (lambda: feature_visualization(KEY, logit_objective(network, 0), (8, 8, 1)), "needs images"),
        (lambda: neuron_objective(network, "maps", (1,))(np.ones((2, 4, 4, 1))), "is no place"),
        (lambda: channel_objective(network, "nothing", 1)(np.ones((2, 4, 4, 1))), "no site 'nothing'"),
        (lambda: transformed(KEY, np.ones((6, 6, 1)), (pad(1), jitter(1))), "pad as jitter crops"),
        (lambda: jitter(6)(KEY, np.ones((6, 7, 1))), "cannot be taken"),
        (lambda: colour_root(np.ones((4, 4, 3))), "needs images"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
