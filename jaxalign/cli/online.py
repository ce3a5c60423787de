"""The options that `jaxalign grpo` and `jaxalign ppo-lm` share: a language model, prompts, and what pays."""

import dataclasses
from pathlib import Path
from typing import Literal

TaskName = Literal["length", "arithmetic", "bullets"]


@dataclasses.dataclass(frozen=True)
class Online:
    """Learning from the model's own completions."""

    task: TaskName = "length"
    """An embedded task with a reward that a program checks: answers of twelve words, sums, or bullet lists. Ignored
    with --data."""
    data: Path | None = None
    """Prompts of your own: JSONL, JSON (either may be .gz) or Parquet with a field `prompt` (text or messages); other
    fields reach the reward function. Needs --reward or --reward-model, or rows with a number in `answer`."""
    reward: str | None = None
    """A reward function of your own, FILE.py:NAME, called as NAME(prompts=[...], completions=[...], **columns) and
    returning a number for each completion."""
    reward_model: Path | None = None
    """A folder that `jaxalign reward` wrote: pay by its reward model."""
    model: str = "smollm2-135m"
    """A Hugging Face folder, a .gguf file, or the name smollm2-135m."""
    resume: bool = False
    """Go on with the run in --out."""
    steps: int = 45
    """Rollouts, each with its gradient steps."""
    prompts: int = 4
    """Prompts in a rollout."""
    samples: int = 8
    """Completions of each prompt."""
    max_new_tokens: int = 32
    """Length at which a completion is cut off."""
    max_prompt_length: int = 256
    """Longest prompt, in tokens; longer ones are refused by name."""
    plain: bool = False
    """Do not put text prompts through the model's chat template."""
    temperature: float = 0.7
    """Of the sampling, and of the policy that learns."""
    lora: bool = True
    """Train low-rank adapters on a frozen model (--no-lora: all weights)."""
    lora_rank: int = 16
    """Rank of the adapters, which are scaled by 2."""
    learning_rate: float | None = None
    """Constant after five steps of warm-up. Default: 2e-4 with adapters, 2e-6 without."""
    clip: float = 0.2
    """How far the probability ratio may gain from moving."""
    minibatches: int = 1
    """Gradient steps in a pass over a rollout's completions."""
    microbatch: int = 16
    """Completions whose activations are in memory at once; gradients accumulate to exactly those of the minibatch."""
    held_out: int = 32
    """Prompts kept for the comparison of before and after."""
    seed: int = 0
    """Fixes prompts, adapters and samples."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; sums stay in float32."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    export: bool = True
    """Write the tuned model to model/, for `jaxalign generate --model OUT/model`."""
