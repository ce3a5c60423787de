"""The tables, pictures and files in which `jaxalign reward` says what it found."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.cli.reward import Reward
from jaxalign.preferences.calibration import (
    ReliabilityCurve,
    brier_score,
    expected_calibration_error,
    reliability_curve,
)
from jaxalign.runtime.figures import curves
from jaxalign.runtime.reliability import reliability_diagram
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array

OF_ALL_PAIRS = ("accuracy", "margin", "log_loss", "calibration_error", "brier_score", "disagreement")
BINS = 20  # over [0, 1], of which confidence in the preferred side fills the upper half
SIMILAR = 0.1  # lengths differ by at most this share of the longer one
MEASURES = {
    "accuracy": "prefers chosen",
    "margin": "reward margin",
    "log_loss": "negative log-likelihood (nats)",
    "calibration_error": "expected calibration error",
    "brier_score": "Brier score",
    "prefers_longer": "prefers the longer answer",
    "labels_prefer_longer": "the labels prefer the longer answer",
    "accuracy_similar_length": "prefers chosen, answers of similar length",
    "disagreement": "members' deviation in the margin",
    "least_sure_accuracy": "prefers chosen, half the members agree on least",
}


class PairRewards(NamedTuple):
    """Of N pairs: rewards [N, E] by each of E members, and how many tokens each answer has [N]."""

    chosen: Array
    rejected: Array
    chosen_lengths: Array
    rejected_lengths: Array


def measure(tested: PairRewards, *, seed: int) -> dict[str, Any]:
    """Each measure as (value, low, high) with 95% bootstrap intervals over pairs, or None where no pair has it.

    An ensemble judges by its mean reward. Shares count ties half; "members" has the accuracy of each alone.
    """
    chosen, rejected, *lengths = (np.asarray(x, np.float64) for x in tested)
    margins = chosen - rejected
    margin, spread = margins.mean(axis=1), margins.std(axis=1)
    right = np.heaviside(margin, 0.5)
    longer = np.sign(lengths[0] - lengths[1])
    unequal, similar = longer != 0, np.abs(lengths[0] - lengths[1]) <= SIMILAR * np.maximum(*lengths)
    unsure = (spread >= np.median(spread)) & (margins.shape[1] > 1)
    by_length = np.stack([np.heaviside(margin * longer, 0.5), longer > 0], axis=1)[unequal]
    parts: dict[tuple[str, ...], tuple[np.ndarray, Callable[[Array], Array]]] = {
        OF_ALL_PAIRS: (np.stack([margin, spread], axis=1), _of_all_pairs),
        ("prefers_longer", "labels_prefer_longer"): (by_length, _mean),
        ("accuracy_similar_length",): (right[similar, None], _mean),
        ("least_sure_accuracy",): (right[unsure, None], _mean),
    }
    results: dict[str, Any] = {}
    for key, (names, (rows, statistic)) in zip(
        jax.random.split(jax.random.key(seed), len(parts)), parts.items(), strict=True
    ):
        found = _intervals(key, rows, statistic)
        results |= dict.fromkeys(names) if found is None else dict(zip(names, found, strict=True))
    if margins.shape[1] == 1:
        results["disagreement"] = None
    results["members"] = np.heaviside(margins, 0.5).mean(axis=0).tolist()
    results["pairs"], results["pairs_of_similar_length"] = len(margin), int(similar.sum())
    results["pairs_of_unequal_length"] = int(unequal.sum())
    curve = reliability_curve(jax.nn.sigmoid(np.abs(margin)), right, bins=BINS)
    filled = np.asarray(curve.count) > 0
    results["reliability"] = {name: np.asarray(x)[filled].tolist() for name, x in curve._asdict().items()}
    return results


def _of_all_pairs(rows: Array) -> Array:
    """The measures OF_ALL_PAIRS [6] of rows [N, 2], margin and the members' deviation in it."""
    margin, spread = rows.T
    right, confidence = jnp.heaviside(margin, 0.5), jax.nn.sigmoid(jnp.abs(margin))
    measures = (
        right.mean(),
        margin.mean(),
        jax.nn.softplus(-margin).mean(),
        expected_calibration_error(confidence, right, bins=BINS),
        brier_score(confidence, right),
        spread.mean(),
    )
    return jnp.stack(measures)


def write_report(
    options: Reward, notes: list[str], metrics: dict[str, np.ndarray], tested: PairRewards, *, best_step: int
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and PNG pictures; return the Report, to be printed, and what was measured."""
    results = {"steps": len(metrics["loss"]), "best_step": best_step, **measure(tested, seed=options.seed)}
    report = Report(f"Reward model on {options.data.name if options.data else 'the embedded pairs'}")
    trained = f"LoRA rank {options.lora_rank}" if options.lora else "all weights"
    members = f", {options.ensemble} members" if options.ensemble > 1 else ""
    stopped = "stopped early" if metrics["validation/stopped"][-1] > 0 else "not stopped early"
    report.text(
        f"{options.model}, {trained}{members}, {results['steps']} steps of {options.batch_size} pairs, {stopped}; the "
        f"parameters of step {best_step} had the lowest validation loss, {metrics['validation/best'][-1]:.4f} nats "
        f"(a model that knows nothing has {np.log(2):.4f})."
    )
    for note in notes:
        report.text(note)
    pairs = results["pairs"]
    report.table(
        [f"{pairs} held-out pairs", "value"],
        [[label, estimate(*(results[name] or (None,)))] for name, label in MEASURES.items() if _applies(name, options)],
        caption="With 95% bootstrap intervals over pairs; ties count half, chance is 0.5. Answers differ in length in "
        f"{results['pairs_of_unequal_length']} pairs; they are of similar length (within {SIMILAR:.0%}) in "
        f"{results['pairs_of_similar_length']}. Of the calibration error about "
        f"{0.4 * np.sqrt(len(results['reliability']['count']) / pairs):.3f} is what a calibrated model would show by "
        "chance.",
    )
    if options.ensemble > 1:
        report.text("Accuracy of each member alone: " + ", ".join(f"{x:.3f}" for x in results["members"]) + ".")
    _pictures(options, metrics, results, report)
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return report, results


def _pictures(options: Reward, metrics: dict[str, np.ndarray], results: dict[str, Any], report: Report) -> None:
    drawn = {
        "loss.png": (["loss", "validation/loss"], "Training and validation loss (nats)"),
        "rewards.png": (["rewards/accuracies", "rewards/margins"], "Training pairs"),
    }
    for file, (names, title) in drawn.items():
        figure = curves(metrics, names, title=title)
        figure.savefig(options.out / file, dpi=120)
        report.figure(figure, caption=title)
    title = "Reliability on held-out pairs"
    curve = ReliabilityCurve(**{name: np.asarray(x) for name, x in results["reliability"].items()})  # type: ignore[arg-type]
    figure = reliability_diagram(curve, title=title)
    figure.savefig(options.out / "reliability.png", dpi=120)
    report.figure(figure, caption=f"{title}: how often the answer it prefers is the chosen one, against how sure it is")


def _applies(name: str, options: Reward) -> bool:
    return options.ensemble > 1 or name not in ("disagreement", "least_sure_accuracy")


def _mean(rows: Array) -> Array:
    return jnp.mean(rows, axis=0)


def _intervals(
    key: Any, rows: np.ndarray, statistic: Callable[[Array], Array]
) -> list[tuple[float, float, float]] | None:
    """(value, low, high) of each of the statistic's numbers, or None where there are no rows."""
    if not len(rows):
        return None
    low, high = bootstrap_interval(key, rows, statistic=statistic)
    value = statistic(jnp.asarray(rows, jnp.float32))
    return [(float(v), float(a), float(b)) for v, a, b in zip(value, low, high, strict=True)]
