"""The metrics of a run on disk: `metrics.jsonl`, one line a step, and TensorBoard event files."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

FILE = "metrics.jsonl"
RESERVED = ("step", "nonfinite")
MOST_TENSORBOARD_LANES = 16


def read_metrics(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The metrics of a run as arrays [T, ...] by name, and "step" [T].

    `path` is a run's directory or its `metrics.jsonl`. Numbers come back as float64, int64 or bool; the text is the
    shortest that is exact, so `.astype` of the dtype they had gives the same bits. A last line still being written is
    left out.

    Raises FileNotFoundError, and ValueError naming the file and line if a line is not a step's metrics, a step is
    missing or doubled, or a metric is not in every line.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break
            row = _parse(line, f"{path}:{number}")
            if row["step"] != number - 1:
                raise ValueError(f"{path}:{number}: expected step {number - 1}, found {row['step']!r}")
            if rows and row.keys() != rows[0].keys():
                raise ValueError(f"{path}:{number}: metrics {sorted(row)}, but {sorted(rows[0])} in line 1")
            rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else {"step": 0})}


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or "step" not in row:
        raise ValueError(f'{where}: not a step\'s metrics ({{"step": ..., name: value}})')
    for name, reasons in row.pop("nonfinite", {}).items():
        row[name] = _fill(row[name], iter(reasons))
    return row


def _fill(value: Any, reasons: Any) -> Any:
    if isinstance(value, list):
        return [_fill(item, reasons) for item in value]
    return float(next(reasons)) if value is None else value


def _plain(x: np.ndarray) -> tuple[Any, list[str]]:
    """An array as nested lists of JSON numbers (null where not finite), and why each null is one."""
    if x.dtype.kind in "biu":
        return x.tolist(), []
    wide = x if x.dtype == np.float64 else x.astype(np.float32)
    # str(float32) is the shortest decimal that is exact in float32: 0.3, where float(x) would give 0.30000001192...
    flat = [float(str(v)) for v in wide.ravel()]
    reasons = [str(v) for v in flat if not math.isfinite(v)]
    values = iter([v if math.isfinite(v) else None for v in flat])
    return _nest(values, x.shape), reasons


def _nest(values: Any, shape: tuple[int, ...]) -> Any:
    return [_nest(values, shape[1:]) for _ in range(shape[0])] if shape else next(values)


def to_line(step: int, metrics: Mapping[str, np.ndarray]) -> str:
    """One step as JSON: {"step": 3, "loss": 0.25, "kl": null, "nonfinite": {"kl": ["nan"]}}.

    An array is a nested list. JSON has no NaN or infinity: such a number is null, and "nonfinite" lists what each
    null of that metric stands for, in order.
    """
    row: dict[str, Any] = {"step": step}
    nonfinite = {}
    for name, value in metrics.items():
        row[name], reasons = _plain(np.asarray(value))
        if reasons:
            nonfinite[name] = reasons
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row, allow_nan=False) + "\n"


class MetricsLog:
    """Appends to a run's metrics files, after cutting them back to the first `steps` steps.

    Lines past a checkpoint were written by a run that was killed before its next one; resuming does those steps again.
    """

    def __init__(self, directory: Path, *, steps: int, tensorboard: bool) -> None:
        self.path = directory / FILE
        _cut(self.path, steps)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # TensorBoard itself drops what an earlier process wrote at or past `purge_step`.
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=steps or None, max_queue=1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, first: int, metrics: Mapping[str, np.ndarray], count: int) -> None:
        """Write steps `first .. first + count - 1`, whose metrics are [count, ...], and flush.

        Raises ValueError for a metric named like one of the file's own fields.
        """
        if clash := [name for name in RESERVED if name in metrics]:
            raise ValueError(f"fit: a metric may not be named {clash[0]!r}, which metrics.jsonl uses itself")
        for i in range(count):
            row = {name: value[i] for name, value in metrics.items()}
            self._file.write(to_line(first + i, row))
            if self._board is not None:
                self._board.file_writer.add_summary(_summary(row), first + i)
        self._file.flush()
        if self._board is not None:
            self._board.flush()

    def sync(self) -> None:
        """Return once the lines are on the disk itself: a checkpoint must not outlive the metrics it counts on."""
        os.fsync(self._file.fileno())


def _summary(row: Mapping[str, np.ndarray]) -> Any:
    """What TensorBoard shows of one step: scalars as they are; of an array its mean, and each of a few entries.

    One event for all of a step's metrics: `add_scalar` takes 100 us for each.
    """
    from tensorboardX.proto.summary_pb2 import Summary

    found = []
    for name, value in row.items():
        flat = np.asarray(value, np.float64).ravel()
        if flat.size:
            found.append((name, float(flat.mean())))
        if 1 < flat.size <= MOST_TENSORBOARD_LANES:
            found += [(f"{name}/{i}", float(x)) for i, x in enumerate(flat)]
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in found])


def _cut(path: Path, steps: int) -> None:
    """Keep the first `steps` lines. Raises ValueError if there are fewer."""
    if not path.exists():
        if steps:
            raise ValueError(f"{path} is gone, but the checkpoint is at step {steps}: put it back to resume")
        return
    with path.open("r+b") as file:
        for step in range(steps):
            line = file.readline()
            if not line.endswith(b"\n"):
                raise ValueError(f"{path} ends after {step} steps, but the checkpoint is at step {steps}")
        file.truncate(file.tell())
