"""The tour's stop in adversarial robustness."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxalign.cli.attack_report import accuracies, pictures
from jaxalign.cli.classifiers import Classifier, network_of, save_classifier
from jaxalign.cli.named_attacks import KeptAttacks, evaluate, named_attacks
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_run import drawn_for_test, train
from jaxalign.interop.images import DIGITS, load_images
from jaxalign.robustness.ood import knn_score
from jaxalign.robustness.ood_metrics import auroc, detection_interval
from jaxalign.runtime.report import Report, estimate

LABELS = {"fgsm": "FGSM, one step", "pgd": "PGD, 40 steps", "auto_attack": "AutoAttack"}
EPSILON, STEPS, EXAMPLES, PICTURES, NEIGHBOURS = 0.15, 400, 100, 8, 5


def adversarial_training(report: Report, console: Console, out: Path) -> None:
    """A classifier of digits trained on attacked images stands where a plain one falls."""
    try:
        images = load_images(DIGITS)
    except ImportError as reason:
        report.text(f"Not measured: {reason}")
        return
    x, y = drawn_for_test(images, EXAMPLES, 0)
    attacks = named_attacks(LABELS, norm="linf", console=console)
    classifier: Classifier | None = None
    found = {}
    for method in ("plain", "pgd"):
        job = RobustTrain(
            out=out / f"digits-{method}", method=method, epsilon=EPSILON, network="mlp", hidden=(64,), steps=STEPS,
            learning_rate=5e-3,
        )  # fmt: skip
        description, params, _ = train(job, images, console)
        save_classifier(job.out, description, params)
        classifier = classifier or Classifier(network_of(description), None)
        classifier.params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), params)
        kept = KeptAttacks(job.out / "attacks")
        evaluation = evaluate(
            jax.random.key(0), classifier, x, y, attacks, (EPSILON,), kept=kept, batch_size=EXAMPLES, console=console
        )
        clean = (evaluation.clean_accuracy, *evaluation.clean_interval)
        found[method] = [estimate(*triple) for triple in (clean, *(accuracies(evaluation)[name][0] for name in LABELS))]
        if method == "plain":
            fallen = kept.found(x)
            seen = classifier.classes(fallen.x_adv)
    report.text(
        f"Two small networks, {STEPS} steps each on {len(images.x_train):,} 8x8 digits. An attack may change every "
        f"pixel by {EPSILON:g}, where black is 0 and white 1."
    )
    report.table(
        ["attack", "trained on clean images", "trained on attacked images"],
        [list(row) for row in zip(("none", *LABELS.values()), found["plain"], found["pgd"], strict=True)],
        caption=f"Share of {len(y)} test images still right, with 95% Wilson intervals over images.",
    )
    pictures(report, out / "digits-plain", x, y, fallen, seen, count=PICTURES)
    report.text(_shift(images.x_train, images.x_test))


def _shift(x_train: Any, x_test: Any) -> str:
    """How well a distance tells images of another kind."""

    @jax.jit
    def measured(train: Any, test: Any, mirrored: Any) -> Any:
        scores = [knn_score(train, some, k=NEIGHBOURS) for some in (test, mirrored)]
        return auroc(*scores), *detection_interval(jax.random.key(0), *scores)

    flat = [some.reshape(len(some), -1) for some in (x_train, x_test, x_test[:, :, ::-1])]
    return (
        f"Digits seen in a mirror are told from real ones by their distance to the {NEIGHBOURS}th nearest image "
        f"trained on: area under the ROC curve {estimate(*measured(*flat))} (95% bootstrap interval; chance is 0.5)."
    )
