"""`jaxalign reward`: train a reward model on preference pairs, and say how far it can be trusted."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Reward:
    """Train a reward model, or an ensemble of them, on preference pairs.

    Part of the training pairs is kept for validation: training stops once their loss no longer falls, and the best
    parameters are kept. The run directory gets metrics.jsonl, TensorBoard logs, checkpoints, report.html, results.json
    and the model (model/, for `jaxalign.interop.load_reward_model`). A stopped run goes on with --resume.

    Example: jaxalign reward --data pairs.jsonl.gz --lora --out runs/reward
    """

    data: Path | None = None
    """Preference pairs: JSONL, JSON (either may be .gz) or Parquet, with prompt/chosen/rejected, or with
    chosen/rejected dialogues. Default: a small set of right and wrong answers that comes with jaxalign."""
    model: str = "smollm2-135m"
    """The language model under the head: a Hugging Face folder, a .gguf file, or the name smollm2-135m."""
    out: Path = Path("runs/reward")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    ensemble: int = 1
    """Train so many members, each on a bootstrap of the pairs, and judge by their mean."""
    label_smoothing: float = 0.0
    """Share of labels believed flipped."""
    centering: float = 0.01
    """Weight of the penalty that keeps rewards around 0."""
    lora: bool = False
    """Train low-rank adapters and the head on a frozen model instead of all weights."""
    lora_rank: int = 16
    """Rank of the adapters, which are scaled by 2."""
    learning_rate: float | None = None
    """Peak of a warm-up and cosine decay. Default: 2e-4 with --lora, 1e-5 without."""
    epochs: float = 2.0
    """Passes over the training pairs, at most."""
    batch_size: int = 16
    """Pairs per optimiser step."""
    microbatch: int = 4
    """Pairs whose activations are in memory at once; gradients accumulate to exactly those of the batch."""
    max_length: int = 512
    """Tokens of prompt and answer; long prompts lose their beginning."""
    held_out: float = 0.2
    """Share of prompts kept for the test."""
    validation: float = 0.1
    """Share of the other prompts kept for validation."""
    check_every: int | None = None
    """Steps between looks at the validation loss. Default: a quarter of an epoch."""
    patience: int = 4
    """Looks in a row without a lower validation loss before training stops."""
    limit: int | None = None
    """Use only so many pairs of the file (drawn at random)."""
    seed: int = 0
    """Of the head, the adapters, the order of the pairs and the splits."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; sums stay in float32."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    export: bool = True
    """Write the reward model to model/."""

    def run(self) -> None:
        """Load, split, train until validation says stop, test, report."""
        from rich.console import Console

        from jaxalign.cli.reward_run import run

        run(self, Console())
