"""`jaxalign attack`: how far a classifier of images can be trusted when someone wants it to err."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Attack:
    """Attack a classifier of images, and report its accuracy under each attack at each epsilon.

    The model is one that `jaxalign robust-train` left in its run directory; without --model a plain one is trained on
    the data first. The run directory gets report.html (the curve over epsilons, pictures, what is taken for what, signs
    of masked gradients), results.json and the adversarial images (adversarial.npz). A stopped run goes on with
    --resume: attacks that are done are kept and not run again.

    Examples:
      jaxalign attack
      jaxalign attack --model runs/robust-train --attacks pgd auto_attack --epsilons 0.1 0.15 0.2
      jaxalign attack --data mnist.npz --model runs/mnist --examples 1000 --epsilons 0.3
    """

    model: Path | None = None
    """The run directory of `jaxalign robust-train` (of several seeds its first), or a classifier.npz. Default: train
    a plain classifier, which takes seconds on digits."""
    data: str | None = None
    """`digits`, the 1,797 8x8 digits of scikit-learn, or an .npz file: x_train, y_train, x_test, y_test, or x and y;
    images [N, H, W] or [N, H, W, C], uint8 or floats in [0, 1]. Default: what the model was trained on, or digits. Data
    that is not split already is split as it was for the model, so that test images are new to it."""
    out: Path = Path("runs/attack")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    attacks: tuple[Literal["fgsm", "pgd", "apgd", "auto_attack", "cw", "fab", "square"], ...] = (
        "fgsm", "pgd", "square", "auto_attack",
    )  # fmt: skip
    """fgsm: one step. pgd: many, from random starts. apgd: with steps that adapt. square: sees outputs only, no
    gradients. fab: the nearest point across the boundary. cw: the nearest in L2 (needs --norm l2). auto_attack: the
    standard ensemble of apgd, fab and square, the one to quote."""
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2)
    """How far an attack may move each pixel (with --norm l2, l1: the whole image), where black is 0 and white 1."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """How that distance is measured."""
    examples: int = 200
    """Test images attacked (all, if there are fewer)."""
    steps: int = 40
    """Steps of pgd."""
    restarts: int = 1
    """Starts of pgd; the worst counts."""
    pictures: int = 8
    """Images in each picture of the report."""
    batch_size: int = 500
    """Images attacked at once."""
    seed: int = 0
    """Of the attacks' random numbers, the images drawn and the plain classifier."""

    def run(self) -> None:
        """Train or load, attack, report."""
        from rich.console import Console

        from jaxalign.cli.attack_run import run

        run(self, Console())
