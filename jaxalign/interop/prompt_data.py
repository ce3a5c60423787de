"""Prompts for online learning: rows of a file or of an embedded task, as token batches that (seed, step) fixes."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.byte_tokenizer import plain_dialogue
from jaxalign.interop.preference_data import Tokenizer
from jaxalign.interop.row_files import BadRow, RowFileError, read_rows
from jaxalign.rlhf.language_rollout import Prompts

PADDED_TO = 8


class PromptRow(NamedTuple):
    """One prompt.

    prompt: text, or messages with role and content
    fields: what else the row says, such as its answer; rewards get it
    """

    prompt: str | tuple[dict[str, Any], ...]
    fields: Mapping[str, Any]


def read_prompts(path: str | pathlib.Path) -> list[PromptRow]:
    """Read rows with a field `prompt`: text, or a list of messages; other fields are kept.

    path: as `read_preferences` takes them. Raises RowFileError naming the file and line of a row without a usable
    prompt, and for a file without rows.
    """
    path = pathlib.Path(path)
    rows = []
    for line, load in read_rows(path, columns=("prompt", "answer")):
        try:
            rows.append(_row(load()))
        except BadRow as bad:
            raise RowFileError(path, line, bad.reason) from bad
    if not rows:
        raise RowFileError(path, None, "the file holds no rows")
    return rows


def _row(row: Any) -> PromptRow:
    if not isinstance(row, dict):
        raise BadRow("the row is not an object with a field `prompt`")
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        good = all(isinstance(m, dict) and isinstance(m.get("content"), str) and m.get("role") for m in prompt)
        prompt = tuple(prompt) if good else None
    if not isinstance(prompt, str | tuple) or not prompt:
        raise BadRow("the field `prompt` is missing, or neither text nor a list of messages")
    return PromptRow(prompt, {name: value for name, value in row.items() if name != "prompt"})


def prompt_text(row: PromptRow, tokenizer: Tokenizer, *, chat: bool = True) -> str:
    """What the model is to continue: messages through the chat template, with the opening of an answer.

    chat: make a text prompt the user's message, where the tokenizer has a template.
    """
    prompt: Any = row.prompt
    if isinstance(prompt, str):
        if not (chat and tokenizer.chat_template):
            return prompt
        prompt = ({"role": "user", "content": prompt},)
    render: Callable[..., str] = tokenizer.render if tokenizer.chat_template else plain_dialogue
    return render(prompt, add_generation_prompt=True)


class PromptData:
    """N prompts as batches of one static shape; batch `step` depends on (seed, step) alone.

    Each epoch is a new order of the prompts; the fewer than B left over at its end wait for a later one.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        max_length: int,
        first: int = 0,
    ) -> None:
        """Tokenize `texts`, [N].

        first: the number of the first text among all prompts, where these are a part of them.
        max_length: of a prompt, in tokens. All batches are padded to the longest prompt, to a multiple of 8.
        Raises ValueError naming the first prompt that is empty or longer, or if N < batch_size.
        """
        encoded = tokenizer.encode_batch(list(texts))
        for number, ids in enumerate(encoded):
            if not 0 < len(ids) <= max_length:
                start = json.dumps(texts[number][:60])
                name = f"prompt {first + number} ({start}...)"
                raise ValueError(f"{name} has {len(ids)} tokens; allowed are 1 to {max_length}")
        if not 1 <= batch_size <= len(encoded):
            raise ValueError(f"PromptData: batch_size {batch_size} of {len(encoded)} prompts")
        self.batch_size, self.seed, self.first = batch_size, seed, first
        self._lengths = np.asarray([len(ids) for ids in encoded], np.int32)
        width = min(max_length, -(-int(self._lengths.max()) // PADDED_TO) * PADDED_TO)
        self._tokens = np.full((len(encoded), width), pad_id, np.int32)
        for row, ids in zip(self._tokens, encoded, strict=True):
            row[: len(ids)] = ids
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        """N."""
        return len(self._lengths)

    @property
    def width(self) -> int:
        """P, the positions of a padded prompt."""
        return self._tokens.shape[1]

    def batch(self, step: int) -> Prompts:
        """Batch `step` >= 0 as NumPy arrays: tokens [B, P], lengths [B], index [B]."""
        epoch, place = divmod(step, len(self) // self.batch_size)
        return self.rows(self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size])

    def rows(self, index: np.ndarray) -> Prompts:
        """The prompts of these numbers [B], 0 .. N - 1; their `index` counts all prompts, from `first`."""
        made: Any = (self._tokens[index], self._lengths[index], np.asarray(index + self.first, np.int32))
        return Prompts(*made)

    def _make_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self))
