"""`jaxalign sae`: sparse autoencoders of several sparsities on a language model's activations, in one run."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Sae:
    """Train sparse autoencoders on what a language model computes over text, all sparsities and seeds in one program.

    The text is packed into rows, the model is run up to one layer, and its activations are kept on disk. Autoencoders
    with every k (or lambda) and seed then learn from the same shuffled batches, and are measured on text that was held
    out: L0, explained variance, and how much of the model's loss is recovered when the reconstruction takes the place
    of the activation, with 95% intervals.

    The run directory gets activations/, metrics.jsonl, TensorBoard logs, checkpoints, report.html (the frontier of L0
    against explained variance, how often features fire), results.json, and each autoencoder in SAELens' format (saes/).
    A stopped run goes on with --resume, in the middle of collecting too. `jaxalign features RUN` then shows what the
    features stand for.

    Examples:
      jaxalign sae
      jaxalign sae --model smollm2-135m --layer 15 --text pairs.jsonl.gz --tokens 300000 --d-sae 4608 --k 16 32 64
      jaxalign sae --activation jumprelu --sparsity 0.5 2 8 --seeds 3
    """

    model: str = "smollm2-135m"
    """A Hugging Face folder, a .gguf file, or the name smollm2-135m."""
    layer: int | None = None
    """Which layer, counted from 0. Default: the middle one (15 of SmolLM2's 30)."""
    site: str = "resid_post"
    """What to read in that layer: resid_pre, resid_mid or resid_post (the residual stream), attention_out, mlp_out,
    mlp_post (the neurons), attention_z (the heads, joined). A name that does not exist is answered with the list."""
    text: Path | None = None
    """What the model reads: any text file, or rows (.jsonl, .json, either .gz, or .parquet) with a field text, content,
    chosen (preference pairs), messages or prompt. Default: Python's own language reference, which every Python carries
    (pydoc_data; about 114,000 tokens of technical English). Learn from your own domain for features of that domain."""
    out: Path = Path("runs/sae")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    tokens: int = 65_536
    """Read at most so many tokens of the text. Good features want millions; this is what a laptop reads in a minute."""
    length: int = 128
    """Tokens in a row of text."""
    skip: int = 4
    """First positions of each row that are left out. Heads with nothing to look at park there, which makes activations
    (in SmolLM2) up to 150 times as long as the others."""
    held_out: float = 0.1
    """Share of the rows kept for evaluation, the last of the text."""
    d_sae: int = 2304
    """Features of each autoencoder."""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"] = "batchtopk"
    """topk, batchtopk and matryoshka keep k features a token (the latter two on average); the others are held down by a
    penalty. matryoshka orders its features into nested groups of d_sae/8, d_sae/4, d_sae/2 and d_sae."""
    k: tuple[int, ...] = (16, 32, 64)
    """Features a token, one autoencoder each (topk, batchtopk, matryoshka)."""
    sparsity: tuple[float, ...] = ()
    """Strength of the penalty, one autoencoder each. Default: 1 2 4 for relu and gated, 0.5 2 8 for jumprelu."""
    seeds: int = 1
    """Train so many of each that differ in how they begin; they see the same batches."""
    seed: int = 0
    """The first seed; it also fixes the order of the data."""
    steps: int = 400
    """Optimiser steps."""
    batch_size: int = 1024
    """Tokens in a step."""
    learning_rate: float = 3e-3
    """Of Adam; it warms up over a twentieth of the steps and falls to zero over the last fifth."""
    dead_after: int = 100_000
    """Tokens without firing after which a feature counts as dead and is taught what the others miss (AuxK)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products, of the model as of the autoencoders; sums stay in float32."""
    stored_as: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the activations on disk."""
    evaluated_rows: int = 16
    """Held-out rows over which the model's loss is measured, at most."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def run(self) -> None:
        """Collect, train, evaluate, save, report."""
        from rich.console import Console

        from jaxalign.cli.sae_run import run

        run(self, Console())
