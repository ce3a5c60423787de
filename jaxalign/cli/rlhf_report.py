"""The tables, pictures and files in which `jaxalign rlhf` says what the feedback taught."""

import functools
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxalign.cli.rlhf import Rlhf, Settings
from jaxalign.runtime.figures import COLOURS, curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxalign.cli.rlhf_run import Outcome

DRAWN = ("episode/return", "episode/agreement", "reward/loss", "reward/disagreement", "reward/learned", "entropy")
UNITS = {"entropy": "nats", "episode/return": "true reward"}


def write_report(
    options: Rlhf,
    settings: Settings,
    metrics: dict[str, np.ndarray],
    baseline: dict[str, np.ndarray] | None,
    outcome: "Outcome",
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and PNG pictures; return the Report, to be printed, and what was measured.

    metrics, baseline: [T, S] by name, "step" [T], of the runs from feedback and (or None) from the true reward.
    """
    answers = settings.rounds * settings.queries
    results: dict[str, Any] = {
        "environment": options.env, "annotator": options.annotator, "select": options.select, "answers": answers,
        "steps": settings.rounds * settings.steps, "returns": returns_found(outcome), "ordering": ordering(outcome),
    }  # fmt: skip
    report = Report(f"Learning {options.env} from feedback")
    report.text(
        f"{options.seeds} seeds, {results['steps']:,} environment steps and {answers} answers each: "
        f"{settings.rounds} rounds of {settings.queries} "
        f"{'scores of segments' if options.annotator == 'scores' else 'comparisons of two segments'} of up to "
        f"{settings.segment} steps, chosen by {options.select}; {options.ensemble} reward networks, paid as "
        f"{options.aggregate}. Annotator: {options.annotator}. The policies never got the true reward."
    )
    _tables(report, outcome, results)
    figure = curves(metrics, DRAWN, title="From feedback", units=UNITS, horizontal="environment steps")
    figure.savefig(options.out / "learning.png")
    report.figure(figure, f"The middle of {options.seeds} seeds with its 95% bootstrap interval. Agreement is the part "
                  "of a round's pairs of new segments that the reward networks order as the true rewards do, before "
                  "the round's answers; a gap is a round whose segments were all equally good.")  # fmt: skip
    by_answers = {name: metrics[name] for name in ("episode/return", "episode/agreement")}
    by_answers["step"] = metrics["labels"][:, 0]
    figure = curves(by_answers, title="What the answers bought", units=UNITS, horizontal="answers of each seed")
    report.figure(figure, "The same against the number of answers that each seed had asked for.")
    if baseline is not None:
        figure = curves(baseline, ("episode/return",), title="From the true reward", units=UNITS,
                        horizontal="environment steps")  # fmt: skip
        report.figure(figure, "PPO with the same settings, paid by the environment.")
    figure = scatter(outcome)
    figure.savefig(options.out / "ordering.png")
    report.figure(figure, "Held-out episodes: what the reward networks make of each against its true return; one "
                  "colour for each of the first six seeds.")  # fmt: skip
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return report, results


def returns_found(outcome: "Outcome") -> dict[str, Any]:
    """Mean true returns over seeds and differences paired by seed, each [value, low, high] (one seed: [value])."""
    means = {"before": outcome.before.mean(axis=1), "after": outcome.after.mean(axis=1)}
    means["after - before"] = means["after"] - means["before"]
    if outcome.baseline is not None:
        means["true reward"] = outcome.baseline.mean(axis=1)
        means["after - true reward"] = means["after"] - means["true reward"]
    return {name: _with_interval(x) for name, x in means.items()} | {"seeds": means["after"].tolist()}


def ordering(outcome: "Outcome") -> dict[str, Any]:
    """Kendall's tau-b, Spearman's rho and pairwise accuracy over the held-out episodes, means over seeds.

    Of a seed whose episodes are all equally good there is nothing to order: it counts in none, and `measured` says how
    many are left; with none left the values are None.
    """
    from scipy.stats import kendalltau, spearmanr

    found: dict[str, list[float]] = {"kendall": [], "spearman": [], "accuracy": []}
    for true, predicted in zip(outcome.true, outcome.predicted, strict=True):
        if np.ptp(true) == 0.0:
            continue
        # A reward that gives all the same puts nothing in order: no correlation, not an unknown one.
        flat = np.ptp(predicted) == 0.0
        found["kendall"].append(0.0 if flat else float(kendalltau(predicted, true).statistic))
        found["spearman"].append(0.0 if flat else float(spearmanr(predicted, true).statistic))
        found["accuracy"].append(pairwise_accuracy(predicted, true))
    measured = len(found["kendall"])
    return {name: _with_interval(np.array(x)) if measured else None for name, x in found.items()} | {
        "measured": measured
    }


def pairwise_accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    """The part of pairs of different `true` [M] that `predicted` [M] puts in the same order; equal predictions half."""
    first, second = np.triu_indices(len(true), k=1)
    differs = true[first] != true[second]
    signs = np.sign(predicted[first] - predicted[second]) * np.sign(true[first] - true[second])
    return float((1.0 + signs[differs]).mean() / 2.0)


def scatter(outcome: "Outcome") -> "Figure":
    """Predicted against true returns of the held-out episodes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for colour, true, predicted in zip(COLOURS, outcome.true, outcome.predicted, strict=False):
        axes.scatter(true, predicted, s=8, color=colour, alpha=0.6, linewidths=0)
    axes.set_xlabel("true return")
    axes.set_ylabel("learned return")
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _tables(report: Report, outcome: "Outcome", results: dict[str, Any]) -> None:
    names = {
        "before": "the policy as it began", "after": "learned from feedback", "true reward": "PPO, true reward",
        "after - before": "from feedback, over the beginning", "after - true reward": "from feedback, over PPO",
    }  # fmt: skip
    found = results["returns"]
    report.table(
        ["policy", "true return"],
        [[label, estimate(*found[name])] for name, label in names.items() if name in found],
        f"Means over {outcome.after.shape[1]} fresh episodes of each of {len(outcome.after)} seeds, with 95% bootstrap "
        "intervals over seeds; differences are paired by seed.",
    )
    order = results["ordering"]
    labels = {"kendall": "Kendall's tau-b", "spearman": "Spearman's rho", "accuracy": "pairs in the right order"}
    report.table(
        ["learned against true return", "mean over seeds"],
        [[label, estimate(*order[name]) if order[name] else None] for name, label in labels.items()],
        f"Over {outcome.true.shape[1]} held-out episodes of each seed, in which the final policy acts at random more "
        f"and more; {order['measured']} of {len(outcome.true)} seeds had episodes that differ.",
    )


_interval = jax.jit(functools.partial(bootstrap_interval, jax.random.key(0)))


def _with_interval(scores: np.ndarray) -> list[float]:
    """Mean of scores [S] and its 95% bootstrap interval; of one seed the mean alone."""
    if len(scores) == 1:
        return [float(scores[0])]
    low, high = _interval(scores)
    return [float(scores.mean()), float(low), float(high)]
