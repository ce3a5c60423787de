"""The tour's stop in certified robustness."""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign.cli.attack_report import INTERVAL, draw
from jaxalign.cli.certify import Certify
from jaxalign.cli.certify_report import both_accuracies
from jaxalign.cli.certify_run import hold_against_attacks
from jaxalign.cli.classifiers import Classifier, network_of, save_classifier
from jaxalign.cli.image_certificates import certify
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_run import drawn_for_test, train
from jaxalign.interop.images import DIGITS, load_images
from jaxalign.runtime.certification_figures import certified_and_attacked
from jaxalign.runtime.report import Report, estimate

METHODS: dict[Literal["plain", "ibp"], str] = {"plain": "clean images", "ibp": "bounds"}
EPSILON, STEPS, EXAMPLES = 0.1, 800, 100
EPSILONS = (0.025, 0.05, 0.1, 0.15)


def certificates(report: Report, console: Console, out: Path) -> None:
    """What is proven of a network lies below what attacks leave of it, and training narrows the gap."""
    try:
        images = load_images(DIGITS)
    except ImportError as reason:
        report.text(f"Not measured: {reason}")
        return
    x, y = drawn_for_test(images, EXAMPLES, 0)
    classifier: Classifier | None = None
    found = {}
    for method in METHODS:
        plan = RobustTrain(
            out=out / f"certified-{method}", method=method, epsilon=EPSILON, network="mlp", hidden=(64,), steps=STEPS,
            learning_rate=5e-3,
        )  # fmt: skip
        description, params, _ = train(plan, images, console)
        save_classifier(plan.out, description, params)
        classifier = classifier or Classifier(network_of(description), None)
        classifier.params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params)
        job = Certify(out=plan.out / "certify", epsilons=EPSILONS, batch_size=EXAMPLES)
        checked = hold_against_attacks(job, classifier, x, y, certify(job, classifier, x, y, console), console)
        clean = np.array([checked.evaluation.clean_accuracy, *checked.evaluation.clean_interval])[None]
        found[method] = [np.concatenate([clean, side]) for side in both_accuracies(checked)]
    report.text(
        f"Two small networks, {STEPS} steps each on {len(images.x_train):,} 8x8 digits: one on clean images, one on "
        "interval bounds of its worst case. An image is certified at epsilon if CROWN's linear bounds prove that no "
        "change of its pixels by up to epsilon, where black is 0 and white 1, alters its class; it is attacked in vain "
        "if PGD finds no such change. The truth lies between."
    )
    sides = [side for method in METHODS for side in found[method]]
    names = [f"{label}: {side}" for label in METHODS.values() for side in ("certified", "attacked in vain")]
    radii = np.array([0.0, *EPSILONS])
    rows = [[f"{e:g}", *(estimate(*side[i]) for side in sides)] for i, e in enumerate(radii)]
    caption = f"Share of {len(y)} test images, with {INTERVAL}. No attack won inside a certificate."
    report.table(["epsilon", *names], rows, caption=caption)
    figure = certified_and_attacked(radii, *found["ibp"])
    draw(report, figure, out / "certified.png", f"The network trained on bounds, with {INTERVAL}.")
