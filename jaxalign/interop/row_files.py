"""Files with one JSON value a row (JSONL, JSON, either gzipped, Parquet), read so that every fault has its line."""

import functools
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")


class RowFileError(ValueError):
    """A file that cannot be used; the message names the file, the line (where there is one) and the reason."""

    def __init__(self, path: pathlib.Path, line: int | None, reason: str):
        self.path, self.line, self.reason = path, line, reason
        unit = "row" if path.suffix.lower() == ".parquet" else "line"
        super().__init__(f"{path}: {reason}" if line is None else f"{path}, {unit} {line}: {reason}")


class BadRow(Exception):
    """Why a row is unusable; `reason` carries no value of the row, so that equal faults count together."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)


def read_rows(path: pathlib.Path, *, columns: Sequence[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Line numbers and row parsers: a parser raises BadRow, the iteration itself what cannot be skipped.

    path: .jsonl, .ndjson, .json (a list, or one object a line), each also as .gz, or .parquet (extra `lm`).
    columns: those to read of a Parquet file, where they are there.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise RowFileError(path, None, f"unknown kind of file; known are {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        yield from _parquet_rows(path, columns)
        return
    if name.removesuffix(".gz").endswith(".json"):
        data = b"".join(line for _, line in _lines(path))
        if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _list_rows(path, data)
            return
    for number, line in _lines(path):
        if line.strip():
            yield number, functools.partial(_parse, line)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as stream:
        try:
            # Bytes, so that only \n ends a line: text may hold U+2028 and its like.
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise RowFileError(path, number + 1, f"the gzip data is damaged or truncated ({error})") from error


def _same(row: Any) -> Any:
    """A row that needs no parsing."""
    return row


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON") from error


def _list_rows(path: pathlib.Path, data: bytes) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The items of a JSON list, each with the line it starts on."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RowFileError(path, line, "not valid UTF-8") from error
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowFileError(path, error.lineno, f"not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise RowFileError(path, None, f"not valid JSON ({error})") from error
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,]*")
    end, line = text.index("[") + 1, text.count("\n", 0, text.index("[")) + 1
    for item in items:
        start = separator.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        yield line, functools.partial(_same, item)
        _, end = decoder.raw_decode(text, start)
        line += text.count("\n", start, end)


def _parquet_rows(path: pathlib.Path, wanted: Sequence[str]) -> Iterator[tuple[int, Callable[[], Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('reading Parquet needs pyarrow: pip install "jaxalign[lm]"') from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in wanted if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, functools.partial(_same, row)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise RowFileError(path, number + 1, f"not readable as Parquet ({error})") from error
