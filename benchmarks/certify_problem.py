"""The networks and images that both sides of the certify benchmark bound, by NumPy alone.

Nothing of JAX in here: the peer reads what `benchmarks.certify.prepare` wrote.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from benchmarks.attacks_problem import CLASSES, ROOT, Problem, data_name


class Size(NamedTuple):
    """channels of the convolutions (4x4, stride 2), none for an MLP; hidden: widths of the dense layers between."""

    channels: tuple[int, ...]
    hidden: tuple[int, ...]


NETWORKS = {
    "mlp small": Size((), (100, 100)),
    "mlp medium": Size((), (512, 512, 512)),
    "conv small": Size((16, 32), (100,)),
    "conv larger": Size((32, 64), (256,)),
}


def path_of(network: str) -> pathlib.Path:
    """Where the network of this name lies."""
    return ROOT / "runs" / "benchmarks" / f"certify-{network.replace(' ', '-')}-{data_name()}.npz"


def read(case: dict[str, Any]) -> Problem:
    """The first `images` held-out images of the case and its network's weights."""
    with np.load(path_of(case["network"])) as file:
        arrays = {name: file[name] for name in file.files}
    x, y = arrays.pop("x")[: case["images"]], arrays.pop("y")[: case["images"]]
    if len(x) < case["images"]:
        raise ValueError(f"{path_of(case['network'])} holds {len(x)} images, {case['images']} are asked for")
    return Problem(x, y, arrays)


def specification(y: np.ndarray) -> np.ndarray:
    """[B, C-1, C] float32: z_y - z_j for each other class j in order."""
    identity = np.eye(CLASSES, dtype=np.float32)
    return np.stack([identity[label] - np.delete(identity, label, axis=0) for label in y])


def quality(bounds: np.ndarray) -> dict[str, float]:
    """Of margin bounds [B, C-1]: their mean, which both sides must share, and the share of images with none below 0."""
    return {"mean margin": float(bounds.mean()), "certified": float((bounds > 0).all(axis=1).mean())}
