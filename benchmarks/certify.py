"""How many bounds a second do intervals and CROWN give, against auto_LiRPA on the same networks?

A bound is one lower bound of z_y - z_j for one image (nine an image), through networks trained on clean images, so that
many ReLUs are unstable; both sides read the same weights and images and must reach the same "mean margin". They come
from MNIST where JAXALIGN_MNIST names its .npz, else from scikit-learn's digits drawn at 28 x 28. auto_LiRPA has two
ways to hold a convolution in CROWN; it is given the quicker one, and both are in `details`. The training cases take
one step on interval bounds; what a step on the clean loss takes is in `details`, with the ratio of the two.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.attacks import images, nested
from benchmarks.attacks_problem import CLASSES, KERNEL, SIDE
from benchmarks.certify_problem import NETWORKS, path_of, quality, read
from benchmarks.measure import Measurement, measure
from jaxalign import Algorithm, Network, gradient_algorithm
from jaxalign.certification.certified_training import certified_training
from jaxalign.certification.margins import margin_lower_bounds
from jaxalign.networks import MLP, ConvNet
from jaxalign.robustness import LabelledBatch, cross_entropy
from jaxalign.runtime import fit

EPSILON, TRAINING_STEPS, LEARNING_RATE = 0.02, 400, 1e-3
CAPACITY = 128  # rows that CROWN walks back at a time
IMAGES = {"interval": 256, "crown": 8}
METHODS = ("interval", "crown")


def cases(quick: bool) -> list[dict[str, Any]]:
    """Both methods on every network, and a training step on the two small ones."""
    common = {"epsilon": EPSILON, "repeats": 3 if quick else 7}
    bounds = [
        {
            "name": f"{method}, {network}",
            "method": method,
            "network": network,
            "images": 4 if quick else IMAGES[method],
            **common,
        }
        for method in METHODS
        for network in NETWORKS
    ]
    steps = [
        {"name": f"training step, {network}", "method": "training", "network": network, "images": 100, **common}
        for network in ("mlp small", "conv small")
    ]
    return bounds + steps


def prepare(cases: list[dict[str, Any]]) -> None:
    """Train the networks that the cases name and that are not there yet."""
    for name in sorted({case["network"] for case in cases}):
        path = path_of(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = _train(network_of(name))
            np.savez(path, **arrays)


def network_of(name: str) -> Network:
    """The classifier by name, of images [B, 28, 28]."""
    channels, hidden = NETWORKS[name]
    if channels:
        module = ConvNet(CLASSES, channels=channels, hidden_sizes=hidden, kernel_size=KERNEL)
        return Network.from_linen(module, jnp.zeros((1, SIDE, SIDE)))
    network = Network.from_linen(MLP((*hidden, CLASSES)), jnp.zeros((1, SIDE * SIDE)))
    return Network(network.init, lambda params, x: network.apply(params, x.reshape(x.shape[0], -1)))


def natural(network: Network) -> Algorithm:
    """Training on the clean loss."""

    def objective(params: Any, batch: LabelledBatch, key: Any) -> Any:
        return cross_entropy(network.apply(params, batch.x), batch.y).mean(), {}

    return gradient_algorithm(network, objective, optax.adam(LEARNING_RATE))


def _train(network: Network) -> dict[str, np.ndarray]:
    x_train, y_train, x_test, y_test = images()

    def batch(step: int) -> LabelledBatch:
        rows = np.random.default_rng(step).integers(0, len(x_train), 100)
        return LabelledBatch(x_train[rows], y_train[rows])

    state, _ = fit(natural(network), jax.random.key(0), batch, steps=TRAINING_STEPS, progress=False)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in jax.tree.leaves_with_path(state.params)}
    return {"x": x_test, "y": y_test, **{name: np.asarray(value) for name, value in named.items()}}


def run(case: dict[str, Any]) -> Measurement:
    """Bounds per second, or steps."""
    problem = read(case)
    network, params = network_of(case["network"]), nested(problem)
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    if case["method"] == "training":
        return _training(case, network, x, y)

    def bounds(params: Any, x: Any, y: Any) -> Any:
        apply = lambda x: network.apply(params, x)  # noqa: E731
        return margin_lower_bounds(apply, x, y, case["epsilon"], method=case["method"], capacity=CAPACITY)

    return measure(
        bounds, params, x, y, unit="bounds", amount=len(x) * (CLASSES - 1), warmup=1, repeats=case["repeats"],
        quality=lambda found: quality(np.asarray(found)),
    )  # fmt: skip


def _training(case: dict[str, Any], network: Network, x: Any, y: Any) -> Measurement:
    certified = certified_training(
        network, optax.adam(LEARNING_RATE), method="ibp", epsilon=case["epsilon"], warm_up=0, ramp=1
    )
    found = {}
    for name, algorithm in (("natural", natural(network)), ("certified", certified)):
        state = jax.jit(algorithm.init)(jax.random.key(0))
        found[name] = measure(
            algorithm.step, state, LabelledBatch(x, y), unit="steps", amount=1, warmup=2, repeats=5 * case["repeats"],
            donate=(0,), advance=lambda args, out: (out[0], *args[1:]),
        )  # fmt: skip
    step, alone = (float(np.median(found[name].samples)) for name in ("certified", "natural"))
    return dataclasses.replace(
        found["certified"], quality={"times a natural step": step / alone}, details={"natural step": alone}
    )
