"""Demonstrations and finite MDPs from files: JSONL rows of states and actions, and .npz worlds."""

import gzip
import json
import pathlib
import zipfile
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.row_files import BadRow, RowFileError, read_rows
from jaxalign.irl import Trajectories, pad_trajectories
from jaxalign.mdp import GridTransition, SparseTransition, TabularMDP, dense_transition


def read_demonstrations(path: str | pathlib.Path, *, mdp: TabularMDP | None = None) -> Trajectories:
    """Demonstrations, one a row: {"states": [0, 8, 9], "actions": [2, 1, 4]}, equally long; other fields are ignored.

    Args:
        path: .jsonl, .ndjson, .json (a list, or one object a line), each also as .gz, or .parquet (extra `lm`).
        mdp: if given, states and actions must be its own.

    Returns Trajectories [N, T], T the longest. Raises RowFileError naming file and line for a row that is empty,
    uneven, not of integers or out of range, and for a file without rows.
    """
    path = pathlib.Path(path)
    demonstrations = []
    for line, load in read_rows(path, columns=("states", "actions")):
        try:
            demonstrations.append(_demonstration(load(), mdp))
        except BadRow as bad:
            raise RowFileError(path, line, bad.reason) from bad
    if not demonstrations:
        raise RowFileError(path, None, "the file holds no demonstrations")
    return pad_trajectories(demonstrations)


def write_demonstrations(path: str | pathlib.Path, trajectories: Trajectories) -> None:
    """Write the unmasked steps as JSONL (gzipped if `path` ends in .gz), for `read_demonstrations` to read."""
    path = pathlib.Path(path)
    rows = []
    for states, actions, mask in zip(*(np.asarray(x) for x in trajectories), strict=True):
        rows.append(json.dumps({"states": states[mask].tolist(), "actions": actions[mask].tolist()}) + "\n")
    data = "".join(rows).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


class World(NamedTuple):
    """An MDP file. What the file does not have is None.

    mdp: TabularMDP
    features: [S, F]
    reward: [S] or [S, A], the true one
    shape: (H, W) of a grid whose cell (y, x) is state y * W + x
    """

    mdp: TabularMDP
    features: np.ndarray | None
    reward: np.ndarray | None
    shape: tuple[int, int] | None


def save_world(path: str | pathlib.Path, mdp: TabularMDP, *, features: Any = None, reward: Any = None) -> None:
    """Write an MDP, and what is known of it, as an .npz file for `load_world`; a grid's transition becomes dense."""
    arrays: dict[str, Any] = {name: getattr(mdp, name) for name in ("initial", "terminal", "discount")}
    if isinstance(mdp.transition, SparseTransition):
        arrays |= mdp.transition._asdict()
    else:
        if isinstance(mdp.transition, GridTransition):
            arrays["shape"] = mdp.transition.open.shape
        arrays["transition"] = dense_transition(mdp.transition)
    arrays |= {name: value for name, value in (("features", features), ("reward", reward)) if value is not None}
    host: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez_compressed(path, **host)


def load_world(path: str | pathlib.Path) -> World:
    """Read an .npz file with arrays `transition` [S, A, S] (or `next_state` and `probability` [S, A, K]),
    `initial` [S], `discount`, and optionally `terminal` bool [S], `features` [S, F], `reward` [S] or [S, A] and
    `shape` (H, W).

    Raises ValueError naming the file and the array that is missing, of another shape or not a distribution.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an .npz file of arrays ({error})") from error
    sparse = "next_state" in arrays
    for name in ("initial", "discount", *(("next_state", "probability") if sparse else ("transition",))):
        if name not in arrays:
            raise ValueError(f"{path}: there is no array {name!r}; there are {', '.join(sorted(arrays))}")
    transition: Any = arrays.get("transition")
    if sparse:
        transition = SparseTransition(arrays["next_state"], arrays["probability"])
    terminal = arrays.get("terminal", np.zeros(arrays["initial"].shape, bool))
    try:
        mdp = TabularMDP(transition, arrays["initial"], terminal, arrays["discount"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    features, reward = arrays.get("features"), arrays.get("reward")
    states, actions = mdp.num_states, mdp.num_actions
    if features is not None and (features.ndim != 2 or features.shape[0] != states):
        raise ValueError(f"{path}: features must be [{states}, F], got {features.shape}")
    if reward is not None and reward.shape not in ((states,), (states, actions)):
        raise ValueError(f"{path}: reward must be [{states}] or [{states}, {actions}], got {reward.shape}")
    shape = None if "shape" not in arrays else tuple(int(x) for x in arrays["shape"].reshape(-1))
    if shape is not None and (len(shape) != 2 or shape[0] * shape[1] != states):
        raise ValueError(f"{path}: shape must be (H, W) with H * W = {states}, got {shape}")
    return World(mdp, features, reward, shape)


def _demonstration(row: Any, mdp: TabularMDP | None) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(row, dict):
        raise BadRow("the row is not an object with fields `states` and `actions`")
    found = []
    sizes = (None, None) if mdp is None else (mdp.num_states, mdp.num_actions)
    for field, size in zip(("states", "actions"), sizes, strict=True):
        values = row.get(field)
        if not isinstance(values, list) or not values:
            raise BadRow(f"`{field}` is missing or empty")
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
            raise BadRow(f"`{field}` holds something other than integers")
        if size is not None and not all(0 <= x < size for x in values):
            raise BadRow(f"`{field}` holds a number outside 0..{size - 1}")
        found.append(np.asarray(values))
    if found[0].size != found[1].size:
        raise BadRow("`states` and `actions` differ in length")
    return found[0], found[1]
