"""`jaxalign overoptimize`: pursue a learned reward too far, and see what the true one does."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Overoptimize:
    """Measure over-optimisation of learned rewards where the true return is known.

    Reward models of several sizes learn from several numbers of preferences over a random policy's trajectories. Each
    is then optimised by best-of-n and by PPO, and the true (gold) return is drawn against the distance from that
    policy, sqrt(KL). Then ensembles, a KL penalty and early stopping are compared on one of them. The run directory
    gets results.json, report.html and the picture; a stopped run goes on with --resume.

    Examples:
      jaxalign overoptimize
      jaxalign overoptimize --seeds 16 --preferences 32 256 2048 --out runs/more-seeds
    """

    out: Path = Path("runs/overoptimize")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    seeds: int = 8
    """Seeds of each setting: each has its own policy, trajectories, answers and reward models."""
    seed: int = 0
    """Where the seeds' random numbers begin."""
    widths: tuple[int, ...] = (2, 8, 32)
    """Hidden units of the reward models, compared at the largest number of preferences."""
    preferences: tuple[int, ...] = (64, 512, 4096)
    """How many they learn from, compared at the largest width; remedies are compared at the middle one."""
    members: int = 4
    """Reward models in an ensemble, each from a resample of the same preferences."""
    caution: tuple[float, ...] = (1.0, 2.0)
    """Deviations below the ensemble's mean that the lower confidence bound lies."""
    kl_coefficient: tuple[float, ...] = (0.03, 0.1)
    """What a nat of KL costs, in standard deviations of the reference policy's return."""
    kl_budget: float = 2.0
    """Early stopping: the last check at which sqrt(KL) is not above this."""
    annotator_beta: float = 0.1
    """How sure the annotator is, per unit of true return: 0 answers by a coin."""
    most: int = 1024
    """The largest n of best-of-n."""
    samples: int = 4096
    """Trajectories that best-of-n is estimated from."""
    reward_steps: int = 600
    """Gradient steps of each reward model; a fifth of the preferences decides which of them is kept."""
    checks: int = 15
    """Evaluations of PPO along the way."""
    rollouts: int = 4
    """Rollouts of 32 episodes between them."""
    learning_rate: float = 3e-4
    """PPO's."""

    def run(self) -> None:
        """Learn, optimise, compare, report."""
        from rich.console import Console

        from jaxalign.cli.overoptimize_run import run

        run(self, Console())
