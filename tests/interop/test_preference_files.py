import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.interop.preference_files import (
    PreferenceFileError,
    PreferencePair,
    read_preferences,
    split_pairs,
    write_preferences,
)

GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
OTHER = {"prompt": "3 + 3 =", "chosen": " 6", "rejected": " 7"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write_lines(path, *rows):
    data = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_explicit_text_in_every_kind_of_file(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [GOOD, {**OTHER, "score": 0.5}]
    expected = [PreferencePair("2 + 2 =", " 4", " 5"), PreferencePair("3 + 3 =", " 6", " 7")]
    files = [write_lines(tmp_path / name, *rows) for name in ("a.jsonl", "a.jsonl.gz", "a.ndjson", "lines.json")]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in [*files, tmp_path / "list.json", tmp_path / "list.json.gz", tmp_path / "a.parquet"]:
        assert read_preferences(path) == (expected, [])


def test_parquet_messages_and_row_numbers(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    prompt = [user("hi")]
    rows = [
        {"prompt": prompt, "chosen": [assistant("hello")], "rejected": [{**assistant("go"), "name": "x"}]},
        {"prompt": prompt, "chosen": [assistant("same")], "rejected": [assistant("same")]},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    result = read_preferences(path, on_bad="skip")
    assert result.pairs == [PreferencePair((user("hi"),), (assistant("hello"),), ({**assistant("go"), "name": "x"},))]
    assert result.skipped == [(2, "chosen equals rejected")]
    with pytest.raises(PreferenceFileError, match=r"a\.parquet, row 2: chosen equals rejected"):
        read_preferences(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(PreferenceFileError, match="not readable as Parquet"):
        read_preferences(path)


@pytest.mark.parametrize("prompt", [{}, {"prompt": "ignored beside whole dialogues"}])
def test_implicit_prompt_is_the_longest_common_beginning(tmp_path, prompt):
    head = [{"role": "system", "content": "be kind"}, user("a"), assistant("b"), user("c")]
    row = {**prompt, "chosen": [*head, assistant("yes")], "rejected": [*head, assistant("no")]}
    (pair,) = read_preferences(write_lines(tmp_path / "a.jsonl", row)).pairs
    assert pair == PreferencePair(tuple(head), (assistant("yes"),), (assistant("no"),))


def test_text_prompt_beside_replies_as_messages_becomes_the_users_message(tmp_path):
    row = {"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    (pair,) = read_preferences(write_lines(tmp_path / "a.jsonl", row)).pairs
    assert pair == PreferencePair((user("hi"),), (assistant("yes"),), (assistant("no"),))


def test_hh_dialogues_become_messages(tmp_path):
    head = "\n\nHuman: one\n\ntwo: Assistant: no turn\n\nAssistant: ok\n\nHuman: more\n\nAssistant:"
    row = {"chosen": head + " Sure.\n\nAssistant: And this.", "rejected": head + "No "}
    (pair,) = read_preferences(write_lines(tmp_path / "a.jsonl", row)).pairs
    assert pair.prompt == (user("one\n\ntwo: Assistant: no turn"), assistant("ok"), user("more"))
    assert pair.chosen == (assistant("Sure.\n\nAnd this."),)
    assert pair.rejected == (assistant("No"),)


HUMAN = "\n\nHuman: q\n\nAssistant:"
BAD = [
    (b"{", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid UTF-8"),
    ([1], "not an object"),
    ({"chosen": "a"}, "`rejected` is missing"),
    ({**GOOD, "chosen": None}, "`chosen` is missing"),
    ({**GOOD, "chosen": 3}, "neither text nor a list"),
    ({**GOOD, "chosen": ["x"]}, "other than messages"),
    ({**GOOD, "chosen": [{"role": "user"}]}, "lacks `role` or `content`"),
    ({**GOOD, "chosen": [assistant("x")]}, "not of one kind"),
    ({**GOOD, "prompt": [user("x")]}, "the answers are text"),
    ({**GOOD, "chosen": " 5"}, "chosen equals rejected"),
    ({**GOOD, "chosen": " \n"}, "the chosen answer is empty"),
    ({**GOOD, "prompt": " "}, "the prompt is empty"),
    ({"prompt": [], "chosen": [assistant("x")], "rejected": [assistant("y")]}, "the prompt is empty"),
    (b'{"prompt": "x", "chosen": "\\ud800", "rejected": "y"}', "surrogate"),
    ({"chosen": "x", "rejected": "y"}, 'begins with "Human:"'),
    ({"chosen": "Human: a\n\nAssistant: x", "rejected": "Human: b\n\nAssistant: x"}, "no message in common"),
    ({"chosen": HUMAN + " x", "rejected": HUMAN + "  x\n"}, "chosen equals rejected"),
    ({"chosen": HUMAN + " x", "rejected": HUMAN}, "the rejected answer is empty"),
    ({"chosen": HUMAN + " x", "rejected": "\n\nHuman: q"}, "the rejected answer is empty"),
    ({"chosen": HUMAN + " x\n\nHuman: r\n\nAssistant: z", "rejected": HUMAN + " y"}, "before the last reply"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_by_line_or_skipped_with_its_reason(tmp_path, row, reason):
    path = write_lines(tmp_path / "a.jsonl", GOOD, b"", row, OTHER)
    with pytest.raises(PreferenceFileError, match=reason) as error:
        read_preferences(path)
    assert error.value.line == 3
    assert f"{path}, line 3: " in str(error.value)
    result = read_preferences(path, on_bad="skip")
    assert [pair.chosen for pair in result.pairs] == [" 4", " 6"]
    assert [skip.line for skip in result.skipped] == [3]
    assert result.reasons == {result.skipped[0].reason: 1}
    assert reason in result.skipped[0].reason


def test_items_of_a_json_list_are_named_by_the_line_they_start_on(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n[\n {"prompt": "a",\n  "chosen": "[,",\n  "rejected": "c"}\n ,\n {"prompt": 1}, 7]')
    assert read_preferences(path, on_bad="skip").skipped == [
        (7, "the field `chosen` is missing"),
        (7, "the row is not an object with fields `chosen` and `rejected`"),
    ]
    path.write_text('[\n{"prompt": "a"\n')
    with pytest.raises(PreferenceFileError, match="line 3: not valid JSON"):
        read_preferences(path, on_bad="skip")
    path.write_bytes(b'[\n"\xff"]')
    with pytest.raises(PreferenceFileError, match="line 2: not valid UTF-8"):
        read_preferences(path)


@pytest.mark.parametrize("on_bad", ["raise", "skip"])
def test_files_that_cannot_be_used(tmp_path, on_bad):
    def refused(path, reason):
        with pytest.raises(PreferenceFileError, match=reason):
            read_preferences(path, on_bad=on_bad)

    refused(write_lines(tmp_path / "a.csv", GOOD), "unknown kind of file")
    refused(write_lines(tmp_path / "empty.jsonl"), "no rows")
    refused(write_lines(tmp_path / "blank.jsonl.gz", b"", b"  "), "no rows")
    refused(write_lines(tmp_path / "same.jsonl", GOOD, GOOD), "all 2 usable rows are the same")
    refused(write_lines(tmp_path / "ties.jsonl", *2 * [{**GOOD, "chosen": " 5"}]), "chosen equals rejected")
    # Rows that hardly compress, so that half the stream still gives some lines.
    rows = [{**GOOD, "prompt": str(pow(7, i + 99, 10**40))} for i in range(2000)]
    whole = write_lines(tmp_path / "cut.jsonl.gz", *rows).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.jsonl.gz", r"line [1-9]\d+: the gzip data is damaged or truncated")
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    refused(tmp_path / "not.jsonl.gz", "line 1: the gzip data")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_preferences(tmp_path / "none.jsonl", on_bad=on_bad)


def test_on_bad_is_checked():
    with pytest.raises(ValueError, match="on_bad"):
        read_preferences("a.jsonl", on_bad="ignore")


def test_byte_order_mark_carriage_returns_and_unicode_line_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{**GOOD, "prompt": "a\u2028b\x85c"}, OTHER]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [pair.prompt for pair in read_preferences(path).pairs] == ["a\u2028b\x85c", "3 + 3 ="]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT).filter(lambda t: t[1] != t[2]), min_size=1, unique=True), st.booleans())
def test_written_pairs_come_back(tmp_path_factory, texts, as_messages):
    pairs = [PreferencePair(*text) for text in texts]
    if as_messages:
        pairs = [PreferencePair((user(p),), (assistant(c),), (assistant(r),)) for p, c, r in texts]
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path_factory.mktemp("pairs") / name
        write_preferences(path, pairs)
        assert read_preferences(path) == (pairs, [])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.05, 0.95), st.integers(0, 5))
def test_a_split_keeps_prompts_together_and_loses_nothing(prompts, share, seed):
    pairs = [PreferencePair((user(str(p)),), (assistant(str(i)),), (assistant("x"),)) for i, p in enumerate(prompts)]
    if len(set(prompts)) < 2:
        with pytest.raises(ValueError, match="two different prompts"):
            split_pairs(pairs, held_out=share, seed=seed)
        return
    train, held_out = split_pairs(pairs, held_out=share, seed=seed)
    assert train
    assert held_out
    assert not {str(pair.prompt) for pair in train} & {str(pair.prompt) for pair in held_out}
    assert sorted(train + held_out, key=pairs.index) == pairs
    assert (train, held_out) == split_pairs(pairs, held_out=share, seed=seed)


def test_a_split_of_distinct_prompts_has_the_asked_size_and_depends_on_the_seed():
    pairs = [PreferencePair(str(i), "a", "b") for i in range(50)]
    assert [len(part) for part in split_pairs(pairs, held_out=0.3)] == [35, 15]
    assert split_pairs(pairs, seed=0) != split_pairs(pairs, seed=1)
    with pytest.raises(ValueError, match="held_out"):
        split_pairs(pairs, held_out=1.0)
