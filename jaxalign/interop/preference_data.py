"""From preference pairs to batches: tokens, truncation, length buckets, and an order that (seed, step) fixes."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np

from jaxalign.interop.byte_tokenizer import plain_dialogue
from jaxalign.interop.preference_files import PreferencePair, Text
from jaxalign.preferences.batch import PreferenceBatch

SHORTEST_BUCKET = 64


class Tokenizer(Protocol):
    """What is asked of a tokenizer; `encode` gives special tokens written in the text their ids."""

    chat_template: str | None
    bos_id: int | None
    eos_id: int | None

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    def render(self, messages: Any, *, add_generation_prompt: bool = False) -> str: ...


class TokenizedPair(NamedTuple):
    """One pair as token ids; both sequences start with the same `prompt_length` >= 1 prompt tokens.

    chosen_tokens, rejected_tokens: [Tc], [Tr] int32, prompt and answer
    prompt_length: where both answers start
    """

    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    prompt_length: int


class TokenizedPairs(NamedTuple):
    """What `tokenize_pairs` made of N pairs.

    pairs: the N' <= N pairs that can be used, in order
    indices: [N'] int, where each stood among the N
    dropped: (index, reason) of the others
    truncated: how many of the N' lost prompt or answer tokens to `max_length`
    """

    pairs: list[TokenizedPair]
    indices: np.ndarray
    dropped: list[tuple[int, str]]
    truncated: int


def tokenize_pairs(
    pairs: Sequence[PreferencePair], tokenizer: Tokenizer, *, max_length: int, add_bos: bool = False
) -> TokenizedPairs:
    """Tokenize prompt and prompt + answer; the answers start where those tokens part.

    prompt_length = min over both answers of the common prefix length of tokens(prompt) and tokens(prompt + answer),
    so a token merged across the boundary counts as the answer's. Messages go through the tokenizer's chat template (the
    prompt with its generation prompt) and end as the template ends; without a template they are `plain_dialogue`.
    Answers that no template ends get `eos_id`. A prompt without a token of its own becomes the begin (or else the end)
    token, since the first token of a sequence is never scored.

    A pair longer than `max_length` loses prompt tokens from the left, as many as its longer answer needs, in both
    sequences alike; the last prompt token stays, and an answer of more than `max_length - 1` tokens is cut at its end.
    Pairs whose answers are empty or equal as tokens are dropped, with the reason.

    Args:
        max_length: of prompt and answer together, in tokens.
        add_bos: put `bos_id` before pairs that no template renders, as Llama and Gemma (not SmolLM2 or GPT-2) want it.

    Raises ValueError if `max_length` < 2, a pair mixes text and messages, or a token that is needed does not exist.
    """
    if max_length < 2:
        raise ValueError(f"tokenize_pairs: max_length must be at least 2 (prompt and answer), got {max_length}")
    texts, templated = [], []
    for index, pair in enumerate(pairs):
        if len({isinstance(text, str) for text in pair}) > 1:
            raise ValueError(f"tokenize_pairs: pair {index} mixes text and messages")
        texts += _rendered(pair, tokenizer)
        templated.append(not isinstance(pair.prompt, str) and tokenizer.chat_template is not None)
    encoded = tokenizer.encode_batch(texts)
    result = TokenizedPairs([], np.zeros(0, np.int64), [], 0)
    kept, truncated = [], 0
    for index in range(len(pairs)):
        triple = encoded[3 * index : 3 * index + 3]
        prompt, *answers = _parted(triple, tokenizer, templated=templated[index], add_bos=add_bos)
        cut = [answer[: max_length - 1] for answer in answers]
        room = max_length - max(map(len, cut))
        shortened = len(prompt) > room or cut != answers
        if not all(cut) or cut[0] == cut[1]:
            reason = "an answer has no tokens" if not all(cut) else "the answers are equal"
            result.dropped.append((index, f"{reason} after truncation" if shortened else reason))
            continue
        sequences = [np.asarray(prompt[-room:] + answer, np.int32) for answer in cut]
        result.pairs.append(TokenizedPair(sequences[0], sequences[1], min(len(prompt), room)))
        kept.append(index)
        truncated += shortened
    return result._replace(indices=np.asarray(kept, np.int64), truncated=truncated)


def _rendered(pair: PreferencePair, tokenizer: Tokenizer) -> list[str]:
    """The texts of the prompt, prompt + chosen and prompt + rejected."""
    if isinstance(pair.prompt, str):
        return [pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected]  # type: ignore[operator]
    render: Callable[..., str] = plain_dialogue if tokenizer.chat_template is None else tokenizer.render
    answers: list[Text] = [pair.chosen, pair.rejected]
    return [render(pair.prompt, add_generation_prompt=True), *(render([*pair.prompt, *answer]) for answer in answers)]


def _parted(encoded: list[list[int]], tokenizer: Tokenizer, *, templated: bool, add_bos: bool) -> list[list[int]]:
    """The tokens of the prompt and of the two answers, given those of the prompt and the two whole texts."""
    prompt, *wholes = encoded
    shared = min(_common_prefix(prompt, whole) for whole in wholes)
    head, answers = list(prompt[:shared]), [list(whole[shared:]) for whole in wholes]
    if not templated and tokenizer.eos_id is not None:
        answers = [a if a[-1:] == [tokenizer.eos_id] else [*a, tokenizer.eos_id] for a in answers]
    if add_bos and not templated:
        if tokenizer.bos_id is None:
            raise ValueError("tokenize_pairs: add_bos, but the tokenizer has no begin token")
        head = head if head[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *head]
    if not head:
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            raise ValueError("tokenize_pairs: a prompt has no tokens, and the tokenizer no begin or end token")
        head = [first]
    return [head, *answers]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class PreferenceData:
    """N tokenized pairs as batches of few static shapes; batch `step` depends on (seed, step) alone.

    Each pair belongs to the shortest bucket T that holds both its sequences. In each epoch every bucket is permuted and
    cut into batches of B; the fewer than B pairs left over go to the next longer bucket. So an epoch is ceil(N / B)
    batches, of which at most one is incomplete (filled up with repeated rows that have valid=0), and every pair is
    valid in it exactly once. The batches of all buckets are then shuffled.
    """

    def __init__(
        self,
        tokenized: TokenizedPairs | Sequence[TokenizedPair],
        *,
        batch_size: int,
        seed: int,
        pad_id: int,
        buckets: Sequence[int] | None = None,
        run_length: int = 1,
    ):
        """Sort pairs into buckets.

        Args:
            batch_size: B, rows per batch.
            seed: of the order of pairs and of batches.
            pad_id: fills the tokens past a sequence's end; any id will do, since masks exclude it.
            buckets: the lengths T to pad to; None takes powers of two from 64, the last one trimmed to the longest
                pair (rounded up to a multiple of 8).
            run_length: how many batches of one bucket follow each other, so that a host loop can scan over them.

        Raises ValueError if there are no pairs, a size is not positive, or a pair is longer than every bucket.
        """
        pairs = list(tokenized.pairs if isinstance(tokenized, TokenizedPairs) else tokenized)
        if not pairs or batch_size < 1 or run_length < 1:
            raise ValueError(
                "PreferenceData: needs at least one pair, batch_size >= 1 and run_length >= 1, got "
                f"{len(pairs)} pairs, batch_size {batch_size}, run_length {run_length}"
            )
        self.batch_size, self.seed, self.pad_id, self.run_length = batch_size, seed, pad_id, run_length
        self.reference: tuple[np.ndarray, np.ndarray] | None = None
        self._chosen = _Sequences([pair.chosen_tokens for pair in pairs])
        self._rejected = _Sequences([pair.rejected_tokens for pair in pairs])
        self._prompt_lengths = np.asarray([pair.prompt_length for pair in pairs], np.int32)
        lengths = np.maximum(self._chosen.lengths, self._rejected.lengths)
        longest = int(lengths.max())
        self.buckets = _default_buckets(longest) if buckets is None else tuple(sorted(set(buckets)))
        if not self.buckets or longest > self.buckets[-1]:
            raise ValueError(f"PreferenceData: a pair of {longest} tokens fits into none of the buckets {self.buckets}")
        self._bucket_of = np.searchsorted(self.buckets, lengths)
        # An epoch's order is wanted at each of its steps, for each lane.
        self._batches = functools.lru_cache(maxsize=256)(self._make_batches)
        self._schedule = functools.lru_cache(maxsize=2)(self._make_schedule)

    def __len__(self) -> int:
        """N."""
        return len(self._prompt_lengths)

    @property
    def steps_per_epoch(self) -> int:
        """ceil(N / B)."""
        return -(-len(self) // self.batch_size)

    def batch(self, step: int) -> PreferenceBatch:
        """Batch `step` >= 0 in NumPy: tokens int32, masks bool [B, T]; valid bool, references float32 or None [B]."""
        return self._assemble(*self._rows(step, self.seed))

    def lanes(self, step: int, seeds: Sequence[int]) -> PreferenceBatch:
        """Batch `step` of S runs, leaves [S, B, ...]: run s orders its pairs by `seeds[s]`.

        The order of buckets, and with it the shape, is that of `self.seed` for all runs; a run whose seed is
        `self.seed` sees `batch(step)`.
        """
        if not len(seeds):
            raise ValueError("PreferenceData.lanes: needs at least one seed")
        rows, valid, lengths = zip(*(self._rows(step, seed) for seed in seeds), strict=True)
        return self._assemble(np.stack(rows), np.stack(valid), lengths[0])

    def rows(self, step: int) -> np.ndarray:
        """Which of the N pairs stand in batch `step`, [B] int, without making the batch."""
        return self._rows(step, self.seed)[0]

    def length(self, step: int) -> int:
        """T of batch `step`, without making the batch."""
        return self._rows(step, self.seed)[2]

    def tokens(self, step: int) -> int:
        """Real tokens in batch `step`: prompts and answers of both sides, without padding and repeated rows."""
        rows, valid, _ = self._rows(step, self.seed)
        return int((self._chosen.lengths[rows] + self._rejected.lengths[rows])[valid].sum())

    def in_order(self) -> Iterator[tuple[np.ndarray, PreferenceBatch]]:
        """All pairs once, as (indices [B], batch) in a fixed order, short buckets first.

        `out[indices[batch.valid]] = values[batch.valid]` puts values [B] of a batch into the order of the pairs.
        """
        for length, rows in self._cut(np.arange(len(self))):
            filled, valid = _filled(rows, self.batch_size)
            yield filled, self._assemble(filled, valid, length)

    def collect(self, function: Callable[[PreferenceBatch], Any]) -> Any:
        """Apply `function` (batch -> pytree of [B, ...] arrays) to all pairs; NumPy leaves [N, ...] in their order."""
        indices, results = [], []
        for rows, batch in self.in_order():
            indices.append(rows[batch.valid])
            results.append(jax.tree.map(lambda x, valid=batch.valid: np.asarray(x)[valid], function(batch)))
        back = np.argsort(np.concatenate(indices))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *results)

    def with_reference(self, chosen_logps: np.ndarray, rejected_logps: np.ndarray) -> Self:
        """A copy whose batches carry these reference log-probabilities [N] (nats), in the order of the pairs.

        `data.with_reference(*data.collect(logps))` computes them once. Raises ValueError on another shape or on a value
        that is not finite.
        """
        values = []
        for name, given in (("chosen_logps", chosen_logps), ("rejected_logps", rejected_logps)):
            value = np.asarray(given, np.float32)
            if value.shape != (len(self),):
                raise ValueError(f"with_reference: {name} must be [{len(self)}], got {list(value.shape)}")
            if not np.isfinite(value).all():
                raise ValueError(f"with_reference: {name}[{int(np.argmin(np.isfinite(value)))}] is not finite")
            values.append(value)
        new = copy.copy(self)
        new.reference = (values[0], values[1])
        return new

    def _rows(self, step: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Pair indices [B], which of them are valid [B], and T of batch `step` in the order of `seed`."""
        if step < 0:
            raise ValueError(f"PreferenceData: step must be >= 0, got {step}")
        epoch, place = divmod(int(step), self.steps_per_epoch)
        length, rows = self._batches(int(seed), epoch)[self._schedule(epoch)[place]]
        return *_filled(rows, self.batch_size), length

    def _make_batches(self, seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
        return self._cut(np.random.default_rng((seed, epoch)).permutation(len(self)))

    def _make_schedule(self, epoch: int) -> np.ndarray:
        """Which of the epoch's batches comes when: runs of one bucket, shuffled. The same for every lane."""
        lengths = [length for length, _ in self._batches(self.seed, epoch)]
        first = {length: lengths.index(length) for length in lengths}
        runs: dict[tuple[int, int], list[int]] = {}
        for index, length in enumerate(lengths):
            runs.setdefault((length, (index - first[length]) // self.run_length), []).append(index)
        # The third word keeps this stream apart from that of the pairs.
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(len(runs))
        return np.concatenate([list(runs.values())[run] for run in order])

    def _cut(self, order: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Pairs in `order` as (T, rows) batches, bucket by bucket. The sequence of T does not depend on the order."""
        batches, rest = [], order[:0]
        bucket_of = self._bucket_of[order]
        for bucket in np.unique(bucket_of):
            rows = np.concatenate([rest, order[bucket_of == bucket]])
            full = len(rows) // self.batch_size * self.batch_size
            batches += [(self.buckets[bucket], part) for part in rows[:full].reshape(-1, self.batch_size)]
            rest = rows[full:]
        return [*batches, (self.buckets[bucket_of.max()], rest)] if len(rest) else batches

    def _assemble(self, rows: np.ndarray, valid: np.ndarray, length: int) -> PreferenceBatch:
        """The batch of pairs `rows` [..., B] padded to `length`."""
        prompts = self._prompt_lengths[rows]
        chosen, chosen_mask = self._chosen.padded(rows, prompts, length, self.pad_id)
        rejected, rejected_mask = self._rejected.padded(rows, prompts, length, self.pad_id)
        references: Any = (None, None) if self.reference is None else tuple(value[rows] for value in self.reference)
        batch: Any = (chosen, chosen_mask, rejected, rejected_mask, *references, valid)
        return PreferenceBatch._make(batch)


class _Sequences:
    """N token sequences end to end, so that a batch is one gather."""

    def __init__(self, sequences: Sequence[np.ndarray]):
        self.lengths = np.asarray([len(tokens) for tokens in sequences], np.int64)
        self._start = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self._flat = np.concatenate(sequences).astype(np.int32)

    def padded(self, rows: np.ndarray, prompts: np.ndarray, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [..., B, T] of sequences `rows` and the mask of those after the prompt."""
        position = np.arange(length)
        real = position < self.lengths[rows][..., None]
        tokens = self._flat[np.where(real, self._start[rows][..., None] + position, 0)]
        return np.where(real, tokens, np.int32(pad_id)), real & (position >= prompts[..., None])


def _filled(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`rows` repeated up to `size`, and which of them came first."""
    return np.resize(rows, size), np.arange(size) < len(rows)


def _default_buckets(longest: int) -> tuple[int, ...]:
    shorter: list[int] = []
    while (bucket := SHORTEST_BUCKET << len(shorter)) < longest:
        shorter.append(bucket)
    return (*shorter, min(bucket, -(-longest // 8) * 8))
