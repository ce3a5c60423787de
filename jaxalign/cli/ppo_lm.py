"""`jaxalign ppo-lm`: tune a language model on a reward by PPO, with a value head and a KL penalty on each token."""

import dataclasses
from pathlib import Path

from jaxalign.cli.online import Online


@dataclasses.dataclass(frozen=True)
class PpoLm(Online):
    """Tune a language model by PPO: each token an action, the KL from the model at the start part of its reward.

    The run directory gets metrics.jsonl, TensorBoard logs, checkpoints, report.html with reward and KL curves and
    samples before and after, results.json and the tuned model (model/). A stopped run goes on with --resume.

    Example: jaxalign ppo-lm --data prompts.jsonl --reward-model runs/reward/model --out runs/rlhf
    """

    out: Path = Path("runs/ppo-lm")
    """The run directory."""
    kl: float = 0.05
    """Price of a nat of KL; the first one with --kl-target."""
    kl_target: float | None = None
    """Nats per completion towards which an adaptive controller steers the KL. Default: the price stays."""
    kl_horizon: int = 10_000
    """Completions over which the controller acts."""
    missing_stop_penalty: float = 0.0
    """Taken from the reward of a completion that was cut off."""
    gae_lambda: float = 0.95
    """Of the advantages."""
    value_coefficient: float = 0.1
    """Weight of the value loss."""
    whiten_rewards: bool = False
    """Scale token rewards to deviation 1."""
    epochs: int = 4
    """Passes over a rollout's completions."""

    def run(self) -> None:
        """Load, measure, train, measure again, report."""
        from rich.console import Console

        from jaxalign.cli.online_run import run

        run(self, Console())
