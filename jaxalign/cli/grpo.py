"""`jaxalign grpo`: tune a language model on a reward, comparing several completions of each prompt."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxalign.cli.online import Online


@dataclasses.dataclass(frozen=True)
class Grpo(Online):
    """Tune a language model by group methods: GRPO, RLOO, Dr. GRPO or DAPO. No value function is needed.

    The run directory gets metrics.jsonl, TensorBoard logs, checkpoints, report.html with reward and KL curves and
    samples before and after, results.json and the tuned model (model/). A stopped run goes on with --resume.

    Example: jaxalign grpo --task length --out runs/short
    """

    out: Path = Path("runs/grpo")
    """The run directory."""
    method: Literal["grpo", "rloo", "dr-grpo", "dapo"] = "grpo"
    """Which advantages and which mean over tokens."""
    kl: float = 0.04
    """Price of a nat of KL from the model at the start, per token."""
    epochs: int = 1
    """Passes over a rollout's completions."""

    def run(self) -> None:
        """Load, measure, train, measure again, report."""
        from rich.console import Console

        from jaxalign.cli.online_run import run

        run(self, Console())
