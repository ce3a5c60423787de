"""`jaxalign irl`: learn a reward from demonstrations, and say with intervals how good it is."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Irl:
    """Learn a reward from demonstrations in a finite world: by maximum causal entropy, or its Bayesian posterior.

    Without --world it is an Objectworld (Levine et al. 2011) whose true reward is known; without --demonstrations they
    are drawn from a noisily optimal demonstrator, anew for each seed. The run directory gets the learned reward
    (reward.npz), results.json, report.html, metrics and checkpoints. A stopped run goes on with --resume.

    Examples:
      jaxalign irl
      jaxalign irl --method bayesian
      jaxalign irl --world world.npz --demonstrations demos.jsonl
    """

    method: Literal["maxent", "bayesian"] = "maxent"
    """A best reward by gradient descent, or samples of the posterior over rewards."""
    world: Path | None = None
    """.npz with transition [S, A, S] (or next_state and probability [S, A, K]), initial [S], discount, and optionally
    terminal [S], features [S, F], reward [S], shape (H, W)."""
    demonstrations: Path | None = None
    """JSONL (or JSON, Parquet; .gz too), one demonstration a row: {"states": [...], "actions": [...]}."""
    out: Path = Path("runs/irl")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    size: int = 10
    """Height and width of the Objectworld."""
    num_demonstrations: int = 64
    """Demonstrations drawn for each seed; half as many more are held out."""
    length: int = 20
    """Steps of a drawn demonstration."""
    temperature: float = 0.5
    """Noise of the demonstrator, in units of reward: drawn demonstrations have it, learning assumes it (beta = 1 / it
    for the Bayesian method)."""
    reward: Literal["states", "linear", "mlp"] = "states"
    """What is learned: a number for each state, or a linear function or a small network of the world's features.
    maxent only."""
    prior_scale: float = 1.0
    """Standard deviation of the Gaussian prior of each state's reward; bayesian only."""
    steps: int | None = None
    """Gradient steps (default 300), or posterior samples of each chain after as many warm-up steps (default 500)."""
    learning_rate: float = 0.1
    """Of Adam; maxent only."""
    chains: int = 4
    """Chains of each seed; bayesian only."""
    held_out: float = 0.25
    """Share of the file's demonstrations kept for evaluation."""
    seeds: int = 8
    """Repetitions: each draws its own demonstrations, or resamples those of the file (with replacement)."""
    seed: int = 0
    """The first seed; it also fixes the Objectworld and what is held out."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def run(self) -> None:
        """Load or draw, learn, evaluate, report."""
        from rich.console import Console

        from jaxalign.cli.irl_run import run

        run(self, Console())
