"""Activations of a real model over text, kept on disk in shards: resumable, memory-mapped, read in shuffled batches."""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxalign.algorithm import Network
from jaxalign.interpretability.activations import capture
from jaxalign.types import Params

DESCRIPTION, TOKENS = "store.json", "tokens.npy"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class ActivationStore:
    """M activations at each of S sites, in the order of the text, as `collect_activations` left them in a directory.

    sites: the names; sizes: of each the last axis D
    tokens: [N, T] int32, the rows of text
    place: [M] int64, where each activation stood: row * T + position. Left-out positions have no activation.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open a directory. Raises FileNotFoundError if it holds no store, ValueError if one is not finished."""
        self.directory = Path(directory)
        if not (self.directory / DESCRIPTION).is_file():
            raise FileNotFoundError(f"{directory} holds no activation store ({DESCRIPTION} is missing)")
        self.description = json.loads((self.directory / DESCRIPTION).read_text())
        self.tokens = np.load(self.directory / TOKENS)
        self.sites: tuple[str, ...] = tuple(self.description["sites"])
        self.sizes: tuple[int, ...] = tuple(self.description["sizes"])
        kept = _kept(self.tokens, self.description["skip"], self.description["excluded"])
        self.place = np.flatnonzero(kept)
        # ends[j]: how many activations the shards up to j hold
        self.ends = np.cumsum([kept[rows].sum() for rows in _shards(len(kept), self.description["rows_per_shard"])])
        missing = [path.name for paths in self._paths() for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"the activation store {directory} is not finished: {missing[0]} is missing")
        self._shard = functools.lru_cache(maxsize=None)(self._open)

    def __len__(self) -> int:
        """M."""
        return len(self.place)

    def _paths(self) -> list[list[Path]]:
        return [[shard_path(self.directory, s, j) for s in range(len(self.sites))] for j in range(len(self.ends))]

    def _open(self, site: int, shard: int) -> np.ndarray:
        count = int(self.ends[shard] - (self.ends[shard - 1] if shard else 0))
        return read_shard(shard_path(self.directory, site, shard), self.description["dtype"], count, self.sizes[site])

    def read(self, index: np.ndarray) -> Any:
        """The activations of these numbers [m], each 0 .. M - 1, as float32 [m, D]; of several sites a tuple."""
        index = np.asarray(index)
        shard = np.searchsorted(self.ends, index, side="right")
        order = np.argsort(shard, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(order) else []
        found = []
        for site, size in enumerate(self.sizes):
            x = np.empty((len(index), size), np.float32)
            for rows in groups:
                first = shard[rows[0]]
                begin = self.ends[first - 1] if first else 0
                x[rows] = self._shard(site, int(first))[index[rows] - begin]
            found.append(x)
        return found[0] if len(found) == 1 else tuple(found)

    def batches(self, *, batch_size: int, seed: int, among: np.ndarray | None = None) -> Callable[[int], Any]:
        """`batch(step)`: activations [batch_size, D], a pure function of (seed, step); of several sites a tuple.

        So two sites make batches for a transcoder, and `np.stack(batch(step), axis=1)` of several for a crosscoder.
        Each epoch is a new random order of all activations, or of those numbered `among` [m]; the fewer than
        batch_size left over at its end wait for a later one. Raises ValueError if there are fewer than that.
        """
        among = np.arange(len(self)) if among is None else np.asarray(among)
        if not 1 <= batch_size <= len(among):
            raise ValueError(f"batches: batch_size {batch_size} of {len(among)} activations")

        @functools.lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng((seed, epoch)).permutation(among)

        def batch(step: int) -> Any:
            epoch, place = divmod(step, len(among) // batch_size)
            return self.read(order(epoch)[place * batch_size : (place + 1) * batch_size])

        return batch

    def norms(self, site: int = 0) -> np.ndarray:
        """The Euclidean norms [M] of all activations at the site of this number; reads the whole store once."""
        shards = (self._shard(site, j) for j in range(len(self.ends)))
        return np.concatenate([np.linalg.norm(np.asarray(x, np.float32), axis=1) for x in shards])


def collect_activations(
    directory: str | os.PathLike[str],
    network: Network,
    params: Params,
    tokens: np.ndarray,
    *,
    sites: Sequence[str],
    dtype: str = "float16",
    skip: int = 1,
    excluded: Sequence[int] = (),
    rows_per_call: int = 8,
    rows_per_shard: int = 64,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Console | None = None,
) -> ActivationStore:
    """Run text through a network and keep what stands at some sites; what is after the last of them is not computed.

    Called again with the same arguments it goes on where it was: whole shards are kept, a half-written one is done
    again. The first positions of each row are left out: heads with nothing to attend to park on the first position, in
    some models on begin tokens anywhere, which makes its norm a hundred times the others', and a squared error would be
    spent on it (Xiao et al. 2023, arXiv 2309.17453; Sun et al. 2024, arXiv 2402.17762).

    Args:
        tokens: [N, T] int32, as `pack_tokens` gives them.
        sites: names of which each is [B, T, ...] for rows of B: with a layer where there are layers
            ("resid_post[15]"); axes behind the second are joined.
        skip: how many first positions of each row are left out.
        excluded: token ids left out wherever they stand.
        dtype: on disk, "float16", "bfloat16" (for values beyond 65,504) or "float32".
        rows_per_call: rows of text in memory at once.
        rows_per_shard: rows in a file, a multiple of rows_per_call.
        fingerprint: JSON values that say which model this is; on resume they must be the same.
        progress: a rich Console for a progress bar.

    Raises ValueError for an unknown site (listing those there are), one that is not [B, T, ...], activations that are
    not finite (naming site and place), and a directory that holds another store (naming what differs).
    """
    directory = Path(directory)
    tokens = np.ascontiguousarray(tokens, np.int32)
    if dtype not in DTYPES:
        raise ValueError(f"collect_activations: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 <= skip < tokens.shape[1]:
        raise ValueError(f"collect_activations: skip must lie in 0..{tokens.shape[1] - 1}, got {skip}")
    if rows_per_shard % rows_per_call:
        raise ValueError(f"collect_activations: rows_per_shard {rows_per_shard} is no multiple of {rows_per_call} rows")
    run = _Captured(network, params, tokens, tuple(sites), rows_per_call)
    description: dict[str, Any] = {
        "sites": list(sites),
        "sizes": run.sizes,
        "dtype": dtype,
        "rows_per_shard": rows_per_shard,
        "skip": skip,
        "excluded": sorted(int(token) for token in excluded),
        "tokens": [*tokens.shape, hashlib.sha256(tokens.tobytes()).hexdigest()[:16]],
        "fingerprint": dict(fingerprint or {}),
    }
    _claim(directory, description, tokens)
    kept = _kept(tokens, skip, excluded)
    shards = _shards(len(tokens), rows_per_shard)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    console = progress or Console(quiet=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=progress is None) as bar:
        task = bar.add_task("tokens", total=tokens.size)
        for j, rows in enumerate(shards):
            if not all(_whole(directory, s, j, dtype, int(kept[rows].sum()), d) for s, d in enumerate(run.sizes)):
                for s, x in enumerate(run(tokens[rows], lambda done: bar.advance(task, done))):
                    _write(shard_path(directory, s, j), _checked(x[kept[rows]], dtype, sites[s], kept, rows), dtype)
            bar.update(task, completed=tokens[: rows.stop].size)
    return ActivationStore(directory)


class _Captured:
    """The network up to its last site, run on blocks of rows of one size; sizes: of each site the last axis."""

    def __init__(self, network: Network, params: Params, tokens: np.ndarray, sites: tuple[str, ...], rows: int) -> None:
        taking = capture(network, sites)
        shape = (rows, tokens.shape[1])
        found = jax.eval_shape(taking.apply, params, jax.ShapeDtypeStruct(shape, np.int32))[1]
        for name in sites:
            if found[name].shape[:2] != shape or len(found[name].shape) < 3:
                raise ValueError(
                    f"collect_activations: {name} is {found[name].shape} for tokens {shape}; wanted is [B, T, ...], of "
                    f"a layer's site one layer, such as {name.partition('[')[0]}[0]"
                )
        self.sizes = [int(np.prod(found[name].shape[2:])) for name in sites]
        self._params, self._rows = params, rows
        # The output is not used, so XLA drops all that comes after the last site.
        self._run = jax.jit(lambda params, tokens: [taking.apply(params, tokens)[1][name] for name in sites])

    def __call__(self, tokens: np.ndarray, done: Callable[[int], object]) -> list[np.ndarray]:
        """Of each site [n, T, D] float32 for tokens[n, T]; a last block is filled up, so that all compile once."""
        parts: list[list[np.ndarray]] = []
        for start in range(0, len(tokens), self._rows):
            block = tokens[np.minimum(np.arange(start, start + self._rows), len(tokens) - 1)]
            found = jax.device_get(self._run(self._params, block))
            real = min(self._rows, len(tokens) - start)
            parts.append([np.asarray(x[:real], np.float32).reshape(*block[:real].shape, -1) for x in found])
            done(real * tokens.shape[1])
        return [np.concatenate(site) for site in zip(*parts, strict=True)]


def _kept(tokens: np.ndarray, skip: int, excluded: Sequence[int]) -> np.ndarray:
    """[N, T] bool, the positions that have activations."""
    kept = ~np.isin(tokens, list(excluded))
    kept[:, :skip] = False
    return kept


def _shards(rows: int, per_shard: int) -> list[slice]:
    return [slice(start, min(start + per_shard, rows)) for start in range(0, rows, per_shard)]


def _claim(directory: Path, description: dict[str, Any], tokens: np.ndarray) -> None:
    """Write what the store will hold, or see that it is what the store there holds."""
    path = directory / DESCRIPTION
    if path.is_file():
        old, new = json.loads(path.read_text()), json.loads(json.dumps(description))
        if differs := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
            raise ValueError(f"{directory} holds activations of another run: {', '.join(differs)} differ")
        return
    directory.mkdir(parents=True, exist_ok=True)
    _write_whole(directory / TOKENS, lambda file: np.save(file, tokens))
    _write_whole(path, lambda file: file.write((json.dumps(description, indent=2) + "\n").encode()))


def _checked(x: np.ndarray, dtype: str, site: str, kept: np.ndarray, rows: slice) -> np.ndarray:
    """x[m, D] in `dtype`; raises ValueError if it is not finite, before or after."""
    with np.errstate(over="ignore"):  # looked for below
        narrow = x.astype(DTYPES[dtype])
    for values, why in ((x, ""), (narrow.astype(np.float32), f" in {dtype}: choose bfloat16 or float32")):
        if not (finite := np.isfinite(values).all(axis=1)).all():
            row, position = np.argwhere(kept[rows])[np.flatnonzero(~finite)[0]]
            where = f"row {rows.start + row}, position {position}"
            raise ValueError(f"{(~finite).sum()} activations at {site} are NaN or infinite{why} (first at {where})")
    return narrow


def shard_path(directory: Path, site: int, shard: int) -> Path:
    """The file of one shard of the site of this number."""
    return directory / f"site{site}-shard{shard:05d}.npy"


def read_shard(path: Path, dtype: str, count: int, size: int) -> np.ndarray:
    """A memory map [count, size] of a shard. Raises ValueError or OSError if the file is something else."""
    x = np.load(path, mmap_mode="r" if count else None)  # nothing cannot be mapped
    if dtype == "bfloat16":  # which .npy files cannot name
        x = x.view(ml_dtypes.bfloat16)
    if x.shape != (count, size) or x.dtype != DTYPES[dtype]:
        raise ValueError(f"{path} holds {x.dtype} {list(x.shape)}, expected {dtype} [{count}, {size}]")
    return x


def _whole(directory: Path, site: int, shard: int, dtype: str, count: int, size: int) -> bool:
    path = shard_path(directory, site, shard)
    if not path.is_file():
        return False
    try:
        read_shard(path, dtype, count, size)
    except (ValueError, OSError, EOFError):  # cut short: it is done again
        return False
    return True


def _write(path: Path, x: np.ndarray, dtype: str) -> None:
    _write_whole(path, lambda file: np.save(file, x.view(np.uint16) if dtype == "bfloat16" else x))


def _write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """All or nothing: written beside its place, then moved."""
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
