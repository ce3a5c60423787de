"""What people said, kept: preferences and scores with their times, in an append-only file that survives a crash."""

import contextlib
import json
import math
import os
import pathlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.row_files import RowFileError

try:
    import fcntl
except ImportError:  # Windows: a single appending write is all there is
    fcntl = None  # type: ignore[assignment]

PREFERENCE, SCORE = "preference", "score"
OUTCOMES = (0, 1, 2)
BLOCK = 1 << 16
FIELDS = {PREFERENCE: ("first", "second", "outcome"), SCORE: ("item", "score")}


class FeedbackArrays(NamedTuple):
    """Feedback of one log as arrays; names of items and annotators are strings.

    times: [P] float64, seconds since 1970 (UTC), of the preferences
    first, second: [P], the items compared
    outcomes: [P] int32, 0 where the first was preferred, 1 the second, 2 a tie
    annotators: [P]
    score_times, items, scores, scorers: [S] the same of the scores, float64
    """

    times: np.ndarray
    first: np.ndarray
    second: np.ndarray
    outcomes: np.ndarray
    annotators: np.ndarray
    score_times: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    scorers: np.ndarray


class FeedbackLog:
    """Preferences and scores in a JSONL file, one record a line:

    {"time": 1764.5, "kind": "preference", "first": "a7", "second": "b2", "outcome": 0, "annotator": "anna"}
    {"time": 1765.0, "kind": "score", "item": "a7", "score": 0.8, "annotator": "anna"}

    A record is on the disk when the call returns: one write at the file's end and one fsync, under a lock where the
    platform has one, so that several processes may write to one file. Fields beyond these, given by keyword, are kept.

    Opening and writing set aside what a crash in the middle of a write left: the bytes after the last line's end go to
    `<name>.torn`, with a warning, and `torn` holds them; the records before are untouched.

    Raises RowFileError (a ValueError), naming file and line, for a line that is no record: nothing is dropped silently.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.torn = b""
        with self._locked() as descriptor:
            self._set_torn_line_aside(descriptor)

    def prefer(self, first: str, second: str, outcome: int, *, annotator: str = "", **more: Any) -> dict[str, Any]:
        """Add that `first` (outcome 0), `second` (1) or neither (2) was preferred; returns the record.

        Raises ValueError naming the field, and writes nothing, if one is not what it must be.
        """
        fields = {"first": first, "second": second, "outcome": outcome, "annotator": annotator}
        return self.extend([{"kind": PREFERENCE, **fields, **more}])[0]

    def score(self, item: str, score: float, *, annotator: str = "", **more: Any) -> dict[str, Any]:
        """Add a score of an item; returns the record. Raises ValueError as `prefer`."""
        return self.extend([{"kind": SCORE, "item": item, "score": score, "annotator": annotator, **more}])[0]

    def extend(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Add several records in one write and one fsync; "time" is filled in where it is missing.

        Raises ValueError naming the record and the field, and writes none of them, if one is not a record.
        """
        now = time.time()
        rows = [{"time": now, **record} for record in records]
        for i, row in enumerate(rows):
            if problem := _problem(row):
                raise ValueError(f"{self.path}: record {i}: {problem}")
        if rows:
            self._append("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())
        return rows

    def records(self) -> list[dict[str, Any]]:
        """Every record, in the order they were written. A last line that is still being written is left out."""
        found: list[dict[str, Any]] = []
        if not self.path.exists():
            return found
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.endswith(b"\n"):
                    found.append(self._parse(number, line))
        return found

    def arrays(self) -> FeedbackArrays:
        """Every record as arrays."""
        rows = self.records()
        pairs = [row for row in rows if row["kind"] == PREFERENCE]
        scores = [row for row in rows if row["kind"] == SCORE]

        def column(of: list[dict[str, Any]], name: str, dtype: Any) -> np.ndarray:
            return np.array([row.get(name, "") for row in of], dtype)

        return FeedbackArrays(
            column(pairs, "time", np.float64), column(pairs, "first", str), column(pairs, "second", str),
            column(pairs, "outcome", np.int32), column(pairs, "annotator", str),
            column(scores, "time", np.float64), column(scores, "item", str), column(scores, "score", np.float64),
            column(scores, "annotator", str),
        )  # fmt: skip

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RowFileError(self.path, number, f"not JSON ({error})") from error
        if problem := _problem(row):
            raise RowFileError(self.path, number, problem)
        return row

    def _append(self, data: bytes) -> None:
        with self._locked() as descriptor:
            self._set_torn_line_aside(descriptor)  # another writer may have died since this log was opened
            end = os.fstat(descriptor).st_size
            written = os.write(descriptor, data)
            if written != len(data):
                os.ftruncate(descriptor, end)
                raise OSError(f"{self.path}: only {written} of {len(data)} bytes could be written; none were kept")
            os.fsync(descriptor)

    def _set_torn_line_aside(self, descriptor: int) -> None:
        """Move what follows the last line's end to `<name>.torn`, and say so."""
        keep, tail = os.fstat(descriptor).st_size, b""
        while keep and b"\n" not in tail:
            begin = max(0, keep - BLOCK)
            os.lseek(descriptor, begin, os.SEEK_SET)
            tail, keep = os.read(descriptor, keep - begin) + tail, begin
        whole = tail.rfind(b"\n") + 1
        if whole == len(tail):
            return
        keep, tail = keep + whole, tail[whole:]
        aside = self.path.with_name(self.path.name + ".torn")
        with aside.open("ab") as file:
            file.write(tail + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.ftruncate(descriptor, keep)
        os.fsync(descriptor)
        self.torn += tail
        warnings.warn(f"{self.path}: a last line that a crash cut short ({len(tail)} bytes) is now in {aside}",
                      stacklevel=4)  # fmt: skip

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock


def _problem(row: Any) -> str | None:
    """What is wrong with a record, naming the field; None if nothing is."""
    if not isinstance(row, Mapping):
        return f"a record is an object with the field 'kind', not {type(row).__name__}"
    kind = row.get("kind")
    if kind not in FIELDS:
        return f"field 'kind' must be one of {tuple(FIELDS)}, got {kind!r}"
    if missing := [name for name in ("time", *FIELDS[kind]) if name not in row]:
        return f"a {kind} needs the field {missing[0]!r}"
    for name in ("time", "score"):
        if name in row and not _is_finite(row[name]):
            return f"field {name!r} must be a finite number, got {row[name]!r}"
    for name in ("first", "second", "item", "annotator"):
        if name in row and not isinstance(row[name], str):
            return f"field {name!r} must be a string, got {row[name]!r}"
    if kind == PREFERENCE and (type(row["outcome"]) is not int or row["outcome"] not in OUTCOMES):
        return f"field 'outcome' must be 0 (first), 1 (second) or 2 (tie), got {row['outcome']!r}"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
