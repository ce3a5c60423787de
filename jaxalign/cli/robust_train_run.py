"""What `jaxalign robust-train` does: train every seed under `fit`, keep the networks, attack them, report."""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from rich.console import Console

from jaxalign import Algorithm, Network, gradient_algorithm, replicate
from jaxalign.certification.certified_training import METHODS as CERTIFIED
from jaxalign.certification.certified_training import certified_training
from jaxalign.certification.margins import certified_accuracy_curve
from jaxalign.cli.attack_report import Attacked
from jaxalign.cli.classifiers import Classifier, Description, network_of, save_classifier
from jaxalign.cli.named_attacks import Found, KeptAttacks, evaluate, named_attacks
from jaxalign.cli.ppo_run import use_all_cores
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_report import Measured, write_report
from jaxalign.interop.images import Images, batches, load_images
from jaxalign.robustness.adversarial_training import accuracy, adversarial_training
from jaxalign.robustness.attack_losses import cross_entropy
from jaxalign.robustness.evaluation import RobustnessEvaluation
from jaxalign.robustness.fast_adversarial_training import fast_adversarial_training, free_adversarial_training
from jaxalign.robustness.gradient_masking import GradientMaskingReport, gradient_masking
from jaxalign.robustness.labelled_batch import LabelledBatch
from jaxalign.robustness.pgd import pgd
from jaxalign.robustness.trades import trades
from jaxalign.runtime import fit
from jaxalign.types import Array, Key, Metrics, Params

PEAKS = {"adam": 2e-3, "sgd": 0.1}
RISE = 0.05  # share of training over which the learning rate rises
CURVE = (1 / 3, 2 / 3, 1.0, 4 / 3)  # times epsilon
MARGIN = 1.1  # times epsilon, the default radius of training on bounds
MASKING = 200  # images on which masked gradients are looked for
AT_ONCE = 500  # images attacked side by side
SPREAD = 1000  # between the orders of two runs, more than a run has seeds


def run(options: RobustTrain, console: Console) -> dict[str, Any]:
    """The whole job; returns what was measured."""
    check(options)
    images = chosen(load_images(options.data, held_out=options.held_out, seed=options.seed), options)
    description, params, metrics = train(options, images, console)
    console.print(f"The network is in {save_classifier(options.out, description, params)}")
    measured = measure(options, images, description, params, console)
    report, results = write_report(options, images, metrics, measured)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def chosen(images: Images, options: RobustTrain) -> Images:
    """`options.limit` of the training images, drawn at random and kept in order."""
    if options.limit is None or options.limit >= len(images.x_train):
        return images
    rows = np.random.default_rng(options.seed).permutation(len(images.x_train))[: options.limit]
    rows.sort()
    return images._replace(x_train=images.x_train[rows], y_train=images.y_train[rows])


def train(options: RobustTrain, images: Images, console: Console) -> tuple[Description, Params, dict[str, np.ndarray]]:
    """The network's description, parameters with leaves [seeds, ...], and metrics [T, seeds]."""
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    use_all_cores()
    description = described(options, images)
    steps = options.steps // (options.replays if options.method == "free" else 1)
    console.print(
        f"{images.name}: {len(images.x_train):,} images to train on, {len(images.x_test):,} to test; "
        f"{options.seeds} x {options.network}, {options.method}, {steps:,} batches of {options.batch_size}"
    )
    state, metrics = fit(
        _lanes(algorithm_of(options, _network(options, description), images), options.seeds),
        jax.random.key(options.seed),
        _batches(options, images),
        steps=steps,
        directory=options.out,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        fingerprint=_fingerprint(options, images),
        progress=console,
    )
    return description, jax.device_get(state.params), metrics


def described(options: RobustTrain, images: Images) -> Description:
    """The network that the options ask for."""
    return Description(
        options.network, options.channels, options.kernel, options.hidden, images.x_train.shape[1:], images.num_classes,
        options.data, options.held_out, options.seed,
    )  # fmt: skip


def _network(options: RobustTrain, description: Description) -> Network:
    """The network as the method trains it fastest: see `certified_training`."""
    alone = options.method in ("ibp", "sabr") and options.seeds == 1  # in the loop over seeds XLA's own are slow
    return network_of(description, jax.lax.conv_general_dilated) if alone else network_of(description)


def algorithm_of(options: RobustTrain, network: Network, images: Images) -> Algorithm:
    """The Algorithm that the options ask for."""
    steps, method, norm = options.steps, options.method, options.norm
    peak = options.learning_rate or PEAKS[options.optimizer]
    rate = optax.warmup_cosine_decay_schedule(peak / 10, peak, max(1, round(RISE * steps)), max(2, steps))
    optimizer = optax.adam(rate) if options.optimizer == "adam" else optax.sgd(rate, 0.9, nesterov=True)
    if method == "plain":
        return gradient_algorithm(network, functools.partial(_plain, network), optimizer)
    if method in CERTIFIED:
        radius, size = options.train_epsilon or MARGIN * options.epsilon, options.attack_step_size
        return certified_training(
            network, optimizer, method=method, epsilon=radius, kappa=options.kappa, warm_up=options.natural * steps,
            ramp=options.warm_up * steps, share=options.sabr_share, attack_steps=options.attack_steps,
            attack_step_size=0.5 if size is None else size / radius,
        )  # fmt: skip
    growing = round(options.warm_up * (steps // options.replays if method == "free" else steps))
    epsilon = optax.linear_schedule(0.0, options.epsilon, growing) if growing else options.epsilon
    size = options.attack_step_size
    shared: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "step_size": size}
    match method:
        case "trades":
            return trades(network, optimizer, beta=options.trades_beta, steps=options.attack_steps, **shared)
        case "fast":
            return fast_adversarial_training(network, optimizer, clean_weight=options.clean_weight, **shared)
        case "free":
            example = jnp.zeros((options.batch_size, *images.x_train.shape[1:]))
            return free_adversarial_training(network, optimizer, example, replays=options.replays, **shared)
        case _:
            attack = functools.partial(pgd, norm=norm, steps=options.attack_steps, step_size=size)
            return adversarial_training(
                network, optimizer, attack=attack, epsilon=epsilon, clean_weight=options.clean_weight
            )


def _plain(network: Network, params: Params, batch: LabelledBatch, key: Key) -> tuple[Array, Metrics]:
    logits = network.apply(params, batch.x)
    return cross_entropy(logits, batch.y).mean(), {"accuracy": accuracy(logits, batch.y)}


def _lanes(algorithm: Algorithm, seeds: int) -> Algorithm:
    """All seeds as one Algorithm: on a CPU one after another on each core, as they would crowd each other's cache."""
    mode = "map" if jax.default_backend() == "cpu" else "vmap"
    devices = math.gcd(jax.device_count(), seeds)
    mesh = jax.make_mesh((devices,), ("sweep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    copies = replicate(algorithm, seeds, mode=mode, mesh=mesh)
    return Algorithm(jax.jit(copies.init), _alone(algorithm).step if seeds == 1 else copies.step)


def _alone(algorithm: Algorithm) -> Algorithm:
    """One lane [1, ...] without the loop over lanes, in which XLA's convolutions are slow."""

    def step(state: Any, batch: Any) -> tuple[Any, Metrics]:
        found = algorithm.step(*jax.tree.map(lambda leaf: leaf[0], (state, batch)))
        return jax.tree.map(lambda leaf: leaf[None], found)

    return Algorithm(algorithm.init, step)


def _batches(options: RobustTrain, images: Images) -> Any:
    """`step -> LabelledBatch` with leaves [seeds, B, ...], each seed in an order of its own."""
    seeds = (SPREAD * options.seed + lane for lane in range(options.seeds))
    orders = [batches(images, batch_size=options.batch_size, seed=seed) for seed in seeds]
    return lambda step: jax.tree.map(lambda *x: np.stack(x), *(order(step) for order in orders))


def measure(
    options: RobustTrain, images: Images, description: Description, params: Params, console: Console
) -> list[Measured]:
    """What each seed's network withstands."""
    x, y = drawn_for_test(images, options.evaluate, options.seed)
    classifier = Classifier(network_of(description), None)  # one for all seeds, so that an attack is compiled once
    found = []
    for lane in range(options.seeds):
        console.print(f"Attacking the network of seed {lane}")
        classifier.params = jax.tree.map(lambda leaf, lane=lane: jnp.asarray(leaf[lane]), params)
        found.append(_measure_one(options, classifier, x, y, console))
    return found


def _measure_one(
    options: RobustTrain, classifier: Classifier, x: np.ndarray, y: np.ndarray, console: Console
) -> Measured:
    key, kept = jax.random.key(options.seed), KeptAttacks(options.out / "attacks")
    shared: dict[str, Any] = {"kept": kept, "batch_size": AT_ONCE, "console": console}
    gradient = named_attacks(("fgsm", "pgd"), norm=options.norm, console=console, steps=options.evaluation_steps)
    evaluation = evaluate(key, classifier, x, y, gradient, epsilons_of(options), **shared)
    found = kept.found(x)
    strongest, few = None, options.auto_attack
    if few:
        ensemble = named_attacks(("auto_attack",), norm=options.norm, console=console)
        strongest = evaluate(key, classifier, x[:few], y[:few], ensemble, (options.epsilon,), **shared)
    met = attacked(key, classifier, x, y, evaluation, found, options.epsilon, norm=options.norm)
    return Measured(met, strongest, certified(options, classifier, x, y))


def certified(options: RobustTrain, classifier: Classifier, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """[E, B] bool: which images no change up to each epsilon can get wrong; None where bounds were not trained on.

    By the bounds trained on; by CROWN-IBP of "sabr", whose networks intervals bound badly.
    """
    if options.method not in CERTIFIED:
        return None
    method, epsilons = "crown-interval" if options.method == "sabr" else "interval", jnp.asarray(epsilons_of(options))
    parts = [slice(i, i + AT_ONCE) for i in range(0, len(x), AT_ONCE)]
    found = [certified_accuracy_curve(classifier, x[part], y[part], epsilons, method=method) for part in parts]
    return np.concatenate(found, axis=1)


def attacked(
    key: Key,
    classifier: Classifier,
    x: np.ndarray,
    y: np.ndarray,
    evaluation: RobustnessEvaluation,
    found: Found,
    epsilon: float,
    *,
    norm: str,
) -> Attacked:
    """The record for a report: what was found, what the classifier sees in it, and signs of masked gradients."""
    masking = _masking(key, classifier.network, classifier.params, x[:MASKING], y[:MASKING], epsilon, norm)
    return Attacked(x, y, evaluation, masking, found, classifier.classes(found.x_adv))


@functools.partial(jax.jit, static_argnums=(1, 6))
def _masking(
    key: Key, network: Network, params: Params, x: Array, y: Array, epsilon: Array, norm: str
) -> GradientMaskingReport:
    return gradient_masking(key, lambda x: network.apply(params, x), x, y, epsilon, norm=norm)


def drawn_for_test(images: Images, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` of the test images and their labels, drawn at random; all if there are fewer."""
    rows = np.random.default_rng(seed).permutation(len(images.x_test))[:count]
    return images.x_test[rows], images.y_test[rows]


def epsilons_of(options: RobustTrain) -> tuple[float, ...]:
    """The radii of the curve, rising, --epsilon among them."""
    asked = options.epsilons or tuple(share * options.epsilon for share in CURVE)
    return tuple(sorted({*asked, options.epsilon}))


def _fingerprint(options: RobustTrain, images: Images) -> dict[str, Any]:
    """What must be the same when training is resumed; the measurements may differ."""
    free = {"out", "resume", "checkpoint_every", "evaluate", "evaluation_steps", "epsilons", "auto_attack", "data"}
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    digest = hashlib.sha256(images.x_train.tobytes() + images.y_train.tobytes()).hexdigest()[:16]
    return {**fixed, "data": digest}


def check(options: RobustTrain) -> None:
    """Raises ValueError naming the option that makes no sense."""
    positive = ("steps", "batch_size", "attack_steps", "seeds", "evaluate", "evaluation_steps", "replays", "kernel")
    others = ("epsilon", "train_epsilon", "limit", "attack_step_size", "learning_rate", "checkpoint_every")
    for name in (*positive, *others):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("auto_attack", "trades_beta", "seed"):
        if not getattr(options, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(options, name)}")
    for name in ("warm_up", "clean_weight", "natural", "kappa", "sabr_share"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1], got {getattr(options, name)}")
    for name in ("epsilons", "channels", "hidden"):
        if any(value <= 0 for value in getattr(options, name)):
            raise ValueError(f"--{name} must be positive, got {getattr(options, name)}")
    if options.norm != "linf" and options.method in CERTIFIED:
        raise ValueError(f"--method {options.method} bounds changes of each pixel: it needs --norm linf")
    if options.norm == "l1" and options.auto_attack:
        raise ValueError("AutoAttack has no L1 version: with --norm l1 give --auto-attack 0")
    if options.method == "free" and options.steps < options.replays:
        raise ValueError(f"--steps {options.steps} is less than --replays {options.replays}")
