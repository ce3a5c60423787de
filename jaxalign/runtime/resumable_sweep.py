"""Sweeps that survive being cut: lanes that are done are on disk and not run again."""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from jaxalign.runtime.chunks import named_leaves
from jaxalign.sweeps import sweep
from jaxalign.types import Array, Key

IDENTITY = "sweep.json"


def resumable_sweep(
    run: Callable[[Any, Key], Any],
    hypers: Any,
    keys: Array,
    *,
    directory: str | os.PathLike[str],
    lanes: int = 16,
    fingerprint: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    mode: str = "auto",
    progress: bool | Console = True,
    callback: Callable[[int, int], object] | None = None,
) -> Any:
    """`jaxalign.sweep` of H settings and S seeds, a group of lanes at a time, each group kept in `directory` when done.

    Args:
        run, hypers, keys, mesh, mode: as for `sweep`; outputs are numeric arrays.
        lanes: lanes in a group; they are compiled once, the last group is filled up and the filling dropped.
        fingerprint: JSON values that say what `run` is, beside its settings and keys.
        progress: show progress on stderr, or on the rich Console given.
        callback: called as callback(lanes done, lanes in all) after each group.

    Called again with the same directory it reads the groups that are there and runs the others. Returns NumPy arrays
    with leading axes [H, S, ...] ([S, ...] if `hypers` is None), equal to those of an uncut run. A lane that is NaN is
    kept as it is. Raises ValueError if `directory` holds another sweep (naming what differs) or an output is no numeric
    array. A damaged group is run again.
    """
    directory = Path(directory)
    settings = jax.tree.leaves(hypers)
    shape = (settings[0].shape[0], keys.shape[0]) if settings else (keys.shape[0],)
    total, seeds = int(np.prod(shape)), keys.shape[0]
    structure = _structure(run, hypers, keys)
    directory.mkdir(parents=True, exist_ok=True)
    _claim(directory / IDENTITY, _identity(hypers, keys, lanes, fingerprint))

    def lane(hyper_and_key: tuple[Any, Key], _: Key) -> Any:
        return run(*hyper_and_key)

    def group(first: int) -> list[np.ndarray]:
        index = np.minimum(np.arange(first, first + lanes), total - 1)
        chosen = jax.tree.map(lambda x: jnp.asarray(x)[index // seeds], hypers), keys[index % seeds]
        found = sweep(lane, chosen, jax.random.split(jax.random.key(0), 1), mesh=mesh, mode=mode)
        return [np.asarray(x)[: total - first, 0] for x in jax.tree.leaves(found)]

    console = progress if isinstance(progress, Console) else Console(stderr=True)
    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    groups = []
    with Progress(*columns, console=console, disable=not progress) as bar:
        task = bar.add_task("lanes", total=total)
        for first in range(0, total, lanes):
            path = directory / f"lanes-{first:06d}.npz"
            if (arrays := _read(path, structure.num_leaves)) is None:
                arrays = group(first)
                _write(path, arrays)
            groups.append(arrays)
            done = min(first + lanes, total)
            bar.update(task, completed=done)
            if callback is not None:
                callback(done, total)
    joined = [np.concatenate(parts).reshape(*shape, *parts[0].shape[1:]) for parts in zip(*groups, strict=True)]
    return structure.unflatten(joined)


def _structure(run: Callable[[Any, Key], Any], hypers: Any, keys: Array) -> Any:
    """The tree of one lane's output; ValueError naming a leaf that NumPy cannot hold."""
    out = jax.eval_shape(run, jax.tree.map(lambda x: jnp.asarray(x)[0], hypers), keys[0])
    for name, leaf in named_leaves(out).items():
        if not (jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool):
            raise ValueError(f"resumable_sweep: the output {name!r} is {leaf.dtype}, not numeric")
    return jax.tree.structure(out)


def _identity(hypers: Any, keys: Array, lanes: int, fingerprint: Any) -> dict[str, Any]:
    """What must be the same for the lanes on disk to be this sweep's."""

    def digest(x: Any) -> str:
        array = np.asarray(x)
        return f"{array.dtype}{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"

    settings = {f"hypers/{name}": digest(x) for name, x in named_leaves(hypers).items()}
    return {**settings, "keys": digest(jax.random.key_data(keys)), "lanes": lanes, "fingerprint": fingerprint}


def _claim(path: Path, identity: dict[str, Any]) -> None:
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        path.write_text(json.dumps(identity, indent=2) + "\n")
        return
    old = json.loads(path.read_text())
    if differs := sorted(name for name in old.keys() | identity.keys() if old.get(name) != identity.get(name)):
        raise ValueError(f"resumable_sweep: {path.parent} holds another sweep: {', '.join(differs)} differ")


def _read(path: Path, count: int) -> list[np.ndarray] | None:
    """The arrays of a group, or None if it is not there whole; warns if it is there and damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            return [file[f"leaf{i}"] for i in range(count)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        warnings.warn(f"{path} is damaged ({error}): its lanes are run again", stacklevel=3)
        return None


def _write(path: Path, arrays: list[np.ndarray]) -> None:
    """All or nothing: written beside its place, then moved."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        leaves: dict[str, Any] = {f"leaf{i}": array for i, array in enumerate(arrays)}
        np.savez(file, **leaves)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
