"""Certificates of many images in chunks, kept on disk so that none is computed twice."""

import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxalign import Network
from jaxalign.certification.margins import margin_lower_bounds
from jaxalign.cli.certify import Certify
from jaxalign.cli.classifiers import Classifier
from jaxalign.cli.named_attacks import BOUNDS
from jaxalign.runtime.metrics import MetricsLog
from jaxalign.types import Array, Params

CAPACITY = 128  # rows that CROWN walks back at a time
HALVINGS = 6  # of the gap between two epsilons, in which an image's radius is looked for
WorstMargin = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Certificates(NamedTuple):
    """Of B images at E rising epsilons: certified [E, B] bool; radius [B], as far as was proven, 0 where nothing was.

    seconds: [chunks], of certifying alone; of a chunk that was read from disk what it took then
    """

    epsilons: np.ndarray
    certified: np.ndarray
    radius: np.ndarray
    seconds: np.ndarray


def certify(options: Certify, classifier: Classifier, x: np.ndarray, y: np.ndarray, console: Console) -> Certificates:
    """Certify `batch_size` images after another; those whose results are on disk are not done again."""
    epsilons = np.array(sorted(options.epsilons), np.float32)
    worst_margin = _worst_margin(options.method, classifier)
    chunks = kept_chunks(
        options, classifier, x, y, {"method": options.method, "epsilons": epsilons.tolist(), "halvings": HALVINGS},
        lambda x, y: _chunk(worst_margin, x, y, epsilons),
    )  # fmt: skip
    done: list[dict[str, np.ndarray]] = []
    options.out.mkdir(parents=True, exist_ok=True)
    with MetricsLog(options.out, steps=0, tensorboard=True) as log:
        for number, chunk in enumerate(chunks):
            done.append(chunk)
            certified = np.concatenate([one["certified"] for one in done], axis=1)
            count, shares = certified.shape[1], certified.mean(axis=1)
            metrics = {"certified": shares, "images": count, "seconds": chunk["seconds"]}
            log.write(number, {name: np.asarray(value)[None] for name, value in metrics.items()}, 1)
            said = ", ".join(f"{share:.1%} at {e:g}" for share, e in zip(shares, epsilons, strict=True))
            console.print(f"{count}/{len(y)} images  certified: {said}", highlight=False)
    radius, seconds = np.concatenate([one["radius"] for one in done]), np.array([one["seconds"] for one in done])
    return Certificates(epsilons, certified, radius, seconds)


def kept_chunks(
    options: Certify,
    classifier: Classifier,
    x: np.ndarray,
    y: np.ndarray,
    settings: dict[str, Any],
    compute: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]],
) -> Iterator[dict[str, np.ndarray]]:
    """What `compute` gives (arrays whose last axis is that of the images) for `batch_size` images after another.

    Adds "seconds", a scalar. Results are kept on disk by a digest of settings, images, labels and parameters, and read
    from there where the same is asked again; a damaged file is computed again.
    """
    size = min(options.batch_size, len(y))
    folder = options.out / "certificates"
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(y), size):
        some_x, some_y = x[start : start + size], y[start : start + size]
        path = folder / f"{_digest(settings, classifier.params, some_x, some_y)}.npz"
        if (found := _read(path)) is None:
            began, rows = time.perf_counter(), np.resize(np.arange(len(some_y)), size)  # one shape, one compilation
            found = {name: value[..., : len(some_y)] for name, value in compute(some_x[rows], some_y[rows]).items()}
            found["seconds"] = np.array(time.perf_counter() - began)
            _write(path, found)
        yield found


def _worst_margin(method: str, classifier: Classifier) -> WorstMargin:
    """`(x [B, ...], y [B], epsilon [B]) -> [B]`, the least of each row's margin bounds."""

    def bound(x: np.ndarray, y: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
        return np.asarray(_least_margins(classifier.network, method, classifier.params, x, y, epsilon))

    return bound


@functools.partial(jax.jit, static_argnums=(0, 1))
def _least_margins(network: Network, method: str, params: Params, x: Array, y: Array, epsilon: Array) -> Array:
    def apply(x: Array) -> Array:
        return network.apply(params, x)

    return margin_lower_bounds(apply, x, y, epsilon, method=method, bounds=BOUNDS, capacity=CAPACITY).min(axis=1)


def _chunk(worst_margin: WorstMargin, x: np.ndarray, y: np.ndarray, epsilons: np.ndarray) -> dict[str, np.ndarray]:
    """At each epsilon, then each image's radius between the last that held and the first that did not, by halving.

    Loops on the host: XLA runs convolutions slowly inside a loop on a CPU.
    """
    holds = np.stack([worst_margin(x, y, np.full(len(y), epsilon)) > 0 for epsilon in epsilons])
    certified = np.logical_or.accumulate(holds[::-1])[::-1]  # what holds in a ball holds in a smaller one
    radius = np.where(certified, epsilons[:, None], 0).max(axis=0)
    above = np.where(certified, np.inf, epsilons[:, None]).min(axis=0)
    above = np.where(np.isinf(above), radius, above)
    for _ in range(HALVINGS):
        middle = ((radius + above) / 2).astype(np.float32)
        better = worst_margin(x, y, middle) > 0
        radius, above = np.where(better, middle, radius), np.where(better, above, middle)
    return {"certified": certified, "radius": radius.astype(np.float32)}


def _digest(settings: dict[str, Any], params: Params, x: np.ndarray, y: np.ndarray) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for part in (x, y, *jax.tree.leaves(params)):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, chunk: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **chunk)
    partial.replace(path)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """None where there is no such file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
