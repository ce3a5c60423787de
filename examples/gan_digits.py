"""A GAN learns to write digits, and its samples are judged by measure: how far from real digits, how far from noise?

A small generator and discriminator (non-saturating loss, R1 penalty) learn from half of scikit-learn's 8x8 digits. A
classifier of the same half then sees the samples, as many real digits that were held out, and "noise" whose every pixel
is taken from another digit; all are compared with the rest of the held-out digits. 95% jackknife intervals.
Draws digits of each kind if matplotlib is installed.
Run: python examples/gan_digits.py   (about a minute on two cores; needs scikit-learn)
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm, train
from jaxalign.interop.images import load_images
from jaxalign.networks.discriminator import Discriminator
from jaxalign.networks.generator import Generator
from jaxalign.networks.mlp import MLP
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.gan import gan, sample_generator
from jaxalign.robustness.gan_quality import (
    class_coverage,
    classifier_score,
    frechet_distance,
    jackknife,
    precision_and_recall,
)
from jaxalign.robustness.two_sample import median_bandwidth, mmd_squared
from jaxalign.runtime import estimate

STEPS, BATCH, LATENTS, WIDTH, FEATURES, CLASSIFIER_STEPS, PICTURE = 6000, 64, 32, 128, 16, 1500, "gan_digits.png"

digits = load_images("digits", held_out=0.5)
reference, held_out = digits.x_test[:-1:2], digits.x_test[1::2]


def learn(algorithm, key, data, steps):
    """The state and metrics after `steps` batches drawn from the rows of `data`."""

    def step(state, batch_key):
        rows = jax.random.randint(batch_key, (BATCH,), 0, len(digits.x_train))
        return algorithm.step(state, jax.tree.map(lambda x: jnp.asarray(x)[rows], data))

    init_key, *keys = jax.random.split(key, 1 + steps)
    return jax.jit(lambda: train(Algorithm(algorithm.init, step), init_key, jnp.stack(keys)))()


def classifier():
    """images -> (features [B, FEATURES], logits [B, 10]), the features those of the last hidden layer."""
    body = Network.from_linen(MLP((WIDTH, FEATURES)), jnp.zeros((1, 64)))
    head = Network.from_linen(MLP((10,)), jnp.zeros((1, FEATURES)))

    def apply(params, x):
        features = jax.nn.relu(body.apply(params["body"], x.reshape(len(x), -1)))
        return features, head.apply(params["head"], features)

    return Network(lambda key: {"body": body.init(key), "head": head.init(key)}, apply)


def trained_classifier(key):
    network = classifier()

    def objective(params, batch, key):
        return cross_entropy(network.apply(params, batch[0])[1], batch[1]).mean(), {}

    algorithm = gradient_algorithm(network, objective, optax.adam(1e-3))
    state, _ = learn(algorithm, key, (digits.x_train, digits.y_train), CLASSIFIER_STEPS)
    return jax.jit(lambda x: network.apply(state.params, x))


def trained_generator(key):
    """The network, its averaged parameters, and the metrics of training."""
    generator = Network.from_linen(Generator((8, 8, 1), (), (WIDTH, WIDTH)), jnp.zeros((1, LATENTS)))
    discriminator = Network.from_linen(Discriminator((), (WIDTH, WIDTH)), jnp.zeros((1, 8, 8, 1)))
    algorithm = gan(generator, discriminator, optax.adam(1e-3, b1=0.5), latent_size=LATENTS, r1=0.1)
    state, metrics = learn(algorithm, key, digits.x_train, STEPS)
    return generator, state.generator_average, metrics


def measures(images, see):
    """Text of each measure by name."""
    features, logits = see(images)
    real, width = see(reference)[0], median_bandwidth(reference, held_out)
    mmd = jax.jit(lambda x, y: 1000 * mmd_squared(x, y, bandwidth=width))
    both = jackknife(jax.jit(precision_and_recall), real, features)
    intervals = {
        "classifier score": jackknife(jax.jit(classifier_score), logits),
        "Frechet distance": jackknife(frechet_distance, real, features),
        "1000 MMD^2": jackknife(mmd, reference, images),
        "precision": (end[0] for end in both),
        "recall": (end[1] for end in both),
    }
    covered = f"{class_coverage(logits).covered:.0%}"
    return {name: estimate(*ends) for name, ends in intervals.items()} | {"classes covered": covered}


if __name__ == "__main__":
    classifier_key, gan_key, sample_key = jax.random.split(jax.random.key(0), 3)
    see = trained_classifier(classifier_key)
    generator, params, metrics = trained_generator(gan_key)
    images = {
        "noise": np.random.default_rng(0).permuted(held_out, axis=0),
        "samples": np.asarray(sample_generator(sample_key, generator, params, len(held_out), latent_size=LATENTS)),
        "held out": held_out,
    }
    right = np.mean(np.argmax(see(digits.x_test)[1], axis=1) == digits.y_test)
    print(f"{len(digits.x_train)} digits to learn from, {len(held_out)} of each kind to compare with {len(reference)}")
    print(f"the classifier is right about {right:.1%} of held-out digits")
    for name in ("generator_loss", "discriminator_loss"):
        first, last = metrics[name][: STEPS // 20].mean(), metrics[name][-(STEPS // 20) :].mean()
        print(f"{name}: {first:.2f} in the first twentieth of training, {last:.2f} in the last")
    print("(where nothing can be told apart: 0.69 and 1.39)\n")
    columns = {name: measures(x, see) for name, x in images.items()}
    print(f"{'':18}" + "".join(f"{name:>28}" for name in columns))
    for measure in columns["noise"]:
        print(f"{measure:18}" + "".join(f"{column[measure]:>28}" for column in columns.values()))
    if importlib.util.find_spec("matplotlib"):
        from jaxalign.runtime.image_grid import image_grid

        image_grid({name: x[:12] for name, x in images.items()}).savefig(PICTURE, dpi=150)
        print(f"\nwrote {PICTURE}")
    else:
        print('\nno picture: pip install "jaxalign[viz]"')
