"""Attributions of one small convolutional network equal captum's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.attribution import (
    gradient_times_input,
    integrated_gradients,
    occlusion,
    saliency,
)
from jaxalign.interpretability.attribution_faithfulness import infidelity
from jaxalign.interpretability.grad_cam import grad_cam
from jaxalign.interpretability.neurons import gradient_times_activation, neuron_conductance
from jaxalign.interpretability.shapley import shapley_exact, shapley_sampling
from jaxalign.networks import ConvNet

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
captum = pytest.importorskip("captum.attr")

TARGET = 2
IMAGES = np.random.default_rng(0).uniform(size=(3, 6, 6, 2)).astype(np.float32)
QUADRANTS = np.kron(np.arange(4).reshape(2, 2), np.ones((3, 3), int))


@pytest.fixture(scope="module")
def networks():
    """(fn, module): ours, images [B, H, W, C] -> the target's logit [B], and theirs, [B, C, H, W] -> all logits."""
    network = ConvNet(4, channels=(5,), hidden_sizes=(7,), kernel_size=3)
    params = jax.jit(network.init)(jax.random.key(0), IMAGES)
    conv, first, second = params["params"]["Conv_0"], *params["params"]["MLP_0"].values()
    module = torch.nn.Sequential(
        torch.nn.ZeroPad2d((0, 1, 0, 1)),  # flax's SAME at stride 2 on an even side
        torch.nn.Conv2d(2, 5, 3, stride=2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(45, 7), torch.nn.ReLU(), torch.nn.Linear(7, 4),
    )  # fmt: skip
    with torch.no_grad():
        module[1].weight[:] = torch.tensor(np.asarray(conv["kernel"]).transpose(3, 2, 0, 1))
        module[1].bias[:] = torch.tensor(np.asarray(conv["bias"]))
        # flax flattens [H, W, C], torch [C, H, W]
        kernel = np.asarray(first["kernel"]).reshape(3, 3, 5, 7).transpose(2, 0, 1, 3).reshape(45, 7)
        for layer, weight, bias in ((module[4], kernel, first["bias"]), (module[6], second["kernel"], second["bias"])):
            layer.weight[:], layer.bias[:] = torch.tensor(np.asarray(weight).T.copy()), torch.tensor(np.asarray(bias))
    np.testing.assert_allclose(network.apply(params, IMAGES), module(theirs(IMAGES)).detach(), atol=1e-5)
    return (lambda x: network.apply(params, x)[:, TARGET]), module


def theirs(images):
    return torch.tensor(np.asarray(images).transpose(0, 3, 1, 2).copy())


def ours(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def test_gradients_and_integrated_gradients(networks):
    fn, module = networks
    x = theirs(IMAGES)
    np.testing.assert_allclose(saliency(fn, IMAGES), ours(captum.Saliency(module).attribute(x, TARGET)), atol=1e-6)
    times_input = ours(captum.InputXGradient(module).attribute(x, TARGET))
    np.testing.assert_allclose(gradient_times_input(fn, IMAGES), times_input, atol=1e-6)
    expected, delta = captum.IntegratedGradients(module).attribute(
        x, 0.3, TARGET, n_steps=40, return_convergence_delta=True
    )
    attributions = jax.jit(lambda x: integrated_gradients(fn, x, 0.3, steps=40))(IMAGES)
    np.testing.assert_allclose(attributions, ours(expected), atol=1e-5)
    assert float(delta.abs().max()) < 0.05


def test_occlusion(networks):
    fn, module = networks
    for window, stride in (((2, 3), (1, 2)), ((2, 2), (2, 2)), ((4, 4), (3, 3))):
        expected = captum.Occlusion(module).attribute(
            theirs(IMAGES), (2, *window), (2, *stride), baselines=0.3, target=TARGET
        )
        result = occlusion(fn, IMAGES, window, stride=stride, baseline=0.3)
        np.testing.assert_allclose(result, ours(expected), atol=1e-5)


def test_shapley_values_of_quadrants(networks):
    fn, module = networks
    mask = torch.tensor(QUADRANTS)[None, None].expand(1, 2, 6, 6).contiguous()
    expected = ours(captum.ShapleyValues(module).attribute(theirs(IMAGES), 0.3, TARGET, feature_mask=mask))
    values = jax.jit(lambda x: shapley_exact(fn, x, 0.3, groups=QUADRANTS[:, :, None]))(IMAGES)
    np.testing.assert_allclose(values, expected[:, ::3, ::3, 0].reshape(3, 4), atol=1e-5)
    sampled = shapley_sampling(jax.random.key(0), fn, IMAGES, 0.3, groups=QUADRANTS[:, :, None], permutations=400)
    np.testing.assert_allclose(sampled.value, values, atol=1e-6 + 5 * float(sampled.standard_error.max()))


def test_grad_cam_and_the_attribution_of_neurons(networks):
    fn, module = networks
    cam = captum.LayerGradCam(module, module[2]).attribute(theirs(IMAGES), TARGET, relu_attributions=True)
    np.testing.assert_allclose(grad_cam(fn, IMAGES, "conv_post_0"), cam.detach().numpy()[:, 0], atol=1e-6)
    expected = captum.LayerGradientXActivation(module, module[5]).attribute(theirs(IMAGES), TARGET)
    result = gradient_times_activation(fn, IMAGES, ["post_0"])["post_0"]
    np.testing.assert_allclose(result, expected.detach(), atol=1e-6)
    # captum takes differences of activations between steps, ours their derivative.
    expected = captum.LayerConductance(module, module[5]).attribute(theirs(IMAGES), 0.3, TARGET, n_steps=400)
    result = neuron_conductance(fn, jnp.asarray(IMAGES), 0.3, ["post_0"], steps=200)["post_0"]
    np.testing.assert_allclose(result, expected.detach(), atol=0.01)


def test_infidelity(networks):
    from captum.metrics import infidelity as captum_infidelity

    fn, module = networks
    gradient = captum.Saliency(module).attribute(theirs(IMAGES), TARGET, abs=False)
    torch.manual_seed(0)

    def perturb(inputs):
        noise = torch.randn_like(inputs) * 0.1
        return noise, inputs - noise

    expected = captum_infidelity(
        module, perturb, theirs(IMAGES), gradient, target=TARGET, n_perturb_samples=4000, max_examples_per_batch=3000
    )
    result = infidelity(jax.random.key(0), fn, jnp.asarray(IMAGES), ours(gradient), sigma=0.1, samples=4000, chunk=100)
    np.testing.assert_allclose(result, expected, rtol=0.25)
