"""VNN-LIB: what a text says, and what is refused, by line."""

import gzip

import numpy as np
import pytest

from jaxalign.interop.vnnlib import read_vnnlib

TWO = """; two inputs, two outputs
(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = "(assert (>= X_0 -1))(assert (<= X_0 1)) (assert (<= 0.25 X_1)) (assert (<= (* 2 X_1) 1.5))\n"


def only(found):
    (case,) = found.cases
    return case


def test_a_box_and_linear_conditions_by_hand():
    case = only(read_vnnlib(TWO + BOX + "(assert (<= (+ (* 2.0 Y_0) (- Y_1) 3) (- Y_1 1 Y_0)))"))
    np.testing.assert_array_equal(case.lower, [-1, 0.25])
    np.testing.assert_array_equal(case.upper, [1, 0.75])
    np.testing.assert_array_equal(case.weights, [[3, -2]])  # 2 y0 - y1 + 3 <= y1 - 1 - y0
    np.testing.assert_array_equal(case.offsets, [-4])
    assert case.excess(np.array([0.0, 2.0])) == 0
    assert case.excess(np.array([1.0, 0.0])) == 7


def test_a_variable_times_zero_is_no_part_of_a_condition():
    case = only(read_vnnlib(TWO + BOX + "(assert (<= (+ Y_0 (* 0 X_0) (- Y_1 Y_1)) 1)) (assert (<= (* 0 X_1) 1))"))
    np.testing.assert_array_equal(case.weights, [[1, 0]])


def test_comparisons_turn_the_right_way():
    case = only(read_vnnlib(TWO + BOX + "(assert (>= Y_0 2)) (assert (< Y_1 3)) (assert (== Y_0 Y_1))"))
    np.testing.assert_array_equal(case.weights, [[-1, 0], [0, 1], [1, -1], [-1, 1]])
    np.testing.assert_array_equal(case.offsets, [-2, np.nextafter(3, 0), 0, 0])
    strict = only(read_vnnlib(TWO + BOX + "(assert (> X_0 0.5))"))
    assert strict.lower[0] == np.nextafter(0.5, 1)
    assert strict.weights.shape == (0, 2)
    assert strict.excess(np.zeros(2)) == -np.inf


def test_disjunctions_multiply_out():
    text = """
    (assert (or (and (<= Y_0 0) (or (<= Y_1 1) (<= Y_1 2))) (>= Y_0 5)))
    (assert (or (and (>= X_0 -1) (<= X_0 0)) (and (>= X_0 0) (<= X_0 1) (<= X_1 0.5))))
    (assert (and (>= X_1 0) (<= X_1 1)))
    """
    found = read_vnnlib(TWO + text)
    assert [(*case.lower, *case.upper) for case in found.cases] == [(-1, 0, 0, 1), (0, 0, 1, 0.5)] * 3
    rows = [case.weights.tolist() for case in found.cases]
    assert rows == [[[1, 0], [0, 1]]] * 4 + [[[-1, 0]]] * 2
    offsets = [case.offsets.tolist() for case in found.cases]
    assert offsets == [[0, 1], [0, 1], [0, 2], [0, 2], [-5], [-5]]
    x, y = np.array([-0.5, 0.75]), np.array([6.0, 0.0])
    assert found.broken_by(x, y)
    assert not found.broken_by(-x, y)
    assert not found.broken_by(x, y / 2)


def test_a_part_that_cannot_hold_is_left_out():
    found = read_vnnlib(TWO + BOX + "(assert (or (>= X_0 2) (and (<= 1 0) (<= Y_0 0)) (<= Y_1 0)))")
    np.testing.assert_array_equal(only(found).weights, [[0, 1]])


def test_a_random_condition_agrees_with_its_own_arithmetic():
    rng = np.random.default_rng(0)
    a, b, c, d = (round(float(v), 3) for v in rng.normal(size=4))
    text = f"(assert (or (<= (* {a} (+ Y_0 (* Y_1 {b}))) (- (/ Y_0 4) {c})) (and (>= Y_1 {d}) (>= Y_0 Y_1))))"
    found = read_vnnlib(TWO + BOX + text.replace(" -", " -"))
    x = np.array([0.0, 0.5])
    for y in rng.normal(size=(50, 2)):
        expected = a * (y[0] + b * y[1]) <= y[0] / 4 - c or (y[1] >= d and y[0] >= y[1])
        assert found.broken_by(x, y) == expected


VERSION_2 = """(vnnlib-version <2.0>)
(declare-network N
  (declare-input image float32 [1, 2, 2])
  (declare-output Y float32 [1,2] ))
(assert (and (>= image[0,0,0] 0) (<= image[0, 0, 0] 1) (>= image[0,0,1] 2) (<= image[0,0,1] 3)
  (>= image[0,1,0] 4) (<= image[0,1,0] 5) (>= image[0,1,1] 6) (<= image[0,1,1] 7)))
(assert (<= Y[0,1] Y[0,0]))
"""


def test_the_second_version_of_one_network(tmp_path):
    path = tmp_path / "p.vnnlib.gz"
    path.write_bytes(gzip.compress(VERSION_2.encode()))
    case = only(read_vnnlib(path))
    np.testing.assert_array_equal(case.lower, [0, 2, 4, 6])
    np.testing.assert_array_equal(case.upper, [1, 3, 5, 7])
    np.testing.assert_array_equal(case.weights, [[-1, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWO + "(assert (<= X_2 0))", "line 6: unknown symbol 'X_2'"),
        (TWO + "\n(assert (<= (* Y_0 Y_1) 0))", "line 7: .*not linear"),
        (TWO + "(assert (<= (/ 1 Y_1) 0))", "line 6: .*not linear"),
        (TWO + "(assert (<= X_0 1))", r"X_0 is not bounded on both sides: \[-inf, 1.0\]"),
        (TWO + BOX + "(assert (>= X_0 1.5))", "line 7: X_0: lower bound 1.5 is above upper bound 1.0"),
        (TWO + BOX + "(assert (<= X_0 X_1))", "line 7: a condition on inputs"),
        (TWO + BOX + "(assert (<= X_0 Y_1))", "line 7: a condition on inputs"),
        (TWO + "(assert (<= X_0 1)", "line 6: a parenthesis opens here"),
        (TWO + "(assert (<= X_0 1)))", "line 6: a closing parenthesis"),
        (TWO + "(assert (=> (<= X_0 1) (<= Y_0 1)))", "line 6: '=>' is not a condition"),
        (TWO + "(assert (<= X_0 1e999))", "line 6: the number 1e999"),
        (TWO + "(define-fun f)", "line 6: 'define-fun' is not read"),
        (TWO + "stray", "line 6: 'stray' stands outside"),
        ("(declare-const Z_0 Real)", "line 1: a variable must be called"),
        ("(declare-const X_0 Int)", "line 1: X_0 must be Real"),
        ("(declare-const X_1 Real)(declare-const Y_0 Real)", "inputs X must be declared from 0 on"),
        (TWO + "(assert " + "(and " + "(or (<= Y_0 0) (<= Y_1 0))" * 17 + "))", "131,072 cases"),
        (VERSION_2.replace("image[0,0,0]", "image[0,0,2]"), r"line 5: image\[0,0,2\] is outside"),
        (VERSION_2.replace("(declare-output", "(declare-hidden"), "line 4: a network must have one input"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "p.vnnlib"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_vnnlib(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(ValueError, match=message):
        read_vnnlib(text)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_vnnlib(tmp_path / "absent (1).vnnlib")
    (tmp_path / "p.gz").write_bytes(b"(not gzip)")
    with pytest.raises(ValueError, match="not a readable text file"):
        read_vnnlib(tmp_path / "p.gz")
