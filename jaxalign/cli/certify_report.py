"""The tables, pictures and files in which `jaxalign certify` says what it found."""

import json
from typing import Any, NamedTuple

import numpy as np

from jaxalign.cli.attack_report import INTERVAL, draw
from jaxalign.cli.certify import Certify
from jaxalign.robustness.evaluation import RobustnessEvaluation
from jaxalign.runtime.certificate_check import BrokenCertificateError
from jaxalign.runtime.certification_figures import certified_and_attacked, radius_histogram
from jaxalign.runtime.image_grid import image_grid
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import wilson_interval


class Checked(NamedTuple):
    """B test images, their certificates and what attacks made of them.

    x [B, H, W, C], y [B]; epsilons [E], rising; certified [E, B] bool; radius [B]; evaluation of the attacks at the
    same epsilons; seconds [chunks] of certifying
    """

    x: np.ndarray
    y: np.ndarray
    epsilons: np.ndarray
    certified: np.ndarray
    radius: np.ndarray
    evaluation: RobustnessEvaluation
    seconds: np.ndarray


def shares(held: np.ndarray) -> np.ndarray:
    """[E, 3], the share of `held` [E, B] with the ends of its Wilson interval."""
    low, high = wilson_interval(held.sum(axis=1), held.shape[1])
    return np.stack([held.mean(axis=1), np.asarray(low), np.asarray(high)], axis=1)


def both_accuracies(checked: Checked) -> tuple[np.ndarray, np.ndarray]:
    """(certified, attacked) [E, 3]: value, low, high. No attack may have broken what is certified."""
    found = checked.evaluation
    attacked = np.concatenate([found.worst_case_accuracy[:, None], found.worst_case_interval], axis=1)
    return shares(checked.certified), attacked


def write_report(options: Certify, about: list[str], checked: Checked) -> tuple[Report, dict[str, Any]]:
    """Write results.json, certificates.npz, report.html and PNGs; return the Report, to be printed, and the results."""
    found = checked.evaluation
    clean = [float(v) for v in (found.clean_accuracy, *found.clean_interval)]
    certified, attacked = both_accuracies(checked)
    results = results_of(options, checked)
    report = Report(f"Certificates of {options.model or 'a network trained for them'}")
    for paragraph in about:
        report.text(paragraph)
    report.text(
        f"{len(checked.y)} test images, {estimate(*clean)} of them right as they are. An image is **certified** at "
        f"epsilon if bounds ({options.method}) prove that no change of its pixels by up to epsilon, with black 0 and "
        f"white 1, alters its class; it is **attacked** in vain if {' and '.join(options.attacks)} found no such "
        "change. The truth lies between: no attack can push accuracy below the first number, and no proof can lift it "
        "above the second."
    )
    accuracy_table(report, checked)
    figure = certified_and_attacked(
        np.concatenate([[0.0], checked.epsilons]), np.stack([clean, *certified]), np.stack([clean, *attacked])
    )
    draw(report, figure, options.out / "certified.png", f"Accuracy against epsilon, with {INTERVAL}.")
    report.text("## How far certificates reach")
    report.text(_radius_text(checked))
    figure = radius_histogram(checked.radius, maximum=float(checked.epsilons[-1]))
    caption = (
        f"The certified radius of each image, looked for up to {checked.epsilons[-1]:g}; grey: wrong or without proof."
    )
    draw(report, figure, options.out / "radius.png", caption)
    pictures(report, options, checked)
    report.text("## Self-check")
    report.text(
        f"Each of the {results['self_check']['attacked']} certified images was attacked at every epsilon and at its "
        "own radius. No attack won inside a certificate. (One that does ends the run as an error, and its image is "
        "kept.)"
    )
    report.text(f"Certifying took {results['seconds']:.1f} s, compilation included.")
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    np.savez_compressed(
        options.out / "certificates.npz", x=checked.x, y=checked.y, epsilons=checked.epsilons,
        certified=checked.certified, radius=checked.radius,
    )  # fmt: skip
    return report, results


def results_of(options: Certify, checked: Checked) -> dict[str, Any]:
    """What was measured, in plain numbers."""
    certified, attacked = both_accuracies(checked)
    names = [f"{epsilon:g}" for epsilon in checked.epsilons]
    held = checked.radius[checked.radius > 0]
    return {
        "images": len(checked.y),
        "method": options.method,
        "attacks": list(options.attacks),
        "clean": [float(v) for v in (checked.evaluation.clean_accuracy, *checked.evaluation.clean_interval)],
        "certified": dict(zip(names, certified.tolist(), strict=True)),
        "attacked": dict(zip(names, attacked.tolist(), strict=True)),
        "median_radius": float(np.median(held)) if held.size else None,
        "self_check": {"attacked": int(held.size), "contradictions": 0},
        "seconds": float(checked.seconds.sum()),
    }


def accuracy_table(report: Report, checked: Checked) -> None:
    """Epsilon by epsilon: certified, attacked, and the images of which neither is known."""
    certified, attacked = both_accuracies(checked)
    rows = [
        [f"{epsilon:g}", estimate(*low), estimate(*high), f"{(high[0] - low[0]) * len(checked.y):.0f}"]
        for epsilon, low, high in zip(checked.epsilons, certified, attacked, strict=True)
    ]
    caption = f"Share of {len(checked.y)} images, with {INTERVAL}; the gap in images."
    report.table(["epsilon", "certified", "attacked", "gap"], rows, caption=caption)


def _radius_text(checked: Checked) -> str:
    held = checked.radius[checked.radius > 0]
    if not held.size:
        return (
            "No image has a certificate: the bounds are too loose for this network. Try a tighter --method, smaller "
            "--epsilons, or a network trained for certificates."
        )
    return (
        f"Of the {held.size} images with a certificate the median reaches {np.median(held):.3g}, the least certain "
        f"{held.min():.3g}; {int((held >= checked.epsilons[-1]).sum())} reach the largest epsilon."
    )


def pictures(report: Report, options: Certify, checked: Checked) -> None:
    """certificates.png: the images whose certificates reach least far, and those whose reach farthest."""
    held = np.flatnonzero(checked.radius > 0)
    count = min(options.pictures, len(held))
    if not count:
        return
    order = held[np.argsort(checked.radius[held], kind="stable")]
    chosen = {"least far": order[:count], "farthest": order[-count:]}
    for name, rows in chosen.items():
        titles = [f"{checked.y[i]}\n{checked.radius[i]:.3g}" for i in rows]
        path = options.out / f"{name.replace(' ', '-')}.png"
        caption = f"Images whose certificates reach {name}: their class and radius."
        draw(report, image_grid({name: checked.x[rows]}, titles=titles), path, caption)


def write_failure(options: Certify, about: list[str], error: BrokenCertificateError) -> None:
    """A report.html and results.json that say nothing but that a certificate was broken."""
    report = Report("A certificate is broken")
    for paragraph in (*about, f"**{error}**"):
        report.text(paragraph)
    report.write(options.out / "report.html")
    results = {"self_check": {"contradictions": len(error.rows), "rows": error.rows.tolist(), "file": str(error.path)}}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
