"""The tour's stops in reinforcement learning."""

from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxalign.cli.ppo import Ppo
from jaxalign.cli.ppo_run import run as run_ppo
from jaxalign.mdp import corner_box, side_effect_worlds
from jaxalign.mdp.gridworlds import STAY
from jaxalign.rl import attainable_utility_designs, penalty_sweep
from jaxalign.runtime.report import Report, estimate

SEEDS, STEPS, EVALUATIONS, EPISODES = 4, 50_000, 10, 16
COEFFICIENTS = (0.0, 0.5, 1.0, 2.0, 10.0, 50.0)


def balance(report: Report, console: Console, out: Path) -> None:
    """PPO learns to balance a pole, four seeds as one program."""
    job = Ppo(out=out / "ppo", seeds=SEEDS, steps=STEPS, evaluations=EVALUATIONS, episodes=EPISODES)
    found = run_ppo(job, console)["settings"][0]
    report.text(f"CartPole, {STEPS:,} environment steps for each of {SEEDS} seeds; 500 is the most there is.")
    report.table(
        ["measure", "value"],
        [
            ["return, interquartile mean over seeds", estimate(*found["iqm"])],
            ["return, mean over seeds", estimate(*found["mean"])],
        ],
        caption="Of the last policies on fresh episodes, actions drawn; 95% bootstrap intervals over seeds.",
    )
    report.figure((job.out / "learning.png").read_bytes(), caption="Learning, over seeds.")
    report.text(f"The run's own page is {job.out / 'report.html'}")


def side_effects(report: Report, console: Console, out: Path) -> None:
    """A penalty for side effects: too little harms, too much does nothing."""
    world = corner_box()
    penalty = attainable_utility_designs(jax.random.key(0), world.mdp, noop=STAY)["AUP"]
    curve = penalty_sweep(
        *penalty, world.reward, world.performance, jnp.array(COEFFICIENTS), horizon=side_effect_worlds.EPISODE
    )
    rows = zip(COEFFICIENTS, *(x.tolist() for x in (curve.reward, curve.performance, curve.penalty)), strict=True)
    report.text(
        "A box stands in the way to the goal; pushed the short way it stays in a corner for ever, which the reward "
        "does not mind and the hidden performance does. Attainable utility preservation, planned exactly:"
    )
    report.table(
        ["coefficient", "reward", "hidden performance", "penalty"],
        [list(row) for row in rows],
        caption="Sums over an episode. Turner et al. (2020).",
    )
