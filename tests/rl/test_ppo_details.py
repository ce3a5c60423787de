"""The conformance table: every detail said to be there names an argument and a test that exist."""

import ast
import inspect
import pathlib
import re

import pytest

from jaxalign import rl
from jaxalign.rl.ppo_details import DETAILS

TESTS = pathlib.Path(__file__).parents[1]


def test_all_37_are_accounted_for():
    assert len(DETAILS) == 37
    assert len({(detail.group, detail.number) for detail in DETAILS}) == 37
    sizes = {group: sum(detail.group == group for detail in DETAILS) for group in {d.group for d in DETAILS}}
    assert sizes == {"core": 13, "Atari": 9, "continuous": 9, "LSTM": 5, "MultiDiscrete": 1}


@pytest.mark.parametrize("detail", DETAILS, ids=lambda detail: f"{detail.group}-{detail.number}")
def test_what_is_claimed_exists(detail):
    if not detail.where:
        assert detail.note, "what is not provided needs a reason"
        assert not detail.test
        return
    name, argument = re.fullmatch(r"(\w+)(?:\((\w+)\))?", detail.where).groups()
    function = getattr(rl, name)
    if argument is not None:
        assert argument in inspect.signature(function).parameters
    file, test = detail.test.split("::")
    tree = ast.parse((TESTS / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
