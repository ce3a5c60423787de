"""`jaxalign dpo`: tune a language model on preference pairs, and say with intervals what that changed."""

import dataclasses
from pathlib import Path
from typing import Literal

Loss = Literal[
    "dpo", "ipo", "hinge", "robust", "exo", "nca", "bco", "sppo", "aot", "aot-unpaired", "apo-zero", "apo-down",
    "discopop", "simpo", "orpo", "cpo",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Tune a language model on preference pairs with DPO or another loss of its family.

    The run directory gets metrics.jsonl, TensorBoard logs, checkpoints, report.html, results.json and the tuned model
    as a Hugging Face folder (model/). A stopped run goes on with --resume, exactly where it was.

    Example: jaxalign dpo --data pairs.jsonl.gz --lora --out runs/first
    """

    data: Path | None = None
    """Preference pairs: JSONL, JSON (either may be .gz) or Parquet, with prompt/chosen/rejected, or with
    chosen/rejected dialogues. Default: a small set of right and wrong answers that comes with jaxalign."""
    model: str = "smollm2-135m"
    """A Hugging Face folder, a .gguf file, or the name smollm2-135m."""
    out: Path = Path("runs/dpo")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    loss: Loss = "dpo"
    """Which loss of the family."""
    beta: float = 0.1
    """Strength of the pull towards the reference (for orpo: weight of the odds-ratio term)."""
    gamma: float = 0.5
    """Target margin; simpo only."""
    label_smoothing: float = 0.0
    """Share of labels believed flipped; dpo, robust and exo only (exo needs it above 0)."""
    lora: bool = False
    """Train low-rank adapters on a frozen model instead of all weights."""
    lora_rank: int = 16
    """Rank of the adapters, which are scaled by 2."""
    learning_rate: float | None = None
    """Peak of a warm-up and cosine decay. Default: 2e-4 with --lora, 1e-5 without."""
    epochs: float = 1.0
    """Passes over the training pairs."""
    batch_size: int = 16
    """Pairs per optimiser step."""
    microbatch: int = 4
    """Pairs whose activations are in memory at once; gradients accumulate to exactly those of the batch."""
    max_length: int = 512
    """Tokens of prompt and answer; long prompts lose their beginning."""
    held_out: float = 0.2
    """Share of prompts kept for evaluation."""
    limit: int | None = None
    """Use only so many pairs of the file (drawn at random)."""
    seeds: int = 1
    """Train so many models that differ in adapters and in the order of the data; the report gives their spread."""
    seed: int = 0
    """The first seed; it also fixes the held-out split."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; sums stay in float32."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""
    export: bool = True
    """Write the tuned model (of the first seed) to model/."""

    def run(self) -> None:
        """Load, split, score the reference, train, evaluate, report."""
        from rich.console import Console

        from jaxalign.cli.dpo_run import run

        run(self, Console())
