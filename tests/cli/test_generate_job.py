"""`jaxalign generate` on a tiny model: streamed text, the chat's cache, files of prompts, interruptions, bad input."""

import builtins
import gzip
import io
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxalign.cli import generate_run
from jaxalign.cli.generate import Generate
from jaxalign.cli.generate_run import TextStream, tokens_of
from jaxalign.interop import ByteTokenizer, load_pretrained
from jaxalign.rlhf.generation import greedy

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
import tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("generate") / "model"
    tiny_models.write_folder(place, tiny_models.random_tensors(0), config=tiny_models.config_json())
    return place


@pytest.fixture(scope="module")
def expected(folder):
    """The text that greedy decoding gives after a conversation, without streaming, cache or reuse."""
    model = load_pretrained(folder)

    def text(options, messages, count):
        tokens = tokens_of(options, model, messages)
        out = jax.jit(lambda p: greedy(model.network, model.params, p, np.array([len(tokens)]), max_new_tokens=count))(
            np.array([tokens])
        )
        new = np.asarray(out.tokens[0, len(tokens) :]).tolist()
        return model.tokenizer.decode(new[: new.index(1)] if 1 in new else new)

    return text


def job(options):
    console = Console(file=io.StringIO(), width=200)
    generate_run.run(options, console)
    return console.file.getvalue()


def test_characters_are_shown_whole():
    text = "né 東京 🙂!"
    stream = TextStream(ByteTokenizer().decode)
    shown = [stream.push([byte]) for byte in text.encode()]
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown)
    assert [piece for piece in shown if piece] == list(text)
    broken = TextStream(ByteTokenizer().decode)
    assert (broken.push([65, 0xF0, 0x9F]), broken.flush()) == ("A", "\ufffd")


def test_an_answer_is_the_greedy_one_and_a_chat_remembers(folder, expected, monkeypatch):
    options = Generate(model=str(folder), greedy=True, max_new_tokens=6, context=96)
    said = ["hello world", "12 she"]
    user = [{"role": "user", "content": text} for text in said]
    first = expected(options, user[:1], 6)
    second = expected(options, [user[0], {"role": "assistant", "content": first}, user[1]], 6)
    one = job(Generate(said[0], model=str(folder), greedy=True, max_new_tokens=6, context=96))
    assert f"\n{first}\n" in one
    lines = iter([*said, ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    both = job(options)
    assert f"\n{first}\n{second}\n" in both
    assert "tokens timed" in both


def test_ctrl_c_ends_the_answer_and_not_the_chat(folder, expected, monkeypatch):
    options = Generate(model=str(folder), greedy=True, max_new_tokens=6, context=96)
    lines = iter(["hello", "world"])

    def keyboard(prompt):
        for line in lines:
            return line
        raise KeyboardInterrupt

    push, stopped = TextStream.push, []

    def interrupted(self, tokens):
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return push(self, tokens)

    monkeypatch.setattr(builtins, "input", keyboard)
    monkeypatch.setattr(TextStream, "push", interrupted)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]
    assert expected(options, [*messages, {"role": "user", "content": "world"}], 6) in job(options)


def test_a_full_context_forgets_or_says_so(folder, monkeypatch):
    lines = iter(["hello", "world", "hello " * 60, ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    shown = job(Generate(model=str(folder), greedy=True, max_new_tokens=12, context=40))
    assert "1 earlier exchanges are forgotten" in shown
    assert "tokens long and the context 40" in shown


def records(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["line"])


def test_a_file_is_completed_and_resumed_exactly(folder, expected, tmp_path):
    prompts = [{"prompt": text} for text in ("hello", "hello world " * 4, "12")]
    prompts.append({"prompt": [{"role": "user", "content": "she"}]})
    file = tmp_path / "p.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.write("\n".join(map(json.dumps, prompts)))
    options = {"model": str(folder), "file": file, "max_new_tokens": 5, "batch_size": 2, "samples": 2}
    job(Generate(**options))
    out = tmp_path / "p.completions.jsonl"
    rows = records(out)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row["prompt"] for row in rows] == [prompt["prompt"] for prompt in prompts]
    assert all(len(row["completions"]) == 2 for row in rows)
    assert all(len(c["tokens"]) == len(c["log_probs"]) for row in rows for c in row["completions"])

    written = out.read_text().splitlines(keepends=True)
    out.write_text("".join(written[:1]) + written[1][:20])  # as a crash leaves it
    assert "4 prompts, 3 to complete" in job(Generate(**options))
    assert records(out) == rows
    before = out.read_bytes()
    assert "0 to complete" in job(Generate(**options))
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match="line 1: made with another model, other prompts or options"):
        job(Generate(**options, seed=1))
    assert out.read_bytes() == before

    greedy_out = tmp_path / "greedy.jsonl"
    job(Generate(**{**options, "samples": 1, "out": greedy_out, "greedy": True}))
    ours = records(greedy_out)[2]["completions"][0]
    assert ours["text"] == expected(Generate(), [{"role": "user", "content": "12"}], 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: needs `prompt`"),
        ('{"prompt": "a"}\nnonsense', "line 2: not valid JSON"),
        (json.dumps({"prompt": "hello " * 70}), "line 1: the prompt is .* leave room for 98"),
        ("", "holds no prompts"),
    ],
)
def test_bad_prompts_are_named_before_anything_is_written(folder, tmp_path, text, message):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        job(Generate(model=str(folder), file=file, max_new_tokens=30))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "--greedy"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be positive"),
        ({"prompt": "a", "file": pathlib.Path("x.jsonl")}, "not both"),
        ({"samples": 2}, "go with --file"),
        ({"raw": True}, "continues a text"),
        ({"prompt": "hello " * 200}, "nothing is left to answer in"),
    ],
)
def test_impossible_options_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        job(Generate(model=str(folder), **options))
