"""What `jaxalign generate --file` does: complete every prompt of a file, batch by batch, resumably."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxalign.cli.generate import Generate
from jaxalign.cli.generate_run import sampling_of, tokens_of
from jaxalign.interop import Pretrained
from jaxalign.interop.row_files import SUFFIXES, BadRow, RowFileError, read_rows
from jaxalign.rlhf.generation import Completions, generate, greedy
from jaxalign.runtime.checkpoint import digests

WIDTH = 32  # prompts are padded to a multiple of this, so that few programs are compiled


class Row(NamedTuple):
    """A prompt of the file: its line, what it says there, and its token ids."""

    line: int
    prompt: Any
    tokens: list[int]


def complete_file(options: Generate, pretrained: Pretrained, console: Console) -> Path:
    """Write completions for the rows that have none yet; returns where they are.

    Batches and their random keys follow from the whole file, so a resumed run draws what an uninterrupted one would.
    """
    assert options.file is not None
    rows = read_prompts(options, pretrained)
    out = options.out or options.file.with_name(_stem(options.file) + ".completions.jsonl")
    identity = _identity(options, pretrained, rows)
    done = finished(out, identity)
    batches = _batches(rows, options.batch_size)
    todo = [i for i, batch in enumerate(batches) if any(row.line not in done for row in batch)]
    console.print(f"{len(rows)} prompts, {len(rows) - len(done)} to complete", highlight=False)
    write = _program(options, pretrained)
    params = jax.jit(pretrained.network.for_decoding)(pretrained.params)
    key = jax.random.key(options.seed)
    tokens, began = 0, time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as stream, Progress(console=console, transient=True) as bar:
        task = bar.add_task("Writing", total=len(todo))
        for i in todo:
            batch = batches[i]
            written = jax.device_get(write(jax.random.fold_in(key, i), params, *_padded(batch, options.batch_size)))
            for number, row in enumerate(batch):
                if row.line not in done:
                    texts = _texts(written, number, len(row.tokens), options.samples, pretrained)
                    tokens += sum(len(text["tokens"]) for text in texts)
                    record = {"line": row.line, "prompt": row.prompt, "completions": texts, "run": identity}
                    stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            bar.advance(task)
    seconds = time.perf_counter() - began
    if todo:
        console.print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second", highlight=False)
    console.print(f"Completions: {out}", highlight=False)
    return out


def read_prompts(options: Generate, pretrained: Pretrained) -> list[Row]:
    """Every row of the file, as tokens. Raises RowFileError naming the line of one that cannot be completed."""
    path = options.file
    assert path is not None
    room = pretrained.config.max_length - options.max_new_tokens
    rows = []
    for line, parse in read_rows(path, columns=("prompt",)):
        try:
            row = parse()
        except BadRow as error:
            raise RowFileError(path, line, error.reason) from error
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if isinstance(prompt, str) and prompt:
            messages = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
            messages = prompt
        else:
            raise RowFileError(path, line, "needs `prompt`: a text, or a list of messages with role and content")
        tokens = tokens_of(options, pretrained, messages)
        if not 1 <= len(tokens) <= room:
            raise RowFileError(
                path, line, f"the prompt is {len(tokens)} tokens long; with --max-new-tokens {options.max_new_tokens} "
                f"the model's {pretrained.config.max_length} positions leave room for {room}"
            )  # fmt: skip
        rows.append(Row(line, prompt, tokens))
    if not rows:
        raise RowFileError(path, None, "holds no prompts")
    return rows


def finished(out: Path, identity: str) -> set[int]:
    """Lines that have completions in `out`; an unfinished last record, left by a crash, is cut off.

    Raises ValueError if the records are of another run.
    """
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    lines = set()
    for number, text in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(text)
            line, run = record["line"], record["run"]
        except (ValueError, TypeError, KeyError) as error:
            raise RowFileError(out, number, "not a record of `jaxalign generate`; choose another --out") from error
        if run != identity:
            raise RowFileError(out, number, "made with another model, other prompts or options; choose another --out")
        lines.add(line)
    if whole < len(data):
        with out.open("r+b") as stream:
            stream.truncate(whole)
    return lines


def _stem(path: Path) -> str:
    ending = next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(suffix))
    return path.name[: -len(ending)]


def _identity(options: Generate, pretrained: Pretrained, rows: list[Row]) -> str:
    """A digest of all that decides what is written."""
    free = ("prompt", "model", "file", "out", "context")
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    weights = np.asarray(jax.device_get(digests(pretrained.params))).tobytes()
    text = json.dumps([fixed, [row.tokens for row in rows]])
    return hashlib.sha256(text.encode() + weights).hexdigest()[:16]


def _batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows of like length together, so that little is padding; the order is fixed by the file."""
    ordered = sorted(rows, key=lambda row: (-(-len(row.tokens) // WIDTH), row.line))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _padded(batch: list[Row], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [size, P] and lengths [size]; a short batch repeats its last row."""
    full = batch + batch[-1:] * (size - len(batch))
    width = -(-max(len(row.tokens) for row in batch) // WIDTH) * WIDTH
    prompts = np.zeros((size, width), np.int32)
    for i, row in enumerate(full):
        prompts[i, : len(row.tokens)] = row.tokens
    return prompts, np.array([len(row.tokens) for row in full], np.int32)


def _program(options: Generate, pretrained: Pretrained) -> Any:
    assert pretrained.tokenizer is not None
    stop = pretrained.tokenizer.eos_id
    shared: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "stop_ids": () if stop is None else (stop,),
    }

    def write(key: Any, params: Any, prompts: Any, lengths: Any) -> Completions:
        if options.greedy:
            return greedy(pretrained.network, params, prompts, lengths, **shared)
        return generate(
            key, pretrained.network, params, prompts, lengths, samples=options.samples, **shared, **sampling_of(options)
        )

    return jax.jit(write)


def _texts(
    written: Completions, number: int, length: int, samples: int, pretrained: Pretrained
) -> list[dict[str, Any]]:
    """The completions of one prompt: text, token ids, log-probabilities in nats, and whether it came to an end."""
    assert pretrained.tokenizer is not None
    texts = []
    for row in range(number * samples, (number + 1) * samples):
        at = np.asarray(written.mask[row])
        tokens = np.asarray(written.tokens[row])[at].tolist()
        texts.append(
            {
                "text": pretrained.tokenizer.decode(tokens),
                "tokens": tokens,
                "log_probs": [round(float(x), 5) for x in np.asarray(written.log_probs[row])[at]],
                "ended": bool(written.ended[row]),
            }
        )
    return texts
