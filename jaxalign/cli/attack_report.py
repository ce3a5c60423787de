"""The tables, pictures and files in which `jaxalign attack` says what it found."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.cli.attack import Attack
from jaxalign.cli.named_attacks import Found
from jaxalign.robustness.evaluation import RobustnessEvaluation
from jaxalign.robustness.gradient_masking import EXPECTED, GradientMaskingReport
from jaxalign.runtime.image_grid import image_grid
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.robustness_figures import robustness_curves

WORST = "worst case"
MOST_CLASSES = 12  # of a whole confusion table; beyond that its most frequent pairs
PAIRS = 15
INTERVAL = "95% Wilson intervals over images"


class Attacked(NamedTuple):
    """N test images and what became of them.

    x [N, H, W, C], y [N]; evaluation and masking of them; found: the adversarial images; predicted [N]: the class that
    the classifier sees in those
    """

    x: np.ndarray
    y: np.ndarray
    evaluation: RobustnessEvaluation
    masking: GradientMaskingReport
    found: Found
    predicted: np.ndarray


def write_report(options: Attack, about: list[str], attacked: Attacked) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and PNG pictures; return the Report, to be printed, and what was measured."""
    evaluation, found = attacked.evaluation, attacked.found
    clean = [float(v) for v in (evaluation.clean_accuracy, *evaluation.clean_interval)]
    results: dict[str, Any] = {
        "examples": len(attacked.y),
        "norm": options.norm,
        "clean": clean,
        "accuracy": {
            name: {f"{e:g}": triple for e, triple in zip(evaluation.epsilons.tolist(), triples.tolist(), strict=True)}
            for name, triples in accuracies(evaluation).items()
        },
        "median_smallest_epsilon": _number(evaluation.median_smallest_epsilon),
        "masking": masking_results(attacked.masking),
    }
    report = Report(f"Attacks on {options.model or 'a plain classifier'}")
    for paragraph in about:
        report.text(paragraph)
    report.text(
        f"{len(attacked.y)} test images, {estimate(*clean)} of them right without an attack. Epsilon is the most that "
        f"{'a pixel' if options.norm == 'linf' else 'an image'} may change ({options.norm}), with black 0 and white 1."
    )
    accuracy_table(report, evaluation)
    chance = float(np.bincount(attacked.y).max() / len(attacked.y))
    curve(report, options.out, evaluation, norm=options.norm, chance=chance)
    pictures(report, options.out, attacked.x, attacked.y, found, attacked.predicted, count=options.pictures)
    results["confusion"] = confusion(report, attacked)
    masking_section(report, attacked.masking)
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    np.savez_compressed(
        options.out / "adversarial.npz", x=attacked.x, y=attacked.y, predicted=attacked.predicted, **found._asdict()
    )
    return report, results


def accuracies(evaluation: RobustnessEvaluation) -> dict[str, np.ndarray]:
    """[E, 3] value, low, high by attack, and of the worst case where there are several attacks."""
    robust = np.concatenate([evaluation.robust_accuracy[..., None], evaluation.robust_interval], axis=-1)
    found = dict(zip(evaluation.attacks, robust, strict=True))
    if len(found) > 1:
        worst = evaluation.worst_case_accuracy[:, None], evaluation.worst_case_interval
        found[WORST] = np.concatenate(worst, axis=-1)
    return found


def accuracy_table(report: Report, evaluation: RobustnessEvaluation) -> None:
    """Attack x epsilon."""
    report.table(
        ["attack", *(f"epsilon {e:g}" for e in evaluation.epsilons)],
        [[name, *(estimate(*triple) for triple in triples)] for name, triples in accuracies(evaluation).items()],
        caption=f"Share of the images still right, with {INTERVAL}. {WORST.capitalize()}: those that no attack broke.",
    )


def curve(report: Report, out: Path, evaluation: RobustnessEvaluation, *, norm: str, chance: float) -> None:
    """robustness.png, also in the report."""
    order = np.argsort(evaluation.epsilons)
    figure = robustness_curves(
        evaluation.epsilons[order],
        {name: triples[order] for name, triples in accuracies(evaluation).items()},
        clean=float(evaluation.clean_accuracy),
        chance=chance,
        worst=WORST,
        norm=norm,
    )
    caption = f"Accuracy against epsilon, with {INTERVAL}. Chance: always the commonest class."
    draw(report, figure, out / "robustness.png", caption)


def pictures(
    report: Report, out: Path, x: np.ndarray, y: np.ndarray, found: Found, predicted: np.ndarray, *, count: int
) -> None:
    """worst.png and median.png: the images that fell at the smallest epsilon, and those in the middle."""
    fallen = np.flatnonzero(np.isfinite(found.epsilon))
    if not fallen.size:
        report.text("No attack broke an image that was right: there is nothing to draw.")
        return
    order = fallen[np.lexsort((found.margin[fallen], found.epsilon[fallen]))]
    middle = max(0, (len(order) - count) // 2)
    chosen = {"worst": order[:count], "median": order[middle : middle + count]}
    said = {"worst": "The images that fell at the smallest epsilon, by the widest margin", "median": "Those halfway"}
    for name, rows in chosen.items():
        before, after = x[rows], found.x_adv[rows]
        figure = image_grid(
            {"clean": before, "perturbation": after - before, "adversarial": after},
            titles=[f"{y[i]} -> {predicted[i]}\n{found.attack[i]}\n{found.epsilon[i]:g}" for i in rows],
            signed=("perturbation",),
        )
        caption = f"{said[name]}: true class -> class seen, the attack and its epsilon."
        draw(report, figure, out / f"{name}.png", caption)


def confusion(report: Report, attacked: Attacked) -> list[list[int]]:
    """Counts [C, C] of true class (row) seen as another (column), over the images that fell."""
    fallen = np.isfinite(attacked.found.epsilon)
    classes = int(max(attacked.y.max(), attacked.predicted.max())) + 1
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (attacked.y[fallen], attacked.predicted[fallen]), 1)
    if not fallen.any():
        return counts.tolist()
    caption = f"What the {fallen.sum()} images that fell are taken for, each at the smallest epsilon that broke it."
    if classes <= MOST_CLASSES:
        rows = [[f"{i}", *(str(n) if n else "" for n in row)] for i, row in enumerate(counts)]
        report.table(["true class", *(f"as {j}" for j in range(classes))], rows, caption=caption)
    else:
        largest = np.argsort(-counts, axis=None, kind="stable")[:PAIRS]
        pairs = [divmod(int(place), classes) for place in largest]
        rows = [[f"{i}", f"{j}", str(counts[i, j])] for i, j in pairs if counts[i, j]]
        report.table(["true class", "taken for", "images"], rows, caption=f"{caption} The most frequent pairs.")
    return counts.tolist()


def masking_section(report: Report, masking: GradientMaskingReport) -> None:
    """Signs that gradients are masked, and what each should be."""
    report.text("## Signs of masked gradients")
    rows = []
    for name, expected in EXPECTED.items():
        odd = bool(getattr(masking.suspicious, name))
        rows.append([name.replace("_", " "), estimate(getattr(masking, name)), expected, "suspicious" if odd else ""])
    report.table(
        ["sign", "found", "expected", ""],
        rows,
        caption="A network that only hides its gradients seems robust to attacks that follow them. No sign is proof: "
        "the black box may win on a network that is honestly unsure, because the cross-entropy that PGD climbs blends "
        "all wrong classes. Neither is the absence of signs.",
    )


def masking_results(masking: GradientMaskingReport) -> dict[str, Any]:
    """Each sign as a number, and the names of the suspicious ones."""
    found: dict[str, Any] = {name: _number(getattr(masking, name)) for name in EXPECTED}
    return found | {"suspicious": [name for name in EXPECTED if bool(getattr(masking.suspicious, name))]}


def draw(report: Report, figure: Any, path: Path, caption: str) -> None:
    """A Figure drawn once, as a file and in the report."""
    figure.savefig(path)
    report.figure(path.read_bytes(), caption)


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
