"""Preference pairs from the files people have: JSONL, JSON and Parquet, explicit prompts and whole dialogues."""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.row_files import BadRow, RowFileError, read_rows

Message = dict[str, Any]  # "role" and "content", and whatever else a chat template may read
Text = str | tuple[Message, ...]

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


class PreferencePair(NamedTuple):
    """One comparison. All three are strings, or all three are tuples of messages (dicts with role and content).

    prompt: what both answers reply to
    chosen, rejected: the answers alone, without the prompt
    """

    prompt: Text
    chosen: Text
    rejected: Text


class SkippedRow(NamedTuple):
    """A row left out: its line (row in Parquet), counted from 1, and why."""

    line: int
    reason: str


class PreferenceFile(NamedTuple):
    """What a file held: the usable pairs in file order, and the rows left out (none with `on_bad="raise"`)."""

    pairs: list[PreferencePair]
    skipped: list[SkippedRow]

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were left out for each reason, the most frequent first."""
        return dict(collections.Counter(row.reason for row in self.skipped).most_common())


PreferenceFileError = RowFileError


def read_preferences(path: str | pathlib.Path, *, on_bad: str = "raise") -> PreferenceFile:
    """Read preference pairs, in one of three shapes per row; other fields are ignored.

    - `prompt, chosen, rejected`: all strings, or all lists of messages.
    - `chosen, rejected`: whole dialogues as lists of messages. Their longest common beginning is the prompt. A string
      `prompt` beside whole dialogues is ignored; beside lists of replies only, it becomes the user's message.
    - `chosen, rejected`: whole dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic HH), parsed into
      user and assistant messages. A speaker's consecutive turns are one message; white space around a turn is dropped.

    A row is bad if it is no such object, chosen equals rejected, a prompt or an answer is empty, the dialogues part
    before the last reply (an answer would hold a user's message), or its text is not Unicode.

    Args:
        path: .jsonl, .ndjson, .json (a list, or one object a line), each also as .gz, or .parquet (extra `lm`).
        on_bad: "raise" at the first bad row, or "skip" bad rows and list them in the result.

    Raises PreferenceFileError, naming file and line, for a bad row; and whatever `on_bad` is, for an unknown suffix, a
    damaged or truncated file, a file without a usable row, and a file of several rows that are all the same.
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"read_preferences: on_bad must be 'raise' or 'skip', got {on_bad!r}")
    path = pathlib.Path(path)
    pairs: list[PreferencePair] = []
    skipped: list[SkippedRow] = []
    for line, load in read_rows(path, columns=("prompt", "chosen", "rejected")):
        try:
            pairs.append(_pair(load()))
        except BadRow as bad:
            if on_bad == "raise":
                raise PreferenceFileError(path, line, bad.reason) from bad
            skipped.append(SkippedRow(line, bad.reason))
    result = PreferenceFile(pairs, skipped)
    if not pairs:
        counts = "; ".join(f"{reason} ({count})" for reason, count in result.reasons.items())
        raise PreferenceFileError(path, None, f"no row is usable: {counts}" if skipped else "the file holds no rows")
    if len(pairs) > 1 and all(pair == pairs[0] for pair in pairs):
        raise PreferenceFileError(path, None, f"all {len(pairs)} usable rows are the same")
    return result


def write_preferences(path: str | pathlib.Path, pairs: Sequence[PreferencePair]) -> None:
    """Write pairs as JSONL with explicit prompts (gzipped if `path` ends in .gz), for `read_preferences` to read."""
    path = pathlib.Path(path)
    text = "".join(json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in pairs)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def split_pairs(
    pairs: Sequence[PreferencePair], *, held_out: float = 0.2, seed: int = 0
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Split into (train, held_out), each in the given order; pairs with the same prompt stay on the same side.

    Prompts are drawn in the order of `default_rng(seed).permutation` while their pairs fit into
    `round(held_out * len(pairs))`, so the second part has that many pairs or a few less; at least one prompt goes to
    each part. Raises ValueError unless 0 < held_out < 1 and there are two different prompts.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"split_pairs: held_out must be in (0, 1), got {held_out}")
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(json.dumps(pair.prompt, sort_keys=True), []).append(index)
    members = list(groups.values())
    if len(members) < 2:
        raise ValueError(f"split_pairs: needs two different prompts, {len(pairs)} pairs have {len(members)}")
    target, taken, count = round(held_out * len(pairs)), set[int](), 0
    for group in np.random.default_rng(seed).permutation(len(members)):
        if count + len(members[group]) <= target and len(taken) < len(members) - 1:
            taken.add(int(group))
            count += len(members[group])
    if not taken:
        taken.add(min(range(len(members)), key=lambda group: len(members[group])))
    chosen = {index for group in taken for index in members[group]}
    train = [pair for index, pair in enumerate(pairs) if index not in chosen]
    return train, [pairs[index] for index in sorted(chosen)]


def _pair(row: Any) -> PreferencePair:
    """One row as a pair, whatever its shape."""
    if not isinstance(row, dict):
        raise BadRow("the row is not an object with fields `chosen` and `rejected`")
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise BadRow(f"the field `{field}` is missing")
    chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
    prompt = None if row.get("prompt") is None else _text(row["prompt"], "prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("`chosen` and `rejected` are not of one kind (text or messages)")
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        pair = _part(_dialogue(chosen, "chosen"), _dialogue(rejected, "rejected"), None)
    elif not isinstance(prompt, tuple) and isinstance(chosen, tuple) and isinstance(rejected, tuple):
        pair = _part(chosen, rejected, prompt)
    elif prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        pair = PreferencePair(prompt, chosen, rejected)
    else:
        raise BadRow("`prompt` is a list of messages, the answers are text")
    return _checked(pair)


def _text(value: Any, field: str) -> Text:
    """A string, or a list of messages as a tuple; fields that Parquet filled with None are dropped."""
    if isinstance(value, str):
        contents = [value]
    elif isinstance(value, list):
        if not all(isinstance(message, dict) for message in value):
            raise BadRow(f"`{field}` is a list of something other than messages")
        value = tuple({name: part for name, part in message.items() if part is not None} for message in value)
        contents = [message.get(name) for message in value for name in ("role", "content")]
        if not all(isinstance(content, str) for content in contents):
            raise BadRow(f"a message of `{field}` lacks `role` or `content` as text")
    else:
        raise BadRow(f"`{field}` is neither text nor a list of messages")
    for content in contents:
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"`{field}` holds half of a surrogate pair, which no tokenizer takes") from error
    return value


def _dialogue(text: str, field: str) -> tuple[Message, ...]:
    """"\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    head, *parts = TURN.split(text)
    if not parts or head.strip():
        raise BadRow(f'without a `prompt`, `{field}` must be messages or text that begins with "Human:"')
    messages: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLES[speaker]:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{content.strip()}".strip()
        else:
            messages.append({"role": ROLES[speaker], "content": content.strip()})
    return tuple(messages)


def _part(chosen: tuple[Message, ...], rejected: tuple[Message, ...], prompt: str | None) -> PreferencePair:
    """Part two dialogues into their common beginning and what each goes on with."""
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    head: tuple[Message, ...] = chosen[:shared]
    if prompt is not None and not any(message["role"] == "user" for message in (*chosen, *rejected)):
        head = (*(head if all(m["role"] == "system" for m in head) else ()), {"role": "user", "content": prompt})
        shared = len(head) - 1
    if not head:
        raise BadRow("chosen and rejected have no message in common at the start")
    return PreferencePair(head, chosen[shared:], rejected[shared:])


def _checked(pair: PreferencePair) -> PreferencePair:
    if isinstance(pair.prompt, str):
        if not pair.prompt.strip():
            raise BadRow("the prompt is empty")
        empty = [not str(answer).strip() for answer in (pair.chosen, pair.rejected)]
    else:
        if not pair.prompt:
            raise BadRow("the prompt is empty")
        for answer in (pair.chosen, pair.rejected):
            if any(message["role"] == "user" for message in answer):  # type: ignore[index]
                raise BadRow("chosen and rejected part before the last reply: an answer holds a user's message")
        empty = [not any(m["content"].strip() for m in answer) for answer in (pair.chosen, pair.rejected)]  # type: ignore[index]
    for field, nothing in zip(("chosen", "rejected"), empty, strict=True):
        if nothing:
            raise BadRow(f"the {field} answer is empty")
    return pair
