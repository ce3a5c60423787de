"""Margins of a conv net equal auto_LiRPA's, by intervals, CROWN-IBP and CROWN."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks.peer.auto_lirpa_today import import_auto_lirpa, margin_bounds
from jaxalign.certification.margins import margin_lower_bounds
from jaxalign.networks import ConvNet

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
if importlib.util.find_spec("auto_LiRPA") is None:  # importing it as it is fails on today's NumPy
    pytest.skip("needs auto_LiRPA", allow_module_level=True)

SIDE, CHANNELS, HIDDEN, CLASSES, EPSILON = 12, (4, 6), 20, 5, 0.02
METHODS = {"interval": "IBP", "crown-interval": "CROWN-IBP", "crown": "CROWN"}


@pytest.fixture(scope="module")
def network():
    """A flax network, its parameters, and images with labels."""
    module = ConvNet(CLASSES, channels=CHANNELS, hidden_sizes=(HIDDEN,), kernel_size=4)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(3, SIDE, SIDE, 1)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    return module, params, x, np.array([2, 0, 4])


def layers(params):
    """[(kernel, bias)] from the image on."""
    tree = params["params"]
    found = [tree["Conv_0"], tree["Conv_1"], tree["MLP_0"]["Dense_0"], tree["MLP_0"]["Dense_1"]]
    return [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in found]


@pytest.fixture(scope="module")
def theirs(network):
    """Margin bounds [B, C-1] by method."""
    auto_lirpa = import_auto_lirpa()
    _, params, x, y = network
    parts, side = [], SIDE // 4
    for i, (kernel, bias) in enumerate(layers(params)):
        if kernel.ndim == 4:
            part = torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], 4, stride=2, padding=1)
            kernel = kernel.transpose(3, 2, 0, 1)
        else:
            part = torch.nn.Linear(*kernel.shape)
            if i == len(CHANNELS):  # flax flattens [H, W, C], torch [C, H, W]
                kernel = kernel.reshape(side, side, CHANNELS[-1], -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
                parts.append(torch.nn.Flatten())
            kernel = kernel.T
        part.weight.data, part.bias.data = torch.tensor(kernel.copy()), torch.tensor(bias)
        parts += [part, torch.nn.ReLU()]
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    module = auto_lirpa.BoundedModule(torch.nn.Sequential(*parts[:-1]).eval(), images)
    classes = np.eye(CLASSES, dtype=np.float32)
    rows = torch.tensor(np.stack([classes[label] - np.delete(classes, label, axis=0) for label in y]))
    lower, upper = (images - EPSILON).clamp(0, 1), (images + EPSILON).clamp(0, 1)
    with torch.no_grad():
        return {
            ours: margin_bounds(module, images, rows, lower=lower, upper=upper, method=name).numpy()
            for ours, name in METHODS.items()
        }


@pytest.mark.parametrize("method", METHODS)
def test_margins_equal_theirs(network, theirs, method):
    module, params, x, y = network

    @jax.jit
    def bounds(params, x, y):
        return margin_lower_bounds(lambda x: module.apply(params, x), x, y, EPSILON, method=method)

    np.testing.assert_allclose(bounds(params, x, y), theirs[method], atol=1e-4)
