"""The tour's stops in reinforcement learning from human feedback."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jaxalign as ja
from jaxalign.cli.rlhf import Rlhf
from jaxalign.cli.rlhf_run import run as run_rlhf
from jaxalign.rlhf import best_of_n_kl, over_optimization
from jaxalign.rlhf.overoptimization_study import Setting
from jaxalign.runtime.overoptimization_figure import Line, Panel, overoptimization_figure
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval

SEEDS, ROUNDS = 4, 20
NS, PREFERENCES = (1, 4, 16, 64, 256, 1024), (64, 4096)


def comparisons(report: Report, console: Console, out: Path) -> None:
    """A policy learned from comparisons of its behaviour, never from the reward."""
    job = Rlhf(env="gridworld", out=out / "rlhf", seeds=SEEDS, rounds=ROUNDS, baseline=False)
    found = run_rlhf(job, console)
    order = found["ordering"]["accuracy"]
    report.text(
        f"A gridworld with pits; {SEEDS} seeds, {ROUNDS} rounds of questions each. An annotator compares pairs of "
        "segments, three reward networks learn from the answers, PPO is paid by them."
    )
    report.table(
        ["measure", "mean over seeds"],
        [
            ["true return, as it began", estimate(*found["returns"]["before"])],
            ["true return, learned from comparisons", estimate(*found["returns"]["after"])],
            ["held-out pairs that the learned reward orders rightly", estimate(*order) if order else None],
        ],
        caption="95% bootstrap intervals over seeds.",
    )
    report.text(f"The run's own page is {job.out / 'report.html'}")


def over_optimisation(report: Report, console: Console, out: Path) -> None:
    """Choosing by a learned reward: it looks ever better, and at some point is worse."""
    console.print(f"Best of n by reward models of {PREFERENCES[0]} and {PREFERENCES[1]:,} answers, {SEEDS} seeds ...")
    none = jnp.zeros((len(PREFERENCES), 1))
    settings = Setting(jnp.array([32] * len(PREFERENCES)), jnp.array(PREFERENCES), none, none > 0, none)
    run = functools.partial(over_optimization, ns=NS, checks=1, rollouts_per_check=1)
    curves = ja.sweep(run, settings, jax.random.split(jax.random.key(0), SEEDS), mode="map")
    distance = np.sqrt(np.maximum(np.array([float(best_of_n_kl(n)) for n in NS]), 0.0))
    proxy, gold = (np.asarray(x)[:, :, 0] for x in (curves.best_proxy, curves.best_gold))
    rows = []
    for count, learned, true in zip(PREFERENCES, proxy, gold, strict=True):
        low, high = (np.asarray(x) for x in bootstrap_interval(jax.random.key(1), true))
        last = estimate(float(true[:, -1].mean()), float(low[-1]), float(high[-1]))
        rows.append([f"{count:,}", f"{learned[:, -1].mean():.2f}", last])
    report.table(
        ["answers", f"learned reward of the best of {NS[-1]:,}", "its true return"],
        rows,
        caption="In standard deviations of the random policy's returns, above their mean; 95% bootstrap intervals.",
    )
    lines = [
        Line(f"{count:,} answers", np.broadcast_to(distance, true.shape), true, learned)
        for count, learned, true in zip(PREFERENCES, proxy, gold, strict=True)
    ]
    report.figure(overoptimization_figure([Panel("best of n", lines)]), caption="True and learned reward.")
