"""What a classifier of digits forgets as it learns one task after another, and what holds on to it.

Five tasks in order. "Pixels": each has all ten digits, with its pixels in an order of its own. "Classes": each brings
two new digits. Plain fine-tuning, elastic weight consolidation (EWC) and replay of a few kept rows train alike, and are
scored on the test rows of every task, without being told which task a row is of.
Run: python examples/forgetting.py   (a minute on two cores; needs the extra images)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import Network, sweep
from jaxalign.interop.images import load_images
from jaxalign.networks import MLP
from jaxalign.robustness.adversarial_training import accuracy
from jaxalign.robustness.continual import continual_learning_metrics, sequential_training
from jaxalign.robustness.elastic_weight_consolidation import consolidate, elastic_weight_consolidation
from jaxalign.robustness.replay import replay
from jaxalign.runtime import estimate
from jaxalign.statistics import bootstrap_interval

SEEDS, TASKS, STEPS, BATCH, HIDDEN, LEARNING_RATE = 5, 5, 200, 32, 128, 0.1
STRENGTHS, KEPT = (0.0, 10.0, 30.0, 300.0), 200

network = Network.from_linen(MLP((HIDDEN, 10)), jnp.zeros((1, 64)))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(LEARNING_RATE))  # a strong spring is a stiff one


def permuted_pixels(x, y):
    """The same rows [N, 64] in every task, each with its own order of pixels: x [T, N, 64], y [T, N]."""
    rng = np.random.default_rng(1)
    orders = [np.arange(64)] + [rng.permutation(64) for _ in range(TASKS - 1)]
    return np.stack([x[:, order] for order in orders]), np.stack([y] * TASKS)


def new_classes(x, y):
    """Task t has the digits 2 t and 2 t + 1, as many rows in each task: x [T, N, 64], y [T, N]."""
    rows = [np.flatnonzero(y // 2 == task) for task in range(TASKS)]
    rows = np.stack([each[: min(map(len, rows))] for each in rows])
    return x[rows], y[rows]


def consolidated(strength):
    """Elastic weight consolidation, and what to do between tasks; at strength 0 it is plain fine-tuning."""

    def between(state, batches):
        return consolidate(network, state, batches[0][:8].reshape(-1, 64), microbatches=8)

    return elastic_weight_consolidation(network, optimizer, strength=strength), between


def replayed(weight):
    """Replay of as many kept rows at each step as there are new ones."""
    example = (jnp.zeros((BATCH, 64)), jnp.zeros(BATCH, jnp.int32))
    return replay(
        network, optimizer, example=example, capacity=KEPT, replayed=BATCH, replay_weight=weight
    ), None


@functools.partial(jax.jit, static_argnums=0)
def measure(method, settings, tasks, tests):
    """The measures of each setting of a method and each seed, leaves [settings, SEEDS]."""

    def score(state, test):
        return accuracy(network.apply(state.params, test[0]), test[1])

    def run(setting, key):
        order_key, run_key = jax.random.split(key)
        rows = jax.random.randint(order_key, (TASKS, STEPS, BATCH), 0, tasks[1].shape[1])
        batches = jax.tree.map(lambda leaf: jax.vmap(lambda x, at: x[at])(leaf, rows), tasks)
        algorithm, between = method(setting)
        found = sequential_training(algorithm, run_key, batches, tests, score=score, between=between)
        return continual_learning_metrics(found.scores, found.initial)

    return sweep(run, settings, jax.random.split(jax.random.key(0), SEEDS))


if __name__ == "__main__":
    images = load_images("digits")
    train, test = ((x.reshape(-1, 64), y) for x, y in (images[:2], images[2:4]))
    names = ["fine-tuning" if not strength else f"EWC, strength {strength:g}" for strength in STRENGTHS]
    names.append(f"replay of {KEPT} rows")
    for title, split in (("pixels", permuted_pixels), ("classes", new_classes)):
        data = [jax.tree.map(jnp.asarray, split(*part)) for part in (train, test)]
        found = [measure(consolidated, jnp.array(STRENGTHS), *data), measure(replayed, jnp.ones(1), *data)]
        found = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *found)
        print(f"\n{title}: mean over {SEEDS} seeds with its 95% interval\n{'':22}{'average accuracy':24}forgetting")
        for row, name in enumerate(names):
            cells = []
            for values in (found.average_accuracy[row], found.forgetting[row]):
                cells.append(estimate(values.mean(), *bootstrap_interval(jax.random.key(1), values)))
            print(f"{name:22}{cells[0]:24}{cells[1]}")
