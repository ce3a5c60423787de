"""The classifiers and images that both sides of the attacks benchmark work on, by NumPy alone.

Nothing of JAX in here: the peers read what `benchmarks.attacks.prepare` wrote.
"""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIABLE = "JAXALIGN_MNIST"
CHANNELS, KERNEL, HIDDEN = (16, 32), 4, (100,)
MLP_HIDDEN = (256, 256)
SIDE, CLASSES = 28, 10


class Problem(NamedTuple):
    """x: [N, 28, 28] float32 in [0, 1]; y: [N] int32; weights: arrays by name ("MLP_0/Dense_0/kernel")."""

    x: np.ndarray
    y: np.ndarray
    weights: dict[str, np.ndarray]


def data_name() -> str:
    """The images used: MNIST where JAXALIGN_MNIST names its .npz, else scikit-learn's digits drawn larger."""
    return "mnist" if os.environ.get(VARIABLE) else "digits"


def path_of(network: str, epsilon: float) -> pathlib.Path:
    """Where the classifier of this kind, trained against this radius, lies."""
    return ROOT / "runs" / "benchmarks" / f"attacks-{network}-{data_name()}-{epsilon}.npz"


def read(case: dict[str, Any]) -> Problem:
    """The first `examples` held-out images of the case and its classifier's weights."""
    path = path_of(case["network"], case["epsilon"])
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    x, y = arrays.pop("x")[: case["examples"]], arrays.pop("y")[: case["examples"]]
    if len(x) < case["examples"]:
        raise ValueError(f"{path} holds {len(x)} images, {case['examples']} are asked for")
    return Problem(x, y, arrays)


def success_rate(predictions: np.ndarray, problem: Problem) -> float:
    """The share of images [N] not given their own class: those the classifier mistakes unattacked included."""
    return float(np.mean(np.asarray(predictions) != problem.y))
