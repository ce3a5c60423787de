"""The tour's stops in value learning."""

from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from jaxalign.cli.irl import Irl
from jaxalign.cli.irl_report import LABELS
from jaxalign.cli.irl_run import run as run_irl
from jaxalign.irl import off_switch_values
from jaxalign.runtime.report import Report, estimate

SIZE, DEMONSTRATIONS, STEPS, SEEDS = 8, 32, 200, 8


def maximum_entropy(report: Report, console: Console, out: Path) -> None:
    """A reward learned from demonstrations, eight seeds as one program."""
    job = Irl(out=out / "irl", size=SIZE, num_demonstrations=DEMONSTRATIONS, steps=STEPS, seeds=SEEDS)
    results = run_irl(job, console)
    report.text(
        f"Maximum causal entropy IRL of an Objectworld of {SIZE} x {SIZE} cells; each seed draws {DEMONSTRATIONS} "
        f"demonstrations of {job.length} noisy steps."
    )
    report.table(
        ["measure", "mean over seeds"],
        [[LABELS[name], estimate(*found["mean"])] for name, found in results.items()],
        caption="95% bootstrap intervals over seeds.",
    )
    report.figure((job.out / "reward.png").read_bytes(), caption="Rewards less their mean; spread over seeds.")
    report.text(f"The run's own page is {job.out / 'report.html'}")


def off_switch(report: Report, console: Console, out: Path) -> None:
    """The off-switch game: when does a robot let itself be switched off?"""
    means, spreads, temperatures = (0.0, 1.0), (0.5, 1.0), (0.0, 0.5, 2.0)
    grid = jnp.meshgrid(*(jnp.array(x) for x in (means, spreads, temperatures)), indexing="ij")
    values = off_switch_values(grid[0], grid[1], temperature=grid[2])
    rows = [
        [mean, spread, *(float(x) for x in values.incentive[i, j])]
        for i, mean in enumerate(means)
        for j, spread in enumerate(spreads)
    ]
    report.text(
        "The robot believes the utility of acting is Normal(mean, spread); a human it asks allows the action with "
        "probability sigmoid(utility / temperature). What it gains by waiting for the human, exactly:"
    )
    report.table(
        ["mean", "spread", *(f"temperature {t:g}" for t in temperatures)],
        rows,
        caption="Utility over the better of acting and switching off. Uncertainty makes it wait, a human's noise not. "
        "Hadfield-Menell et al. (2017).",
    )
