"""How far may an attacker move an image, in L2, before a smoothed classifier could change its mind?

For each deviation sigma of the noise a small convolutional network learns on noisy images, and randomised smoothing
certifies it on test images (Cohen, Rosenfeld & Kolter 2019). The table and the picture (if matplotlib is installed)
show the share certified right at each radius: more noise reaches farther and is right less often close by.
Run: python examples/smoothing.py                       (half a minute on two cores; scikit-learn digits, n = 2,000)
     python examples/smoothing.py --mnist mnist.npz     (some minutes on two cores, n = 10,000)
"""

import argparse
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithm import Algorithm, Network, train
from jaxalign.certification.smoothing import smoothed_accuracy_curve, smoothed_certify
from jaxalign.interop.images import load_images
from jaxalign.networks import ConvNet
from jaxalign.robustness.smooth_adversarial_training import gaussian_augmentation

SIGMAS, ALPHA, IMAGES, PICTURE = (0.12, 0.25, 0.5, 1.0), 0.001, 200, "smoothing.png"
DIGITS = {"steps": 1500, "n": 2_000, "radii": np.arange(0.0, 1.01, 0.1)}
MNIST = {"steps": 1500, "n": 10_000, "radii": np.arange(0.0, 2.51, 0.25)}

parser = argparse.ArgumentParser()
parser.add_argument("--mnist", help="an .npz file with x_train, y_train, x_test, y_test")
path = parser.parse_args().mnist
images, size = load_images(path or "digits"), MNIST if path else DIGITS
chosen = np.random.default_rng(0).choice(len(images.y_test), min(IMAGES, len(images.y_test)), replace=False)
x_test, y_test = jnp.asarray(images.x_test[chosen]), jnp.asarray(images.y_test[chosen])
network = Network.from_linen(ConvNet(images.num_classes, channels=(8, 16), hidden_sizes=(64,)), x_test[:1])


@jax.jit
def trained(sigma, x_train, y_train):
    """The parameters after `steps` batches of 128 images, each seen once with noise of deviation sigma."""
    rate = optax.cosine_decay_schedule(2e-3, size["steps"])
    algorithm = gaussian_augmentation(network, optax.adam(rate), sigma=sigma)

    def step(state, key):
        rows = jax.random.randint(key, (128,), 0, len(y_train))
        return algorithm.step(state, (x_train[rows], y_train[rows]))

    init_key, batch_key = jax.random.split(jax.random.key(0))
    return train(Algorithm(algorithm.init, step), init_key, jax.random.split(batch_key, size["steps"]))[0].params


@jax.jit
def certified(params, sigma):
    apply = functools.partial(network.apply, params)
    return smoothed_certify(jax.random.key(1), apply, x_test, sigma=sigma, n=size["n"], alpha=ALPHA, batch_size=250)


print(f"{images.name}: {len(y_test)} test images, n = {size['n']}, alpha = {ALPHA}; certified accuracy at each radius")
print("sigma" + "".join(f"{radius:7.2f}" for radius in size["radii"]) + "  abstained  mean radius")
curves = {}
for sigma in SIGMAS:
    certificate = certified(trained(sigma, images.x_train, images.y_train), sigma)
    accuracy, low, high = smoothed_accuracy_curve(certificate, y_test, size["radii"])
    radius = jnp.mean(jnp.where(certificate.prediction == y_test, certificate.radius, 0.0))
    row = "".join(f"{value:7.3f}" for value in accuracy)
    print(f"{sigma:5.2f}{row}  {jnp.mean(certificate.abstained):9.3f}  {radius:11.3f}", flush=True)
    curves[f"sigma {sigma:.2f}"] = np.stack([accuracy, low, high], axis=1)
print(f"95% intervals over the images: at most {max(np.ptp(c[:, 1:], axis=1).max() for c in curves.values()):.3f} wide")
if importlib.util.find_spec("matplotlib"):
    from jaxalign.runtime.robustness_figures import robustness_curves

    robustness_curves(size["radii"], curves, norm="l2", title="certified by smoothing").savefig(PICTURE, dpi=150)
    print(f"wrote {PICTURE}")
