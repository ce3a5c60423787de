"""The tables, pictures and files in which `jaxalign ppo` says how well the policies do."""

import json
from typing import Any

import jax
import numpy as np

from jaxalign.cli.ppo import Ppo
from jaxalign.cli.ppo_presets import Settings
from jaxalign.rl import Episodes, tail_risk
from jaxalign.runtime.figures import curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.risk_report import tail_risk_section
from jaxalign.statistics import bootstrap_interval, interquartile_mean

DRAWN = ("evaluation/return", "entropy", "value_loss", "explained_variance", "approx_kl", "clip_fraction")
UNITS = {"entropy": "nats", "approx_kl": "nats"}


def write_report(
    options: Ppo, settings: Settings, metrics: dict[str, np.ndarray], episodes: Episodes
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and PNG pictures; return the Report, to be printed, and what was measured.

    metrics: [T, lanes] by name, "step" [T]; episodes: the last evaluation's, [lanes, E].
    """
    returns, finished = (np.asarray(x) for x in (episodes.returns, episodes.finished))
    seeds = options.seeds
    each = {
        (rate, entropy): slice(i * seeds, (i + 1) * seeds)
        for i, (rate, entropy) in enumerate((r, e) for r in settings.learning_rate for e in settings.entropy)
    }
    rows: list[list[Any]] = []
    results: dict[str, Any] = {"steps": int(metrics["step"][-1]), "settings": []}
    for number, ((rate, entropy), lanes) in enumerate(each.items()):
        found = _measure(jax.random.fold_in(jax.random.key(options.seed), number), returns[lanes])
        found |= {"learning_rate": rate, "entropy": entropy, "finished": float(finished[lanes].mean())}
        results["settings"].append(found)
        spread = f"{min(found['seeds']):.4g} to {max(found['seeds']):.4g}"
        rows.append([rate, entropy, estimate(*found["iqm"]), estimate(*found["mean"]), spread])
    report = Report(f"PPO on {options.env}")
    report.text(
        f"{seeds} seeds, {results['steps']:,} environment steps each: {settings.num_envs} environments, rollouts of "
        f"{settings.num_steps} steps, {settings.epochs} passes in {settings.minibatches} minibatches, discount "
        f"{settings.discount:g}, lambda {settings.gae_lambda:g}, clip {settings.clip:g}. Bonus: {options.intrinsic}."
    )
    report.table(
        ["learning rate", "entropy", "interquartile mean", "mean", "over seeds"],
        rows,
        caption=f"Return of the last policies in {returns.shape[1]} episodes each, with 95% bootstrap intervals over "
        "seeds; actions are drawn, as in training.",
    )
    for (rate, entropy), lanes in each.items():
        name = "learning.png" if len(each) == 1 else f"learning-{rate:g}-{entropy:g}.png"
        one = {m: metrics[m][:, lanes] for m in DRAWN} | {"step": metrics["step"]}
        title = f"Learning rate {rate:g}, entropy {entropy:g}"
        figure = curves(one, DRAWN, title=title, units=UNITS, horizontal="environment steps")
        figure.savefig(options.out / name)
        report.figure(figure, caption=f"{title}: the middle of {seeds} seeds with its 95% bootstrap interval.")
    first = next(iter(each.values()))
    report.text("## The worst episodes")
    began = float(metrics["evaluation/return"][0, first].mean())
    risk = tail_risk(jax.random.key(options.seed), returns[first], threshold=began)
    report.text(f"Of the first setting; {began:.4g} was the mean return at the first evaluation.")
    tail_risk_section(report, risk)
    results["cvar"] = {f"{alpha:g}": float(value) for alpha, value in zip(risk.alphas, risk.cvar.value, strict=True)}
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return report, results


def _measure(key: Any, returns: np.ndarray) -> dict[str, Any]:
    """Middle and mean return with intervals over seeds, from returns [seeds, E]; of one seed without."""
    scores = returns.mean(axis=1)
    found: dict[str, Any] = {"seeds": scores.tolist()}
    for name, statistic in (("iqm", interquartile_mean), ("mean", np.mean)):
        found[name] = [float(statistic(scores))]
        if len(scores) > 1:
            found[name] += [float(x) for x in _interval(key, scores)[name]]
    return found


@jax.jit
def _interval(key: Any, scores: Any) -> dict[str, Any]:
    """95% bootstrap intervals of the middle and the mean of scores [seeds]."""
    middle = bootstrap_interval(key, scores, statistic=interquartile_mean)
    return {"iqm": middle, "mean": bootstrap_interval(key, scores)}
