"""The feedback log: what was written is there, whatever happened to the writer."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxalign.interop.feedback_log import FeedbackLog
from jaxalign.interop.row_files import RowFileError


def test_records_and_arrays(tmp_path):
    log = FeedbackLog(tmp_path / "new" / "feedback.jsonl")
    assert log.records() == []
    assert log.arrays().outcomes.shape == (0,)
    first = log.prefer("a", "b", 1, annotator="anna", note="the second is calmer\n\u2028")
    log.score("a", 0.25, annotator="ben")
    log.extend([{"kind": "preference", "first": "b", "second": "c", "outcome": 2, "time": 5.0}])
    rows = FeedbackLog(log.path).records()
    assert rows[0] == first
    assert rows[0]["note"] == "the second is calmer\n\u2028"
    assert [row["kind"] for row in rows] == ["preference", "score", "preference"]
    found = log.arrays()
    np.testing.assert_array_equal(found.outcomes, [1, 2])
    assert found.first.tolist() == ["a", "b"]
    assert found.second.tolist() == ["b", "c"]
    assert found.annotators.tolist() == ["anna", ""]
    assert found.items.tolist() == ["a"]
    assert found.scores.tolist() == [0.25]
    assert found.scorers.tolist() == ["ben"]
    assert found.times[1] == 5.0
    assert found.score_times[0] >= found.times[0] > 1.7e9


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "opinion"}, "field 'kind' must be one of"),
        ({"kind": "preference", "first": "a", "second": "b"}, "needs the field 'outcome'"),
        ({"kind": "preference", "first": "a", "second": "b", "outcome": 3}, "field 'outcome' must be 0"),
        ({"kind": "preference", "first": "a", "second": "b", "outcome": True}, "field 'outcome' must be 0"),
        ({"kind": "preference", "first": 1, "second": "b", "outcome": 0}, "field 'first' must be a string, got 1"),
        ({"kind": "score", "item": "a", "score": float("nan")}, "field 'score' must be a finite number, got nan"),
        ({"kind": "score", "item": "a", "score": 1.0, "time": "now"}, "field 'time' must be a finite number"),
    ],
)
def test_a_bad_record_is_named_and_nothing_of_its_batch_written(tmp_path, record, message):
    log = FeedbackLog(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match=f"record 1: .*{message}"):
        log.extend([{"kind": "score", "item": "a", "score": 1.0}, record])
    assert log.records() == []


def test_a_torn_last_line_is_set_aside_and_reported(tmp_path):
    path = tmp_path / "f.jsonl"
    FeedbackLog(path).score("a", 1.0)
    whole = path.read_bytes()
    torn = b'{"time": 1.0, "kind": "sco' + b"x" * 200_000  # longer than what is read at once
    path.write_bytes(whole + torn)
    with pytest.warns(UserWarning, match=r"f.jsonl: a last line that a crash cut short \(200026 bytes\)"):
        log = FeedbackLog(path)
    assert log.torn == torn
    assert path.read_bytes() == whole
    assert (tmp_path / "f.jsonl.torn").read_bytes() == torn + b"\n"
    # The same when another writer dies while this one is open, and when nothing but a torn line is there.
    with path.open("ab") as other:
        other.write(b'{"ti')
    assert len(log.records()) == 1
    with pytest.warns(UserWarning, match="cut short"):
        log.score("b", 2.0)
    assert [row["item"] for row in log.records()] == ["a", "b"]
    path.write_bytes(b'{"ti')
    with pytest.warns(UserWarning, match="cut short"):
        assert FeedbackLog(path).records() == []


def test_a_damaged_line_in_the_middle_has_a_file_and_a_line(tmp_path):
    log = FeedbackLog(tmp_path / "f.jsonl")
    for item in "abc":
        log.score(item, 1.0)
    lines = log.path.read_text().splitlines(keepends=True)
    log.path.write_text(lines[0] + lines[1][:10] + "\n" + lines[2])
    with pytest.raises(RowFileError, match=r"f\.jsonl, line 2: not JSON"):
        log.records()
    log.path.write_text(lines[0] + lines[1] + json.dumps({"kind": "score", "item": "c", "time": 1.0}) + "\n")
    with pytest.raises(RowFileError, match=r"f\.jsonl, line 3: a score needs the field 'score'"):
        log.records()


WRITER = """
import sys
from jaxalign.interop.feedback_log import FeedbackLog
log = FeedbackLog(sys.argv[1])
for i in range(int(sys.argv[3])):
    log.score(f"{sys.argv[2]}-{i}", float(i), text="x" * 3000)
    if i == 20:
        print("ready", flush=True)
"""


def writer(path, name, count):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE)


def test_two_writers_and_one_is_killed(tmp_path):
    path = tmp_path / "f.jsonl"
    killed, other = writer(path, "killed", 1_000_000), writer(path, "other", 300)
    assert killed.stdout.readline() == b"ready\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert other.wait() == 0
    for process in (killed, other):
        process.stdout.close()
    names = [row["item"] for row in FeedbackLog(path).records()]
    # Every record that a call returned from is there, once, in its writer's order.
    for name, least in (("killed", 21), ("other", 300)):
        numbers = [int(item.split("-")[1]) for item in names if item.startswith(name)]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= least


def test_a_disk_that_is_full_leaves_no_half_record(tmp_path, monkeypatch):
    log = FeedbackLog(tmp_path / "f.jsonl")
    log.score("a", 1.0)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(OSError, match="only 5 of"):
        log.score("b", 2.0)
    monkeypatch.undo()
    log.score("c", 3.0)
    assert [row["item"] for row in log.records()] == ["a", "c"]
