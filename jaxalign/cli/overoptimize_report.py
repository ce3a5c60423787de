"""The tables, the picture and the words in which `jaxalign overoptimize` says what it found."""

import functools
import json
from typing import Any

import jax
import numpy as np

from jaxalign.cli.overoptimize import Overoptimize
from jaxalign.rlhf.overoptimization import (
    ScalingLaw,
    best_of_n_kl,
    fit_best_of_n_law,
    fit_reinforcement_law,
    law_intervals,
)
from jaxalign.rlhf.overoptimization_study import Curves
from jaxalign.runtime.overoptimization_figure import Line, Outcomes, Panel, overoptimization_figure
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval

BEST, PPO = "best of n", "PPO"
PICTURE = "overoptimization.png"
LOWEST, HIGHEST = -4.0, 4.0  # drawn of PPO's rewards, which fall much further
LIMITS = {BEST: None, PPO: (LOWEST, HIGHEST)}


def write_report(
    options: Overoptimize, ns: tuple[int, ...], curves: dict[Any, Curves]
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and the picture; return the Report, to be printed, and what was measured.

    curves: of each (width, preferences, KL coefficient) and each way of using an ensemble, fields [S, ...].
    """
    singles = [name for name in curves if isinstance(name, tuple)]
    base = base_setting(options)
    plain = [name for name in singles if name[2] == 0.0]
    distances = np.sqrt(np.maximum(np.asarray(best_of_n_kl(np.array(ns))), 0.0))
    lines = {
        method: {name: _line(method, name, found, distances) for name, found in curves.items()}
        for method in (BEST, PPO)
    }
    remedies: dict[str, Line] = {"none": lines[PPO][base]}
    remedies |= {f"KL penalty {n[2]:g}": lines[PPO][n] for n in singles if n[2]}
    remedies |= {name: lines[PPO][name] for name in curves if not isinstance(name, tuple)}
    results: dict[str, Any] = {
        "unit": "standard deviations of the reference policy's return",
        "curves": [
            _measure(options, method, name, lines[method][name], np.asarray(curves[name].accuracy))
            for method in (BEST, PPO)
            for name in plain
        ],
        "remedies": _compare(options, remedies, curves),
    }
    report = Report("Over-optimisation of learned rewards")
    _introduce(report, options)
    panels = _panels(options, lines, plain, results["remedies"])
    overoptimization_figure(panels, unit="reward (std of reference)").savefig(options.out / PICTURE)
    report.figure(
        (options.out / PICTURE).read_bytes(),
        caption=f"Mean reward against the distance from the reference policy: true (gold, solid, with 95% intervals "
        f"over {options.seeds} seeds) and learned (proxy, dashed). PPO's rewards beyond {LOWEST:g} and {HIGHEST:g} are "
        "not drawn. Lower right: what each remedy comes to.",
    )
    _tables(report, results)
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return report, results


def base_setting(options: Overoptimize) -> tuple[int, int, float]:
    """Width, number of preferences and KL coefficient of the proxy for which remedies are compared."""
    return max(options.widths), sorted(options.preferences)[len(options.preferences) // 2], 0.0


def _line(method: str, name: Any, found: Curves, distances: np.ndarray) -> Line:
    label = name if isinstance(name, str) else f"width {name[0]}, {name[1]} preferences"
    if method == BEST:
        gold, proxy = np.asarray(found.best_gold), np.asarray(found.best_proxy)
        return Line(label, np.broadcast_to(distances, gold.shape), gold, proxy)
    return Line(label, np.sqrt(np.maximum(found.kl, 0.0)), np.asarray(found.gold), np.asarray(found.proxy))


def _interval(options: Overoptimize, values: np.ndarray) -> list[float]:
    """[mean, low, high] over seeds of values [S]; of one seed [mean]."""
    values = np.asarray(values, np.float32)
    if len(values) < 2:
        return [float(values.mean())]
    low, high = _bootstrap(jax.random.key(options.seed), values)
    return [float(values.mean()), float(low), float(high)]


_bootstrap = jax.jit(bootstrap_interval)


@functools.partial(jax.jit, static_argnums=1)
def _fit(key: Any, law: Any, distance: Any, gain: Any) -> tuple[ScalingLaw, ScalingLaw, ScalingLaw]:
    """The law fitted to gain [S, K], and the ends of its intervals."""
    return law(distance, gain), *law_intervals(key, law, distance, gain)


def _measure(options: Overoptimize, method: str, name: Any, line: Line, accuracy: np.ndarray) -> dict[str, Any]:
    """Where gold is highest on the mean curve over seeds, and what became of it by the end."""
    peak = int(np.argmax(line.gold.mean(axis=0)))
    law = fit_best_of_n_law if method == BEST else fit_reinforcement_law
    fitted = _fit(jax.random.key(options.seed), law, line.distance, line.gold - line.gold[:, :1])
    fitted = fitted if options.seeds > 1 else fitted[:1]
    return {
        "method": method,
        "width": name[0],
        "preferences": name[1],
        "accuracy": _interval(options, accuracy),
        "peak_distance": float(line.distance[:, peak].mean()),
        "peak_gold": _interval(options, line.gold[:, peak]),
        "end_distance": float(line.distance[:, -1].mean()),
        "end_gold": _interval(options, line.gold[:, -1]),
        "end_gold_of_seeds": line.gold[:, -1].tolist(),
        "end_proxy": _interval(options, np.asarray(line.proxy)[:, -1]),
        "fall": _interval(options, line.gold[:, -1] - line.gold[:, peak]),
        "alpha": [float(x.alpha) for x in fitted],
        "beta": [float(x.beta) for x in fitted],
    }


def _compare(options: Overoptimize, remedies: dict[str, Line], curves: dict[Any, Curves]) -> list[dict[str, Any]]:
    """Gold at the end of PPO with each remedy, and its difference from none, paired by seed."""
    chosen = {name: (line, np.full(len(line.gold), line.gold.shape[1] - 1)) for name, line in remedies.items()}
    none, mean = remedies["none"], remedies["ensemble mean"]
    within = none.distance <= options.kl_budget
    # The checks up to the first beyond the budget: the distance may come back within it later.
    budget = np.maximum(np.cumprod(within, axis=1).sum(axis=1) - 1, 0)
    chosen[f"stop at sqrt(KL) {options.kl_budget:g}"] = none, budget
    chosen["stop at the bound's peak"] = mean, np.argmax(curves["ensemble mean"].cautious, axis=1)
    rows = np.arange(len(none.gold))
    found = []
    for name, (line, at) in chosen.items():
        peak = int(np.argmax(line.gold.mean(axis=0)))
        gold = line.gold[rows, at]
        found.append(
            {
                "remedy": name,
                "distance": float(line.distance[rows, at].mean()),
                "gold": _interval(options, gold),
                "gain": None if name == "none" else _interval(options, gold - none.gold[:, -1]),
                "peak_gold": _interval(options, line.gold[:, peak]),
                "peak_distance": float(line.distance[:, peak].mean()),
            }
        )
    return found


def _panels(
    options: Overoptimize, lines: dict[str, dict[Any, Line]], plain: list[Any], remedies: list[dict[str, Any]]
) -> list[Panel | Outcomes]:
    """Proxies by size and by number of preferences, and what is done against their errors; best-of-n above PPO."""
    widest, most, (_, base_count, _) = max(options.widths), max(options.preferences), base_setting(options)
    panels: list[Panel | Outcomes] = []
    for method in (BEST, PPO):
        widths = [lines[method][n]._replace(label=f"width {n[0]}") for n in sorted(plain) if n[1] == most]
        counts = [lines[method][n]._replace(label=f"{n[1]} preferences") for n in sorted(plain) if n[0] == widest]
        panels += [
            Panel(f"{method}: proxies of {most} preferences", widths, LIMITS[method]),
            Panel(f"{method}: proxies of width {widest}", counts, LIMITS[method]),
        ]
        if method == BEST:
            ways = {"one model": base_setting(options)} | {n: n for n in lines[method] if isinstance(n, str)}
            drawn = [lines[method][name]._replace(label=label, proxy=None) for label, name in ways.items()]
            panels.append(Panel(f"{method}: ensembles, {base_count} preferences", drawn))
    ends = [(x["remedy"], x["gold"]) for x in remedies]
    panels.append(Outcomes(f"{PPO}: gold at the end, {base_count} preferences", ends, (LOWEST, 2.0)))
    return panels


def _introduce(report: Report, options: Overoptimize) -> None:
    report.text(
        "A point mass is to reach a goal behind a hazard. A random policy moves it; an annotator who sees the true "
        "return, and errs, compares its trajectories; a reward model (the proxy) learns from the answers; the proxy is "
        "then optimised. All rewards are in standard deviations of the random policy's return, 0 at their mean. What "
        "the proxy has wrong comes of few answers, their noise, its width, and of where the random policy never went."
    )


def _tables(report: Report, results: dict[str, Any]) -> None:
    found = {method: [x for x in results["curves"] if x["method"] == method] for method in (BEST, PPO)}
    fell = [x for x in results["curves"] if len(x["fall"]) == 3 and x["fall"][2] < 0]
    report.text(f"## What pursuing the proxy brings\n\n{_words(results['curves'], fell)}")
    for method, curves in found.items():
        rows = [
            [
                _named(x), x["peak_distance"], estimate(*x["peak_gold"]), x["end_distance"], estimate(*x["end_gold"]),
                estimate(*x["end_proxy"]), estimate(*x["fall"]),
            ]
            for x in curves
        ]  # fmt: skip
        report.table(
            [method, "peak at", "gold there", "end at", "gold there", "proxy there", "fall"],
            rows,
            caption="Means with 95% bootstrap intervals over seeds, at distances sqrt(KL), sqrt(nats). The peak is "
            "that of the mean curve, so its height is a little optimistic; the fall is from there to the end.",
        )
    report.table(
        ["proxy", "accuracy", "alpha, best of n", "beta, best of n", "alpha, PPO", "beta, PPO"],
        [
            [_named(x), *(estimate(*z) for z in (x["accuracy"], x["alpha"], x["beta"], y["alpha"], y["beta"]))]
            for x, y in zip(found[BEST], found[PPO], strict=True)
        ],
        caption="Accuracy: pairs of fresh random trajectories put in their true order. Alpha and beta: least squares "
        "of the gain d (alpha - beta d) for best of n and d (alpha - beta log d) for PPO, d = sqrt(KL), after Gao et "
        "al. (2022); with 95% bootstrap intervals over seeds.",
    )
    report.text(f"## Remedies\n\n{_remedy_words(results['remedies'])}")
    report.table(
        ["remedy", "end at", "gold there", "gained over none", "peak at", "gold there"],
        [
            [x["remedy"], x["distance"], estimate(*x["gold"]), estimate(*x["gain"]) if x["gain"] else "",
             x["peak_distance"], estimate(*x["peak_gold"])]
            for x in results["remedies"]
        ],
        caption="PPO with the same preferences and the same steps. What one would deploy is the end, or where it was "
        "stopped; the peak is for those who can see the gold reward. Differences are paired by seed.",
    )  # fmt: skip


def _named(x: dict[str, Any]) -> str:
    return f"width {x['width']}, {x['preferences']} preferences"


def _words(curves: list[dict[str, Any]], fell: list[dict[str, Any]]) -> str:
    lost = [x for x in curves if len(x["end_gold"]) == 3 and x["end_gold"][2] < 0]
    return (
        f"In {len(fell)} of {len(curves)} curves the gold reward ends below its peak (the interval of the fall leaves "
        f"0 out), though the proxy ends higher; in {len(lost)} it ends below the policy that it began with."
    )


def _remedy_words(remedies: list[dict[str, Any]]) -> str:
    measured = [x for x in remedies if x["gain"] is not None and len(x["gain"]) == 3]
    if not measured:
        return "With one seed there are no intervals, so nothing is said about which remedies help."
    groups = {
        "Better than none": [x["remedy"] for x in measured if x["gain"][1] > 0],
        "Not told from none": [x["remedy"] for x in measured if x["gain"][1] <= 0 <= x["gain"][2]],
        "Worse than none": [x["remedy"] for x in measured if x["gain"][2] < 0],
    }
    said = ". ".join(f"{label}: {', '.join(names)}" for label, names in groups.items() if names)
    best = max(measured, key=lambda x: x["gold"][0])
    return f"Gold at the end. {said}. The best is {best['remedy']} with {estimate(*best['gold'])}."
