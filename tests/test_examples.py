"""The examples run as they are printed."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, edits=()):
    source = (EXAMPLES / name).read_text()
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loss_in_your_own_loop():
    assert "P(good" in run("your_own_loop.py")


@pytest.mark.slow
def test_sweep():
    smaller = ("8, 60, 16, 48", "2, 4, 4, 48")
    assert len(run("sweep_beta.py", [smaller]).splitlines()) == 7
