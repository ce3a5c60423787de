"""`jaxalign generate`: answers from a language model, to one prompt, in a chat, or for a file of prompts."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Generate:
    """Let a language model write: answer a prompt, chat at the terminal, or complete a file of prompts.

    With a prompt the answer is streamed and the program ends; without one it is a chat (an empty line or Ctrl-D ends
    it, Ctrl-C ends an answer). With --file every prompt of the file is completed, in batches, into a JSONL file.

    Example: jaxalign generate "Why is the sky blue?" --model runs/first/model
    """

    prompt: Annotated[str | None, tyro.conf.Positional] = None
    """What to answer. Without it (and without --file), a chat."""
    model: str = "smollm2-135m"
    """A Hugging Face folder (a run's model/, say), a .gguf file, or the name smollm2-135m."""
    file: Path | None = None
    """Prompts: JSONL, JSON (either may be .gz) or Parquet, each row with a text or a list of messages as `prompt`."""
    out: Path | None = None
    """Where --file's completions go, one JSON object a row; rows that are there already are not made again.
    Default: beside the file, with .completions.jsonl in place of its ending."""
    system: str | None = None
    """A system message before the conversation."""
    raw: bool = False
    """Continue the text as it is, without the model's chat template."""
    temperature: float = 0.7
    """Divides the logits; smaller is more predictable."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float = 0.95
    """Draw from the fewest tokens whose probabilities reach p; 1 is all."""
    min_p: float = 0.0
    """Draw from tokens at least p times as probable as the most probable one; 0 is all."""
    greedy: bool = False
    """Always take the most probable token."""
    max_new_tokens: int = 256
    """Longest answer."""
    samples: int = 1
    """Completions per prompt of --file."""
    batch_size: int = 8
    """Prompts of --file completed at once."""
    context: int = 1024
    """Tokens of conversation kept in a chat; the oldest turns are forgotten when it is full."""
    seed: int = 0
    """Same seed, same answers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and the matrix products; sums stay in float32."""

    def run(self) -> None:
        """Load the model and write."""
        from rich.console import Console

        from jaxalign.cli.generate_run import run

        run(self, Console())
