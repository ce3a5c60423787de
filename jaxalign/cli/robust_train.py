"""`jaxalign robust-train`: train a classifier of images to withstand changes, and measure what it withstands."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RobustTrain:
    """Train a small image classifier on attacked images, and measure it with attacks it has not met.

    Ends with accuracy on clean test images and under FGSM, PGD and AutoAttack with intervals, the curve over epsilons,
    signs of masked gradients, and pictures; of ibp, crown-ibp and sabr also the share certified. The run directory gets
    report.html, results.json, the network (classifier.npz, which `jaxalign attack --model` takes), metrics, TensorBoard
    logs and checkpoints. A stopped run goes on with --resume, and skips attacks that are done.

    Examples:
      jaxalign robust-train
      jaxalign robust-train --method trades --seeds 4
      jaxalign robust-train --data mnist.npz --epsilon 0.3 --steps 5000 --attack-steps 20 --batch-size 100
      jaxalign robust-train --data mnist.npz --epsilon 0.3 --steps 20000 --method ibp --batch-size 200
    """

    data: str = "digits"
    """`digits`, the 1,797 8x8 digits of scikit-learn, or an .npz file: x_train, y_train, x_test, y_test, or x and y;
    images [N, H, W] or [N, H, W, C], uint8 or floats in [0, 1]."""
    out: Path = Path("runs/robust-train")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    method: Literal["pgd", "trades", "fast", "free", "plain", "ibp", "crown-ibp", "sabr"] = "pgd"
    """Train on PGD's images (pgd), on clean ones with PGD's as a penalty (trades), on single large steps from random
    starts (fast), on each batch several times with a perturbation that lives on (free), or without attack (plain). For
    certificates: on bounds of the worst case, by intervals (ibp), with the help of linear bounds while epsilon grows
    (crown-ibp), or by intervals around PGD's images (sabr)."""
    epsilon: float = 0.15
    """How far an attack may move each pixel (with --norm l2, l1: the whole image), where black is 0 and white 1."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """How that distance is measured."""
    warm_up: float = 0.3
    """Over this share of training epsilon grows from 0; from the start at full size small nets may learn nothing but
    the commonest class."""
    natural: float = 0.03
    """Share of training before epsilon begins to grow (ibp, crown-ibp, sabr)."""
    train_epsilon: float | None = None
    """What epsilon grows to where bounds are trained on (ibp, crown-ibp, sabr). Default: 1.1 times --epsilon."""
    kappa: float = 0.5
    """Weight of the loss on clean images once epsilon is at its largest (ibp, crown-ibp, sabr)."""
    sabr_share: float = 0.4
    """Radius of the box that sabr bounds, as a share of epsilon."""
    attack_steps: int = 10
    """Steps of the attack in training (pgd, trades, sabr)."""
    attack_step_size: float | None = None
    """Length of an attack's step, in pixel values. Default: 2.5 epsilon / attack-steps; of fast 1.25 epsilon, of sabr
    half of it."""
    clean_weight: float = 0.0
    """Share of the loss that clean images have (pgd, fast)."""
    trades_beta: float = 6.0
    """Weight of TRADES' penalty: how much stability counts beside accuracy on clean images."""
    replays: int = 4
    """How often `free` uses a batch in a row; each time is one of --steps."""
    network: Literal["conv", "mlp"] = "conv"
    """Convolutions that halve the image each, then dense layers; or dense layers alone."""
    channels: tuple[int, ...] = (16, 32)
    """Of the convolutions."""
    kernel: int = 4
    """Width of the convolutions in pixels."""
    hidden: tuple[int, ...] = (100,)
    """Widths of the hidden dense layers."""
    steps: int = 1500
    """Optimiser steps of each seed."""
    batch_size: int = 100
    """Images per step."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or stochastic gradient descent with Nesterov momentum 0.9."""
    learning_rate: float | None = None
    """Its peak: it rises over the first twentieth of training and falls to 0 along a cosine. Default: 2e-3 of Adam, 0.1
    of sgd."""
    seeds: int = 1
    """Networks trained, each from its own start and on its own order of the images."""
    seed: int = 0
    """Where the seeds' random numbers begin; also splits data that is not split already."""
    limit: int | None = None
    """Train on so many images only (drawn at random)."""
    held_out: float = 0.2
    """Share of each class kept for the test, where the data is not split already."""
    evaluate: int = 1000
    """Test images that FGSM and PGD attack (all, if there are fewer)."""
    evaluation_steps: int = 100
    """Steps of that PGD."""
    epsilons: tuple[float, ...] = ()
    """Points of the curve. Default: a third, two thirds, once and four thirds of --epsilon."""
    auto_attack: int = 500
    """Test images that AutoAttack attacks at --epsilon, the slowest and strongest of them; 0 leaves it out."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""

    def run(self) -> None:
        """Train, attack, report."""
        from rich.console import Console

        from jaxalign.cli.robust_train_run import run

        run(self, Console())
