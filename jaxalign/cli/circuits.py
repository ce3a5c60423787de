"""`jaxalign circuits`: which parts of a network do a task, found by patching and held against ablation."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Circuits:
    """Find the circuit that does a task, and measure how much of the behaviour it keeps.

    Every edge between parts of the network gets a score (EAP-IG: what the metric gains by the edge, from gradients on
    the way between a clean input and its corrupted twin). Circuits of growing size are kept while all other edges carry
    what they carry in the corrupted run; the smallest one that does the task is held against other inputs:
    faithfulness, completeness and minimality with 95% bootstrap intervals, beside random circuits of the same size.
    Some edges are cut one by one to see how good the scores are, and ACDC prunes further.

    Without --model a small network is trained, in seconds, on a task whose circuit is known: its first output is the
    exclusive or of inputs 0 and 1, and nothing else may turn up. With a language model the task is the indirect
    object ("When Ann and Tom went to the park, Tom gave a ball to"); heads and positions are patched as well.

    The run directory gets report.html, results.json, circuit.npz and the arrays of each stage (stages/). A stopped run
    goes on with --resume, with the stages it has not done.

    Examples:
      jaxalign circuits
      jaxalign circuits --model smollm2-135m --prompts 32
      jaxalign circuits --model smollm2-135m --template 1 --acdc-edges 0 --out runs/ioi-1
    """

    model: str = "mlp"
    """mlp, a network trained here; or a language model: a Hugging Face folder, a .gguf file, or smollm2-135m."""
    task: Literal["boolean", "ioi"] | None = None
    """boolean: logic of a few of many inputs, for mlp. ioi: the indirect object, for language models."""
    out: Path = Path("runs/circuits")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    prompts: int = 32
    """Examples; the circuit is found on the first half of them and judged on the second."""
    template: Literal[0, 1, 2] = 0
    """Which sentence the prompts are made from (ioi)."""
    exact_prompts: int = 8
    """Of the first half, how many exact patching, ACDC and minimality see: they take a run for each part."""
    steps: int = 5
    """Points on the way from corrupted to clean at which EAP-IG takes the gradient."""
    sizes: tuple[int, ...] = ()
    """Circuits to try, by their number of edges. Default: doubling from 10 up to all."""
    faithful: float = 0.85
    """The circuit is the smallest whose faithfulness on the first half is this near to 1 (0.85: between 0.85 and
    1.15)."""
    random_circuits: int = 3
    """Random circuits of each size, for comparison."""
    exact_edges: int = 100
    """Edges cut one by one, half of them the strongest by score and half at random."""
    acdc_edges: int = 400
    """Edges that ACDC begins from, the strongest by score, each costing a run; 0 leaves it out."""
    threshold: float = 0.005
    """ACDC's tau: an edge goes if that costs less than this share of what the network gains over the corrupted run."""
    batch_size: int = 8
    """Examples computed at once."""
    seed: int = 0
    """Of the examples, the network trained without --model, the random circuits and the resamples."""

    def run(self) -> None:
        """Load or train, patch, score, choose, evaluate, report."""
        from rich.console import Console

        from jaxalign.cli.circuits_run import run

        run(self, Console())
