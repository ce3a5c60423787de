"""Inputs a classifier of digits was not trained on: which score tells them one by one, and which test tells a sample.

A small network learns the digits 0 to 7. First, the AUROC of six scores on test digits it knows against digits it never
saw, turned ones, noisy ones and plain noise. Then how often three tests on its features find that one sample is not
distributed like another, the more of its rows are digits never seen; with none that is a false alarm.
Run: python examples/shift.py   (a minute on two cores; needs the extra images)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.ndimage import rotate

from jaxalign import Network, gradient_algorithm, train
from jaxalign.interop.images import load_images
from jaxalign.networks import MLP
from jaxalign.robustness import ood
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.ood_metrics import auroc, detection_interval
from jaxalign.robustness.two_sample import classifier_two_sample_test, kolmogorov_smirnov_test, mmd_test
from jaxalign.runtime import estimate

KNOWN, STEPS, BATCH, NEIGHBOUR = 8, 600, 64, 10
SHARES, SAMPLE, DRAWS, LEVEL = (0.0, 0.1, 0.2, 0.4, 0.8), 100, 100, 0.05

body = Network.from_linen(MLP((64, 32), activation=jax.nn.tanh), jnp.zeros((1, 64)))
head = Network.from_linen(MLP((KNOWN,)), jnp.zeros((1, 32)))


def init(key):
    """Parameters of both halves."""
    return {"body": body.init(key), "head": head.init(jax.random.fold_in(key, 1))}


def features(params, x):
    """[N, 32], before the last layer."""
    return jnp.tanh(body.apply(params["body"], x))


def objective(params, rows, key):
    """Mean cross-entropy of one batch."""
    x, y = rows
    return cross_entropy(head.apply(params["head"], features(params, x)), y).mean(), {}


@jax.jit
def learn(key, x, y):
    """Parameters after STEPS steps on batches drawn from x, y."""
    network = Network(init, lambda params, x: head.apply(params["head"], features(params, x)))
    rows = jax.random.randint(key, (STEPS, BATCH), 0, len(y))
    algorithm = gradient_algorithm(network, objective, optax.adamw(3e-3, weight_decay=1e-2))
    return train(algorithm, key, (x[rows], y[rows]))[0].params


@jax.jit
def scores(params, model, train_features, x):
    """{score: [N]} of inputs x [N, 64]."""
    seen = features(params, x)
    logits = head.apply(params["head"], seen)
    return {
        "largest softmax": ood.max_softmax_score(logits),
        "largest logit": ood.max_logit_score(logits),
        "energy": ood.energy_score(logits),
        "Mahalanobis": ood.mahalanobis_score(model, seen),
        "relative Mahalanobis": ood.relative_mahalanobis_score(model, seen),
        f"{NEIGHBOUR}th neighbour": ood.knn_score(train_features, seen, k=NEIGHBOUR),
    }


TESTS = {
    "MMD": functools.partial(mmd_test, permutations=199),
    "classifier": functools.partial(classifier_two_sample_test, steps=100, permutations=199),
    "Kolmogorov-Smirnov": lambda key, x, y: kolmogorov_smirnov_test(x, y),
}


@functools.partial(jax.jit, static_argnums=0)
def found(name, key, known, unseen, share):
    """How often in DRAWS draws the test tells SAMPLE rows of `known` from SAMPLE others with some of `unseen`."""

    def one(key):
        known_key, unseen_key, mix_key, test_key = jax.random.split(key, 4)
        x, y = jnp.split(jax.random.choice(known_key, known, (2 * SAMPLE,), replace=False), 2)
        z = jax.random.choice(unseen_key, unseen, (SAMPLE,), replace=False)
        mixed = jnp.where(jax.random.bernoulli(mix_key, share, (SAMPLE, 1)), z, y)
        return TESTS[name](test_key, x, mixed).p_value <= LEVEL

    return jnp.mean(jax.lax.map(one, jax.random.split(key, DRAWS)))


def turned(x, angle):
    """Images [N, 64] turned by an angle in degrees."""
    return rotate(x.reshape(-1, 8, 8), angle, axes=(1, 2), reshape=False, order=1).reshape(-1, 64)


if __name__ == "__main__":
    x_train, y_train, x_test, y_test = (
        a.reshape(len(a), -1).squeeze() for a in load_images("digits", held_out=0.4)[:4]
    )
    known = x_test[y_test < KNOWN]
    rng = np.random.default_rng(0)
    outside = {
        "unseen digits": x_test[y_test >= KNOWN],
        "turned by 45": turned(known, 45),
        "with noise": np.clip(known + 0.3 * rng.normal(size=known.shape), 0, 1),
        "uniform noise": rng.uniform(size=known.shape),
    }
    x_train, y_train = x_train[y_train < KNOWN], y_train[y_train < KNOWN]
    params = learn(jax.random.key(0), x_train, y_train)
    train_features = features(params, x_train)
    model = ood.fit_mahalanobis(train_features, y_train, num_classes=KNOWN)
    inside = scores(params, model, train_features, known)
    outside = {name: scores(params, model, train_features, jnp.asarray(x, jnp.float32)) for name, x in outside.items()}

    interval = jax.jit(detection_interval)
    print("AUROC with its 95% interval over test rows\n" + " " * 22 + "".join(f"{name:24}" for name in outside))
    for score, known_scores in inside.items():
        cells = [
            estimate(auroc(known_scores, other[score]), *interval(jax.random.key(1), known_scores, other[score]))
            for other in outside.values()
        ]
        print(f"{score:22}" + "".join(f"{cell:24}" for cell in cells))

    samples = [features(params, x) for x in (known, x_test[y_test >= KNOWN])]
    print(f"\nShare of {DRAWS} samples of {SAMPLE} rows with p <= {LEVEL}, where unseen digits are")
    print(" " * 22 + "".join(f"{share:8.0%}" for share in SHARES))
    for name in TESTS:
        powers = [found(name, jax.random.key(2), *samples, share) for share in SHARES]
        print(f"{name:22}" + "".join(f"{float(power):8.2f}" for power in powers))
