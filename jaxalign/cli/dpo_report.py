"""The tables, pictures and files in which `jaxalign dpo` says what it found."""

import json
from typing import Any

import jax
import numpy as np

from jaxalign.cli.dpo import Dpo
from jaxalign.preferences import PairLogProbs, score_pairs
from jaxalign.runtime.figures import curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval

MEASURES = {
    "reward_accuracy": "implicit reward prefers chosen",
    "prefers_chosen": "chosen more probable",
    "prefers_chosen_per_token": "chosen more probable per token",
    "reward_margin": "reward margin",
    "chosen_displacement": "change of chosen log-prob (nats)",
}
NO_REWARD = ("reward_accuracy", "reward_margin", "chosen_displacement")  # zero by definition before tuning


def measure(before: PairLogProbs, after: PairLogProbs, *, beta: float, seed: int) -> dict[str, dict[str, Any]]:
    """Each measure before and after with 95% bootstrap intervals over pairs, of the mean over seeds; and the change.

    before: fields [N]; after: fields [S, N]. "before" is None where an untuned model has no such thing.
    """
    old = score_pairs(before, before, beta=beta)
    new = jax.vmap(lambda policy: score_pairs(policy, before, beta=beta))(after)
    keys = jax.random.split(jax.random.key(seed), 3 * len(MEASURES)).reshape(len(MEASURES), 3)
    results = {}
    for name, (old_key, new_key, change_key) in zip(MEASURES, keys, strict=True):
        x, y = np.asarray(getattr(old, name)), np.asarray(getattr(new, name))
        untuned = name in NO_REWARD
        results[name] = {
            "before": None if untuned else _interval(old_key, x),
            "after": _interval(new_key, y.mean(axis=0)),
            "change": None if untuned else _interval(change_key, y.mean(axis=0) - x),
            "seeds": y.mean(axis=1).tolist(),
        }
    return results


def write_report(
    options: Dpo, notes: list[str], metrics: dict[str, np.ndarray], before: PairLogProbs, after: PairLogProbs
) -> tuple[Report, dict[str, dict[str, Any]]]:
    """Write results.json, report.html and PNG curves; return the Report, to be printed, and `measure`'s results."""
    results = measure(before, after, beta=options.beta, seed=options.seed)
    pairs, seeds = before.chosen.shape[0], after.chosen.shape[0]
    report = Report(f"{options.loss} on {options.data.name if options.data else 'the embedded pairs'}")
    tuned = f"LoRA rank {options.lora_rank}" if options.lora else "all weights"
    count = f"{seeds} seed{'s' if seeds > 1 else ''}"
    report.text(
        f"{options.model}, {tuned}, beta {options.beta:g}, {len(metrics['loss'])} steps of {options.batch_size} pairs, "
        f"{count}."
    )
    for note in notes:
        report.text(note)
    rows = []
    for name, label in MEASURES.items():
        found = results[name]
        cells = [("" if found[k] is None else estimate(*found[k])) for k in ("before", "after", "change")]
        spread = [f"{min(found['seeds']):.3f} to {max(found['seeds']):.3f}"] if seeds > 1 else []
        rows.append([label, *cells, *spread])
    report.table(
        [f"{pairs} held-out pairs", "before", "after", "change", *(["over seeds"] if seeds > 1 else [])],
        rows,
        caption="Shares of pairs, ties counted half, with 95% bootstrap intervals over pairs. An untuned model has no "
        "implicit reward: chance is 0.5.",
    )
    for file, names, title in (
        ("loss.png", ["loss"], "Training loss"),
        ("rewards.png", ["rewards/accuracies"], "Training reward accuracy"),
        ("logps.png", ["rewards/chosen", "rewards/rejected"], "Implicit rewards of training pairs"),
    ):
        figure = curves(metrics, names, title=title)
        figure.savefig(options.out / file, dpi=120)
        report.figure(figure, caption=title)
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps({"held_out_pairs": pairs, **results}, indent=2) + "\n")
    return report, results


def _interval(key: Any, values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high)."""
    low, high = bootstrap_interval(key, values)
    return float(values.mean()), float(low), float(high)



