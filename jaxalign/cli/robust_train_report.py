"""The tables, pictures and files in which `jaxalign robust-train` says what the networks withstand."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.cli.attack_report import (
    Attacked,
    accuracies,
    accuracy_table,
    curve,
    draw,
    masking_results,
    masking_section,
    pictures,
)
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.interop.images import Images
from jaxalign.robustness.evaluation import RobustnessEvaluation
from jaxalign.runtime.figures import curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.robustness_figures import robustness_curves
from jaxalign.statistics import bootstrap_interval, wilson_interval

PICTURES, FEWEST_SEEDS = 8, 4
DRAWN = (
    "loss", "natural_loss", "robust_loss", "adversarial_accuracy", "accuracy", "certified_accuracy", "box_accuracy",
    "epsilon", "kappa", "gradient_norm", "divergence",
)  # fmt: skip
UNITS = dict.fromkeys(("loss", "natural_loss", "robust_loss", "divergence"), "nats") | {"epsilon": "input units"}


class Measured(NamedTuple):
    """One network: attacked by FGSM and PGD at every epsilon, and by AutoAttack on fewer images (None: left out).

    certified: bool [E, N], which images are proved to be right whatever the change, or None
    """

    attacked: Attacked
    strongest: RobustnessEvaluation | None
    certified: np.ndarray | None = None


def write_report(
    options: RobustTrain, images: Images, metrics: dict[str, np.ndarray], measured: list[Measured]
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and PNG pictures; return the Report, to be printed, and what was measured.

    metrics: [T, seeds] by name.
    """
    numbers = [headline(options, one) for one in measured]
    results: dict[str, Any] = {"epsilon": options.epsilon, "norm": options.norm, "method": options.method}
    results["seeds"] = [
        found | {"curve": _curve(one), "masking": masking_results(one.attacked.masking)}
        for found, one in zip(numbers, measured, strict=True)
    ]
    results |= over_seeds(numbers, options.seed)
    if options.seeds == 1:
        metrics = {name: values[:, 0] for name, values in metrics.items()}
    report = Report(f"Robust training on {images.name}")
    report.text(
        f"{options.method} at epsilon {options.epsilon:g} ({options.norm}, black 0 and white 1), {options.network}, "
        f"{len(metrics['loss']):,} batches of {options.batch_size} out of {len(images.x_train):,} images. Tested on "
        f"{len(measured[0].attacked.y):,} images it has not seen."
    )
    rows = [
        [str(seed), *(estimate(*(triple or (None,))) for triple in found.values())]
        for seed, found in enumerate(numbers)
    ]
    if len(measured) > 1:
        rows.append(["mean", *(estimate(*(results[name] or (None,))) for name in numbers[0])])
    strongest = measured[0].strongest
    fewer = "" if strongest is None else f"; AutoAttack on {strongest.broken.shape[-1]}"
    report.table(
        ["seed", "clean", "FGSM", f"PGD-{options.evaluation_steps}", "AutoAttack", "certified"],
        rows,
        caption=f"Share right at epsilon {options.epsilon:g}, with 95% Wilson intervals over images{fewer}. Mean: "
        f"with 95% bootstrap intervals over seeds, from {FEWEST_SEEDS} seeds on.",
    )
    first = measured[0].attacked
    report.text("## Of the first seed" if len(measured) > 1 else "## Accuracy against epsilon")
    accuracy_table(report, first.evaluation)
    chance = float(np.bincount(first.y).max() / len(first.y))
    if measured[0].certified is None:
        curve(report, options.out, first.evaluation, norm=options.norm, chance=chance)
    else:
        _certified_curve(report, options, measured[0], chance)
    pictures(report, options.out, first.x, first.y, first.found, first.predicted, count=PICTURES)
    masking_section(report, first.masking)
    report.text("## Training")
    figure = curves(metrics, [name for name in DRAWN if name in metrics], units=UNITS, horizontal="batches")
    draw(report, figure, options.out / "training.png", "On the batches trained on, attacked or bounded as in training.")
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return report, results


def headline(options: RobustTrain, one: Measured) -> dict[str, list[float] | None]:
    """[value, low, high] at --epsilon: clean, fgsm, pgd, auto_attack and certified (None where they were left out)."""
    evaluation = one.attacked.evaluation
    place = int(np.argmin(np.abs(evaluation.epsilons - options.epsilon)))
    found: dict[str, list[float] | None] = {
        "clean": [float(v) for v in (evaluation.clean_accuracy, *evaluation.clean_interval)]
    }
    found |= {name: accuracies(evaluation)[name][place].tolist() for name in evaluation.attacks}
    found["auto_attack"] = None if one.strongest is None else accuracies(one.strongest)["auto_attack"][0].tolist()
    found["certified"] = None if one.certified is None else certified_shares(one.certified)[place].tolist()
    return found


def over_seeds(numbers: list[dict[str, list[float] | None]], seed: int) -> dict[str, list[Any] | None]:
    """[mean over seeds, low, high] with 95% bootstrap intervals, None for fewer than four; of one seed its own numbers.

    Two or three numbers that happen to be alike would give an interval of hardly any width.
    """
    if len(numbers) == 1:
        return dict(numbers[0])
    measured = [name for name, triple in numbers[0].items() if triple is not None]
    scores = np.array([[found[name][0] for name in measured] for found in numbers])  # type: ignore[index]
    low: list[Any] = [None] * len(measured)
    high = low
    if len(numbers) >= FEWEST_SEEDS:
        low, high = (end.tolist() for end in jax.jit(bootstrap_interval)(jax.random.key(seed), scores))
    triples = [list(triple) for triple in zip(scores.mean(axis=0).tolist(), low, high, strict=True)]
    return dict.fromkeys(numbers[0]) | dict(zip(measured, triples, strict=True))


def certified_shares(certified: np.ndarray) -> np.ndarray:
    """[E, 3]: the share certified of N images, bool [E, N], with its 95% Wilson interval."""
    found = certified.sum(axis=1)
    return np.stack([found / certified.shape[1], *wilson_interval(found, certified.shape[1])], axis=-1)


def _certified_curve(report: Report, options: RobustTrain, one: Measured, chance: float) -> None:
    """robustness.png, with the proved share below what attacks leave, and that share as a table."""
    evaluation = one.attacked.evaluation
    figure = robustness_curves(
        evaluation.epsilons,
        _triples(one),
        clean=float(evaluation.clean_accuracy),
        chance=chance,
        worst="certified",
        norm=options.norm,
    )
    caption = "Accuracy against epsilon, with 95% Wilson intervals over images. The truth lies between the certified"
    draw(report, figure, options.out / "robustness.png", f"{caption} share and the lowest of the attacks.")
    rows = [[f"{e:g}", estimate(*t)] for e, t in zip(evaluation.epsilons, _triples(one)["certified"], strict=True)]
    report.table(["epsilon", "certified"], rows, caption="Share of images proved right whatever the change.")


def _triples(one: Measured) -> dict[str, np.ndarray]:
    """[E, 3] value, low, high by attack, and certified where that was measured."""
    found = accuracies(one.attacked.evaluation)
    return found if one.certified is None else found | {"certified": certified_shares(one.certified)}


def _curve(one: Measured) -> dict[str, Any]:
    epsilons = one.attacked.evaluation.epsilons
    return {"epsilons": epsilons.tolist()} | {name: triples.tolist() for name, triples in _triples(one).items()}
