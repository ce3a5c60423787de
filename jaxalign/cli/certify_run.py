"""What `jaxalign certify` does: load or train a classifier, certify images in chunks, attack them, report."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign import Network
from jaxalign.cli.attack_run import loaded
from jaxalign.cli.certify import Certify
from jaxalign.cli.certify_report import Checked, write_failure, write_report
from jaxalign.cli.classifiers import Classifier, Description, network_of, save_classifier
from jaxalign.cli.image_certificates import Certificates, certify
from jaxalign.cli.named_attacks import BOUNDS, KeptAttacks, evaluate, named_attacks
from jaxalign.cli.ppo_run import use_all_cores
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_run import drawn_for_test, train
from jaxalign.interop.images import DIGITS, Images, load_images
from jaxalign.robustness.attack_losses import margins
from jaxalign.robustness.attack_result import AttackResult
from jaxalign.robustness.pgd import pgd
from jaxalign.runtime.certificate_check import BrokenCertificateError, check_certificates
from jaxalign.types import Array, Key, Params

EPSILONS = (0.05, 0.1, 0.15, 0.2)
OF_DEVIATION = (0.5, 1.0, 2.0, 3.0)  # of the noise; 10,000 copies reach 3.2 at most
TRAINING = {"method": "ibp", "epsilon": 0.1, "network": "mlp", "hidden": (64, 64), "steps": 1000}


def run(options: Certify, console: Console) -> Any:
    """The whole job; returns what was measured, of a property its Verdict."""
    options = dataclasses.replace(options, epsilons=options.epsilons or default_epsilons(options.smoothing))
    check(options)
    if options.onnx is not None or options.property is not None:
        return _one_property(options, console)
    if not options.resume and (options.out / "certificates").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    use_all_cores()
    images, description, params, about = _model(options, console)
    classifier = Classifier(network_of(description), jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params))
    x, y = drawn_for_test(images, options.images, options.seed)
    if options.smoothing is not None:
        from jaxalign.cli.certify_smoothing import certify_by_smoothing

        return certify_by_smoothing(options, classifier, x, y, about, console)
    certificates = certify(options, classifier, x, y, console)
    try:
        checked = hold_against_attacks(options, classifier, x, y, certificates, console)
    except BrokenCertificateError as error:
        write_failure(options, about, error)
        raise
    report, results = write_report(options, about, checked)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def hold_against_attacks(
    options: Certify, classifier: Classifier, x: np.ndarray, y: np.ndarray, certificates: Certificates, console: Console
) -> Checked:
    """Attack at every epsilon, and each image once more at its own radius.

    Raises BrokenCertificateError if an attack wins inside a certificate.
    """
    key, kept = jax.random.key(options.seed), KeptAttacks(options.out / "attacks")
    attacks = named_attacks(
        options.attacks, norm="linf", console=console, steps=options.steps, restarts=options.restarts
    )
    evaluation = evaluate(
        key, classifier, x, y, attacks, certificates.epsilons.tolist(), kept=kept,
        batch_size=options.batch_size, console=console,
    )  # fmt: skip
    x_adv = kept.found(x).x_adv
    margin = _margins(classifier.network, classifier.params, jnp.asarray(x_adv), jnp.asarray(y))
    found = AttackResult(x_adv, margin < 0, margin)
    edge = _attack_edges(key, classifier, x, y, certificates.radius, options)
    for attack in (found, edge):
        check_certificates(options.out, certificates.radius > 0, attack, x, y, certificates.radius)
    console.print(f"Self-check: no attack won inside a certificate ({int((certificates.radius > 0).sum())} attacked)")
    return Checked(
        x, y, certificates.epsilons, certificates.certified, certificates.radius, evaluation, certificates.seconds
    )


def _attack_edges(
    key: Key, classifier: Classifier, x: np.ndarray, y: np.ndarray, radius: np.ndarray, options: Certify
) -> AttackResult:
    """PGD in each image's own certified ball."""
    parts = []
    size = min(options.batch_size, len(y))
    for start in range(0, len(y), size):
        rows = np.resize(np.arange(start, min(start + size, len(y))), size)
        part = pgd(key, classifier, x[rows], y[rows], radius[rows], steps=options.steps, bounds=BOUNDS)
        parts.append(jax.tree.map(np.asarray, part))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: len(y)], *parts)


@functools.partial(jax.jit, static_argnums=0)
def _margins(network: Network, params: Params, x: Array, y: Array) -> Array:
    return margins(network.apply(params, x), y)


def _model(options: Certify, console: Console) -> tuple[Images, Description, Params, list[str]]:
    """The images, the classifier, and what is to be said about it."""
    if options.model is not None:
        return loaded(options.model, options.data)
    method: dict[str, Any] = dict(TRAINING)
    plan = RobustTrain(data=options.data or DIGITS, out=options.out / "trained", resume=options.resume, **method)
    images = load_images(plan.data, held_out=plan.held_out, seed=plan.seed)
    if options.smoothing is not None:
        from jaxalign.cli.certify_smoothing import train_on_noise

        about = [f"A small network, trained for {plan.steps:,} steps on noisy images."]
        return images, *train_on_noise(plan, options.smoothing, images, console), about
    description, params, _ = train(plan, images, console)
    save_classifier(plan.out, description, params)
    return images, description, params, [
        f"A small network (dense layers of {', '.join(str(n) for n in plan.hidden)}), trained in {plan.steps:,} steps "
        f"on interval bounds at epsilon {plan.epsilon:g} so that it can be certified."
    ]  # fmt: skip


def _one_property(options: Certify, console: Console) -> Any:
    """One question about one ONNX network; its Verdict."""
    if options.onnx is None or options.property is None:
        raise ValueError("--onnx and --property go together: a network, and what is to be proven of it")
    from jaxalign.cli.certify_property import certify_property

    return certify_property(
        options.onnx,
        options.property,
        time_limit=options.time_limit,
        seed=options.seed,
        out=options.out,
        console=console,
    )


def default_epsilons(smoothing: float | None) -> tuple[float, ...]:
    """Radii in pixel values, or for a vote over noise of this deviation in L2."""
    return EPSILONS if smoothing is None else tuple(share * smoothing for share in OF_DEVIATION)


def check(options: Certify) -> None:
    """Raises ValueError naming the option that makes no sense."""
    for name in ("images", "steps", "restarts", "batch_size", "pictures", "samples", "time_limit", "smoothing"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if not options.attacks:
        raise ValueError("--attacks needs at least one: certificates are always held against an attack")
    if len(set(options.epsilons)) < len(options.epsilons) or not all(0 < e < np.inf for e in options.epsilons):
        raise ValueError(f"--epsilons must be positive, finite and differ, got {options.epsilons}")
    if not 0 < options.failure < 1:
        raise ValueError(f"--failure is a probability in (0, 1), got {options.failure}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
