"""What does a digit look like to a network, and do other networks see the same digit in it?

A small convolutional network learns scikit-learn's 8x8 digits under noise; pictures that maximise each class's logit
(Fourier parameterisation, random shifts, scales and rotations, a price on brightness) are then shown to the network
itself and to a second one of another architecture that has never seen the first. Pictures of the last convolution's
channels are compared with the training digits that activate them most. Draws them if matplotlib is installed.
Run: python examples/visualize_features.py                      (about half a minute on two cores; needs scikit-learn)
     python examples/visualize_features.py --images mnist.npz   (about two minutes on two cores)
"""

import argparse
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm, train
from jaxalign.interop.images import load_images
from jaxalign.interpretability.activations import capture_function
from jaxalign.interpretability.feature_visualization import feature_visualization
from jaxalign.interpretability.image_transformations import robust_transformations
from jaxalign.interpretability.visualization_objectives import channel_objective, logit_objective, weighted
from jaxalign.networks import ConvNet
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.runtime import estimate
from jaxalign.statistics import wilson_interval

STEPS, SIGMA, BRIGHTNESS_PRICE, SEEDS, PICTURE = 1500, 0.3, 20.0, 5, "features.png"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--images", default="digits", help="digits, or an .npz file with x_train, y_train, x_test, y_test")


def classifier(key, data, module, *, sigma):
    """images -> logits, learned on images with normal noise of deviation `sigma`."""
    network = Network.from_linen(module, data.x_train[:1])

    def objective(params, batch, key):
        x, y = batch
        return cross_entropy(network.apply(params, x + sigma * jax.random.normal(key, x.shape)), y).mean(), {}

    algorithm = gradient_algorithm(network, objective, optax.adam(2e-3))

    @jax.jit
    def learned(x_train, y_train):
        def step(state, key):
            rows = jax.random.randint(key, (64,), 0, len(y_train))
            return algorithm.step(state, (x_train[rows], y_train[rows]))

        init_key, batch_key = jax.random.split(key)
        return train(Algorithm(algorithm.init, step), init_key, jax.random.split(batch_key, STEPS))[0].params

    return jax.jit(functools.partial(network.apply, learned(data.x_train, data.y_train)))


def brightness(images):
    return jnp.mean(images, axis=(1, 2, 3))


def drawn(key, apply, data, objective, count):
    """SEEDS times `count` pictures [SEEDS, count, H, W, C] that maximise an objective."""
    shape = (count, *data.x_train.shape[1:])
    transforms = robust_transformations(pixels=max(1, shape[1] // 16), background=0.0)

    def one(key):
        return feature_visualization(key, objective, shape, transforms=transforms).images

    return jax.jit(jax.vmap(one))(jax.random.split(key, SEEDS))


if __name__ == "__main__":
    data = load_images(parser.parse_args().images)
    classes = jnp.arange(data.num_classes)
    keys = jax.random.split(jax.random.key(0), 4)
    networks = {
        "the network": classifier(keys[0], data, ConvNet(data.num_classes, (16, 32), (64,)), sigma=SIGMA),
        "another one": classifier(keys[1], data, ConvNet(data.num_classes, (32,), (100,), kernel_size=5), sigma=0.0),
    }
    apply = networks["the network"]
    objective = weighted((1.0, logit_objective(apply, classes)), (-BRIGHTNESS_PRICE, brightness))
    pictures = drawn(keys[2], apply, data, objective, len(classes))
    shown = pictures.reshape(-1, *pictures.shape[2:])
    print(f"{data.name}: {len(shown)} pictures, {SEEDS} of each class, read as their class:")
    for name, network in networks.items():
        right = jnp.mean(jnp.argmax(network(data.x_test), axis=1) == data.y_test)
        read = int(jnp.sum(jnp.argmax(network(shown), axis=1) == jnp.tile(classes, SEEDS)))
        interval = wilson_interval(read, len(shown))
        print(f"  by {name}, {right:.1%} right about test images: {estimate(read / len(shown), *interval)}")

    site = "conv_post_1"
    channels = drawn(keys[3], apply, data, channel_objective(apply, site, classes), len(classes))[0]
    mean_activation = jax.jit(lambda x: jnp.mean(capture_function(apply, [site])(x)[1][site], axis=(1, 2)))
    reached = jnp.diagonal(mean_activation(channels))
    seen = mean_activation(data.x_train[:5000])
    strongest = data.x_train[np.asarray(jnp.argmax(seen, axis=0)[: len(classes)])]
    ratio = reached / jnp.maximum(jnp.max(seen, axis=0)[: len(classes)], 1e-6)
    print(f"\npictures of channels of {site} activate them {jnp.min(ratio):.1f} to {jnp.max(ratio):.1f} times as much")
    print("as the training image that does most")
    if importlib.util.find_spec("matplotlib"):
        from jaxalign.runtime.image_grid import image_grid

        rows = {f"picture {i + 1}": pictures[i] for i in range(3)}
        rows["mean image"] = np.stack([data.x_train[data.y_train == label].mean(axis=0) for label in classes])
        rows |= {"channels": channels, "strongest": strongest}
        image_grid(rows, titles=[str(label) for label in classes]).savefig(PICTURE, dpi=150)
        print(f"\nwrote {PICTURE}")
    else:
        print('\nno picture: pip install "jaxalign[viz]"')
