"""The tables, pictures and files in which `jaxalign grpo` and `jaxalign ppo-lm` say what they found."""

import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxalign.cli.grpo import Grpo
from jaxalign.cli.ppo_lm import PpoLm
from jaxalign.runtime.figures import curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval

if TYPE_CHECKING:
    from jaxalign.cli.online_run import Answers

SHOWN_SAMPLES = 6
DRAWN = (
    "objective/scores", "objective/kl", "completion/length", "completion/ended", "entropy", "group/uniform",
    "value/explained_variance",
)  # fmt: skip
UNITS = {"objective/kl": "nats a completion", "entropy": "nats", "completion/length": "tokens"}


def measure(before: "Answers", after: "Answers", *, seed: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Reward, length in tokens and share ended, each before, after and their difference: (mean, low, high), over N
    prompts with 95% bootstrap intervals."""
    keys = iter(jax.random.split(jax.random.key(seed), 9))
    results = {}
    for name in ("scores", "lengths", "ended"):
        old, new = (np.asarray(getattr(x, name), np.float32) for x in (before, after))
        values = {"before": old, "after": new, "change": new - old}
        results[name] = {which: _interval(next(keys), x) for which, x in values.items()}
    return results


def write_report(
    options: Grpo | PpoLm,
    about: str,
    metrics: dict[str, np.ndarray],
    prompts: list[str],
    before: "Answers",
    after: "Answers",
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, samples.jsonl, report.html and PNG curves; return the Report and what was measured."""
    results: dict[str, Any] = measure(before, after, seed=options.seed)
    method = options.method if isinstance(options, Grpo) else "PPO"
    report = Report(f"{method} on {options.data.name if options.data else f'the task {options.task!r}'}")
    tuned = f"LoRA rank {options.lora_rank}" if options.lora else "all weights"
    report.text(
        f"{options.model}, {tuned}, {len(metrics['loss'])} steps of {options.prompts} prompts with {options.samples} "
        f"completions each, KL price {options.kl:g}. Reward: {about}."
    )
    labels = {"scores": "reward", "lengths": "tokens in a completion", "ended": "share that ended by itself"}
    rows = [
        [label, *(estimate(*results[name][which]) for which in ("before", "after", "change"))]
        for name, label in labels.items()
    ]
    report.table(
        [f"{len(prompts)} held-out prompts", "before", "after", "change"],
        rows,
        caption="One completion of each prompt, drawn as in training, with 95% bootstrap intervals over prompts.",
    )
    names = [name for name in DRAWN if name in metrics]
    figure = curves(metrics, names, title="Learning", units=UNITS)
    figure.savefig(options.out / "learning.png", dpi=120)
    report.figure(figure, caption="On the training prompts, each step's completions; KL from the model at the start.")
    shown = range(min(SHOWN_SAMPLES, len(prompts)))
    report.table(
        ["held-out prompt", "before", "reward", "after", "reward"],
        [
            [prompts[i], before.texts[i], f"{before.scores[i]:.3g}", after.texts[i], f"{after.scores[i]:.3g}"]
            for i in shown
        ],
        caption="The first held-out prompts. All are in samples.jsonl.",
    )
    report.write(options.out / "report.html")
    results = {"held_out_prompts": len(prompts), **results}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    lines = (
        {
            "prompt": prompt,
            "before": before.texts[i], "reward_before": float(before.scores[i]),
            "after": after.texts[i], "reward_after": float(after.scores[i]),
        }
        for i, prompt in enumerate(prompts)
    )  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (options.out / "samples.jsonl").write_text(text, encoding="utf-8")
    return report, results


def _interval(key: Any, values: np.ndarray) -> tuple[float, float, float]:
    low, high = bootstrap_interval(key, values)
    return float(values.mean()), float(low), float(high)
