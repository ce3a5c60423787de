"""Text as a language model is fed it: documents from the files people have, packed into rows of one length."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.byte_tokenizer import plain_dialogue
from jaxalign.interop.row_files import SUFFIXES, BadRow, RowFileError, read_rows

FIELDS = ("text", "content", "chosen", "messages", "prompt")  # the first that a row has is its text
ENCODED_AT_ONCE = 256


def read_documents(path: str | os.PathLike[str], tokenizer: Any = None) -> list[str]:
    """The documents of a file: each row of .jsonl, .json (either may be .gz) or .parquet; any other file is one text.

    A row is a string, or an object with `text`, `content`, `chosen` (of a preference pair; a `prompt` that it does not
    begin with is put before it), `messages` or `prompt`. Lists of messages go through the tokenizer's chat template, or
    are plain lines where it has none.

    Raises RowFileError naming file and line for a row without text, and for a file without any.
    """
    path = Path(path)
    if path.name.lower().endswith(SUFFIXES):
        documents = []
        for line, load in read_rows(path, columns=FIELDS):
            try:
                documents.append(_text(load(), tokenizer))
            except BadRow as bad:
                raise RowFileError(path, line, bad.reason) from bad
    else:
        try:
            documents = [path.read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            raise RowFileError(path, None, f"not valid UTF-8 (byte {error.start})") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RowFileError(path, None, "the file holds no text")
    return documents


def python_documentation() -> list[str]:
    """Real English text that every Python carries: the language reference, as `help()` shows it (0.5 MB, 79 topics)."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _text(row: Any, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    field = next((name for name in FIELDS if isinstance(row, dict) and name in row), None)
    if field is None:
        raise BadRow(f"the row is neither text nor an object with one of {', '.join(FIELDS)}")
    value, prompt = row[field], row.get("prompt")
    if isinstance(value, str):
        joined = field == "chosen" and isinstance(prompt, str) and not value.startswith(prompt)
        return f"{prompt}{value}" if joined else value
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        raise BadRow(f"the field `{field}` is neither text nor a list of messages")
    return tokenizer.render(value) if getattr(tokenizer, "chat_template", None) else plain_dialogue(value)


class PackedText(NamedTuple):
    """N rows of T tokens.

    tokens: [N, T] int32
    special: ids of the begin and end tokens that packing put in
    documents: how many documents the rows hold, the last perhaps cut
    """

    tokens: np.ndarray
    special: tuple[int, ...]
    documents: int


def pack_tokens(documents: Sequence[str], tokenizer: Any, *, length: int, limit: int | None = None) -> PackedText:
    """Documents end to end, an end token after each, cut into rows of `length` that each open with the begin token.

    So language models are pretrained. What does not fill a last row is left out.

    Args:
        tokenizer: with `encode_batch`, `bos_id` and `eos_id`; where one of the two is None the other serves for both.
        length: T >= 2.
        limit: the most tokens wanted, N = limit // T; documents behind them are not read.

    Raises ValueError if `length` < 2, there is neither a begin nor an end token, or the text does not fill a row.
    """
    if length < 2:
        raise ValueError(f"pack_tokens: length must be at least 2, got {length}")
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if begin is None:
        raise ValueError("pack_tokens: the tokenizer has neither a begin nor an end token to open rows with")
    end = tokenizer.eos_id if tokenizer.eos_id is not None else begin
    most = None if limit is None else max(1, limit // length)
    stream: list[int] = []
    count = 0
    for ids in _encoded(documents, tokenizer):
        if most is not None and len(stream) >= most * (length - 1):
            break
        stream += [*ids, end]
        count += 1
    rows = len(stream) // (length - 1) if most is None else min(most, len(stream) // (length - 1))
    if not rows:
        raise ValueError(f"pack_tokens: the text has {len(stream)} tokens, too few for one row of {length}")
    tokens = np.full((rows, length), begin, np.int32)
    tokens[:, 1:] = np.asarray(stream[: rows * (length - 1)], np.int32).reshape(rows, length - 1)
    return PackedText(tokens, tuple(sorted({begin, end})), count)


def _encoded(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        yield from tokenizer.encode_batch(list(documents[start : start + ENCODED_AT_ONCE]))
