"""How many images a second do PGD and AutoAttack work through, against foolbox and torchattacks on the same classifier?

The classifiers are trained against PGD first, in `prepare`, so that most images survive and no side can stop early;
both sides read the same weights and images. They and "success" (the share of images misclassified in the end) come
from MNIST where JAXALIGN_MNIST names its .npz, else from scikit-learn's digits drawn at 28 x 28. PGD takes 40 steps
from a random start. AutoAttack's "standard" has APGD-CE, APGD-T and FAB-T of 100 steps and Square of 5,000 queries in
the paper and here; torchattacks' own default is 10 steps, so it is measured at both. Ours of AutoAttack is called from
the host, its compilation in `first`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.attacks_problem import (
    CHANNELS,
    CLASSES,
    HIDDEN,
    KERNEL,
    MLP_HIDDEN,
    SIDE,
    VARIABLE,
    Problem,
    data_name,
    path_of,
    read,
    success_rate,
)
from benchmarks.measure import Measurement, measure, measure_host
from jaxalign import Network
from jaxalign.networks import MLP, ConvNet
from jaxalign.robustness import adversarial_training, auto_attack, pgd
from jaxalign.runtime import fit

PGD_STEPS, STEP_SHARE = 40, 1 / 30  # of epsilon, a step: 0.01 at 0.3
TRAINING_STEPS = {"mnist": 4000, "digits": 1500}


def cases(quick: bool) -> list[dict[str, Any]]:
    """PGD on both networks against both peers, AutoAttack on both against torchattacks."""
    epsilon = 0.3 if data_name() == "mnist" else 0.15
    common = {"epsilon": epsilon, "seed": 0, "repeats": 3 if quick else 7}
    images, few = (64, 16) if quick else (512, 256)
    return [
        {
            "name": f"PGD-{PGD_STEPS}, {network}, against {peer}",
            "attack": "pgd",
            "network": network,
            "peer": peer,
            "examples": images,
            **common,
        }
        for network in ("mlp", "conv")
        for peer in ("foolbox", "torchattacks")
    ] + [
        {
            "name": f"AutoAttack, {network}, {steps} steps, {queries} queries, against torchattacks",
            "attack": "auto_attack",
            "network": network,
            "peer": "torchattacks",
            "examples": few,
            "steps": steps,
            "queries": queries,
            **common,
            "repeats": 1,
        }
        for network in ("mlp", "conv")
        for steps, queries in (((10, 100),) if quick else ((10, 5000), (100, 5000)))
    ]


def prepare(cases: list[dict[str, Any]]) -> None:
    """Train what the cases name and is not there yet: conv 16 and 32 4x4 with stride 2, 100 hidden units; or an MLP."""
    for name, epsilon in sorted({(case["network"], case["epsilon"]) for case in cases}):
        path = path_of(name, epsilon)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = _train(network_of(name), epsilon)
            np.savez(path, **arrays)


def network_of(name: str) -> Network:
    """The classifier by name, of images [B, 28, 28]."""
    if name == "conv":
        module = ConvNet(CLASSES, channels=CHANNELS, hidden_sizes=HIDDEN, kernel_size=KERNEL)
        return Network.from_linen(module, jnp.zeros((1, SIDE, SIDE)))
    network = Network.from_linen(MLP((*MLP_HIDDEN, CLASSES)), jnp.zeros((1, SIDE * SIDE)))
    return Network(network.init, lambda params, x: network.apply(params, x.reshape(x.shape[0], -1)))


def _train(network: Network, epsilon: float) -> dict[str, np.ndarray]:
    x_train, y_train, x_test, y_test = images()
    steps = TRAINING_STEPS[data_name()]
    algorithm = adversarial_training(
        network, optax.adam(optax.piecewise_constant_schedule(1e-3, {int(0.75 * steps): 0.2})),
        attack=functools.partial(pgd, steps=10, step_size=epsilon / 6),
        epsilon=optax.linear_schedule(0.0, epsilon, steps // 3),
    )  # fmt: skip

    def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.random.default_rng(step).integers(0, len(x_train), 100)
        return x_train[rows], y_train[rows]

    state, _ = fit(algorithm, jax.random.key(0), batch, steps=steps, progress=False)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in jax.tree.leaves_with_path(state.params)}
    return {"x": x_test, "y": y_test, **{name: np.asarray(value) for name, value in named.items()}}


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    if data_name() == "mnist":
        import os

        from jaxalign.interop import load_images

        images = load_images(os.environ[VARIABLE])
        x_train, x_test = (x.reshape(len(x), SIDE, SIDE) for x in (images.x_train, images.x_test))
        return x_train, images.y_train, x_test[:1000], images.y_test[:1000]
    import scipy.ndimage
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    x = scipy.ndimage.zoom(digits.images / 16, (1, SIDE / 8, SIDE / 8), order=1).clip(0, 1).astype(np.float32)
    y = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    held, rest = order[:600], order[600:]
    return x[rest], y[rest], x[held], y[held]


def run(case: dict[str, Any]) -> Measurement:
    """Images per second."""
    problem = read(case)
    network = network_of(case["network"])
    params = nested(problem)
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    def quality(x_adv: Any) -> dict[str, Any]:
        inside = jnp.max(jnp.abs(x_adv - x)) <= case["epsilon"] + 1e-6
        assert inside, "an adversarial image is outside the ball"
        return {"success": success_rate(np.argmax(network.apply(params, x_adv), axis=1), problem)}

    if case["attack"] == "auto_attack":
        apply = jax.jit(lambda x: network.apply(params, x))
        return measure_host(
            lambda x, y: jax.block_until_ready(_auto_attack(case, apply, x, y)),
            x, y, unit="images", amount=len(x), warmup=0, repeats=case["repeats"], quality=quality,
        )  # fmt: skip

    def attack(params: Any, x: Any, y: Any) -> Any:
        size = STEP_SHARE * case["epsilon"]
        apply = lambda x: network.apply(params, x)  # noqa: E731
        return pgd(jax.random.key(case["seed"]), apply, x, y, case["epsilon"], steps=PGD_STEPS, step_size=size).x_adv

    return measure(
        attack, params, x, y, unit="images", amount=len(x), warmup=1, repeats=case["repeats"], quality=quality
    )


def _auto_attack(case: dict[str, Any], apply: Any, x: Any, y: Any) -> Any:
    key = jax.random.key(case["seed"])
    return auto_attack(key, apply, x, y, case["epsilon"], steps=case["steps"], queries=case["queries"]).x_adv


def nested(problem: Problem) -> Any:
    """Weights by path as the nested dictionaries that they were."""
    tree: dict[str, Any] = {}
    for name, value in problem.weights.items():
        *folders, leaf = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = jnp.asarray(value)
    return tree
