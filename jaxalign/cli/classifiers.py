"""The classifiers of `jaxalign robust-train` and `jaxalign attack`: small networks for images, kept in a file."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import Network
from jaxalign.networks import MLP, ConvNet
from jaxalign.networks.convolution import convolve
from jaxalign.runtime.chunks import named_leaves
from jaxalign.types import Array, Params

FILE = "classifier.npz"
DESCRIPTION = "description"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a classifier's parameters belong to, and which data it was trained on.

    network: "conv" or "mlp"; channels, kernel, hidden: its sizes
    image: (H, W, C), of the images it takes
    data, held_out, seed: the arguments of `load_images` that gave the data, so that its test images can be had again
    """

    network: str
    channels: tuple[int, ...]
    kernel: int
    hidden: tuple[int, ...]
    image: tuple[int, ...]
    num_classes: int
    data: str
    held_out: float
    seed: int


@functools.lru_cache(maxsize=8)  # the same object for the same description, and so one compilation
def network_of(description: Description, convolution: Callable[..., Array] = convolve) -> Network:
    """`apply(params, x [B, H, W, C]) -> logits [B, num_classes]`; `convolution` as in ConvNet."""
    if description.network == "conv":
        sizes = description.channels, description.hidden
        kernel = description.kernel
        convolutional = ConvNet(description.num_classes, *sizes, kernel_size=kernel, convolution=convolution)
        return Network.from_linen(convolutional, jnp.zeros((1, *description.image)))
    layers = MLP((*description.hidden, description.num_classes))
    dense = Network.from_linen(layers, jnp.zeros((1, math.prod(description.image))))
    return Network(dense.init, lambda params, x: dense.apply(params, x.reshape(x.shape[0], -1)))


class Classifier:
    """`x [B, H, W, C] -> logits [B, C]` with parameters that may be exchanged: an attack is compiled once for all."""

    def __init__(self, network: Network, params: Params) -> None:
        self.network, self.params = network, params

    def __call__(self, x: Array) -> Array:
        return self.network.apply(self.params, x)

    def classes(self, x: np.ndarray) -> np.ndarray:
        """[B], the class of the largest logit of each image."""
        return np.asarray(jax.jit(self.network.apply)(self.params, x)).argmax(axis=1)


def save_classifier(directory: Path, description: Description, params: Params) -> Path:
    """Write parameters with leaves [lanes, ...] and what they belong to as `directory`/classifier.npz."""
    arrays: dict[str, Any] = {f"params/{name}": np.asarray(x) for name, x in named_leaves(params).items()}
    arrays[DESCRIPTION] = json.dumps(dataclasses.asdict(description))
    path = directory / FILE
    np.savez_compressed(path, **arrays)
    return path


def load_classifier(source: Path) -> tuple[Description, Params]:
    """The description, and the parameters with leaves [lanes, ...], from a run directory or a classifier.npz.

    Raises FileNotFoundError, and ValueError naming the file and what it lacks.
    """
    path = source / FILE if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(f"no {FILE} at {source}: give the run directory of a finished `jaxalign robust-train`")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        fields = json.loads(str(arrays.pop(DESCRIPTION)))
        known: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        description = Description(**known)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path} is not a classifier of `jaxalign robust-train`: {error}") from error
    expected = jax.eval_shape(network_of(description).init, jax.random.key(0))
    names = [f"params/{name}" for name in named_leaves(expected)]
    if set(names) != arrays.keys():
        raise ValueError(f"{path}: its network has {', '.join(sorted(names))}; the file {', '.join(sorted(arrays))}")
    for name, leaf in zip(names, jax.tree.leaves(expected), strict=True):
        if arrays[name].shape[1:] != leaf.shape:
            raise ValueError(f"{path}: {name} is {arrays[name].shape}, needs [lanes, *{leaf.shape}]")
    return description, jax.tree.unflatten(jax.tree.structure(expected), [jnp.asarray(arrays[name]) for name in names])
