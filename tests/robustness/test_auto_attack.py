"""AutoAttack: the truth on a linear classifier, with survivors gathered and without, and what it compiles."""

import logging
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.robustness.auto_attack import auto_attack
from jaxalign.robustness.survivors import Survivors, as_rows, bucket, parts, ranked_classes

ROWS, FEATURES, CLASSES = 21, 8, 4
BUDGET = {"steps": 12, "queries": 30, "bounds": (-2.0, 2.0)}
KEY = jax.random.key(0)

weights = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
x = np.random.default_rng(2).uniform(0.3, 0.7, (ROWS, FEATURES)).astype(np.float32)
y = np.argmax(x @ weights, axis=1)


class Linear:
    """A classifier whose weights can be replaced."""

    def __init__(self, weights):
        self.weights, self.traces = jnp.asarray(weights), 0

    def __call__(self, x, key=None):
        self.traces += 1
        logits = x @ self.weights
        return logits if key is None else logits + 0.1 * jax.random.normal(key, logits.shape)


def distances(weights):
    """The linf distance of each row of x from the nearest class other than y, in closed form."""
    gaps = (x @ weights)[np.arange(ROWS), y][:, None] - x @ weights
    sizes = np.abs(weights[:, y][:, :, None] - weights[:, None, :]).sum(axis=0)
    return np.min(np.where(np.arange(CLASSES)[None, :] == y[:, None], np.inf, gaps / np.maximum(sizes, 1e-9)), axis=1)


def compilations(call, caplog):
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax._src.interpreters.pxla"):
        result = call()
    return result, sum("Compiling" in record.getMessage() for record in caplog.records)


def test_breaks_exactly_what_can_be_broken_and_compiles_once(caplog):
    classifier, seen = Linear(weights), []
    epsilon = np.where(np.arange(ROWS) % 3 == 0, 1.1, 0.9) * distances(weights)

    def attack():
        return auto_attack(KEY, classifier, x, y, epsilon, batch_size=16, progress=lambda *a: seen.append(a), **BUDGET)

    result, compiled = compilations(attack, caplog)
    assert compiled > 0
    np.testing.assert_array_equal(result.success, np.arange(ROWS) % 3 == 0)
    assert np.all(np.abs(np.asarray(result.x_adv) - x).max(axis=1) <= epsilon + 1e-6)
    np.testing.assert_array_equal(np.asarray(result.margin) < 0, result.success)
    names = ["APGD-CE", *["APGD-T"] * 3, *["FAB-T"] * 3, "Square", ""]
    assert [name for name, _, _ in seen] == names
    left = [n for _, n, _ in seen]
    assert left[0] == ROWS
    assert left == sorted(left, reverse=True)
    assert left[-1] == ROWS - result.success.sum()

    classifier.weights = jnp.asarray(-weights)  # every row is wrong now, but for those nearest to all classes
    flipped, compiled = compilations(attack, caplog)
    assert compiled == 0
    wrong = np.argmax(-x @ weights, axis=1) != y
    assert flipped.success[wrong].all()
    np.testing.assert_array_equal(flipped.x_adv[wrong], x[wrong])


def test_inside_a_trace_it_is_the_same_cascade():
    epsilon = np.where(np.arange(ROWS) % 3 == 0, 1.1, 0.9) * distances(weights)
    result = jax.jit(lambda epsilon: auto_attack(KEY, Linear(weights), x, y, epsilon, **BUDGET))(epsilon)
    np.testing.assert_array_equal(result.success, np.arange(ROWS) % 3 == 0)


@pytest.mark.slow
def test_lanes_of_epsilons_and_keys():
    def over(scale, key):
        return auto_attack(key, Linear(weights), x, y, scale * distances(weights), **BUDGET)

    scales = np.array([0.0, 0.9, 1.1])
    result = jax.vmap(over)(scales, jax.random.split(KEY, 3))
    np.testing.assert_array_equal(result.success, np.broadcast_to(scales[:, None] > 1, (3, ROWS)))
    np.testing.assert_allclose(result.x_adv[0], x, atol=1e-7)


@pytest.mark.slow
def test_rand_averages_over_keys():
    scales = np.where(np.arange(ROWS) % 2 == 0, 3.0, 0.2)
    result = auto_attack(KEY, Linear(weights), x, y, scales * distances(weights), version="rand", **BUDGET)
    clear = distances(weights) > 0.05  # of the others the noise decides
    assert clear.sum() > ROWS // 2
    np.testing.assert_array_equal(np.asarray(result.success)[clear], (scales > 1)[clear])


def test_batches_by_hand():
    assert list(parts(900, 256, 64)) == [256, 256, 256, 128, 64]
    assert list(parts(388, 512, 64)) == [256, 128, 64]
    assert list(parts(250, 256, 64)) == [256]
    assert list(parts(5, 5, 5)) == [5]
    assert list(parts(0, 8, 8)) == []
    assert [bucket(n, 4) for n in (0, 1, 4, 5, 9)] == [4, 4, 4, 8, 16]
    for rows in range(1, 600, 7):
        sizes = list(parts(rows, 200, 32))
        assert rows <= sum(sizes) < rows + 33
        assert set(sizes) <= {200, 128, 64, 32}


class Counts(NamedTuple):
    x_adv: jax.Array
    margin: jax.Array
    done: jax.Array


@flax.struct.dataclass
class Countdown:
    """A search whose margin falls by one a step, from 100, and that is done with a row after `target` steps."""

    length: int = flax.struct.field(pytree_node=False, default=33)

    def init(self, key, rows):
        return Counts(rows.x, jnp.full(len(rows.y), 100.0), rows.target <= 0)

    def step(self, key, apply, rows, state, i):
        margin = jnp.where(state.done, state.margin, state.margin - 1)
        return Counts(rows.x + 1, margin, state.done | (i + 1 >= rows.target))


def test_gathered_rows_are_stepped_as_often_as_they_ask_and_written_to_their_places(monkeypatch):
    monkeypatch.setattr("jaxalign.robustness.survivors.SMALLEST_BUCKET", 4)
    rows = 45
    inputs = np.arange(2.0 * rows, dtype=np.float32).reshape(rows, 2)
    labels = np.arange(rows) % 2
    clear = lambda x: jnp.stack([x[:, 0] * 0, x[:, 0] * 0 + 1000], axis=1)  # noqa: E731
    survivors = Survivors(KEY, clear, inputs, labels, 0.1, norm="linf", bounds=None, batch_size=16)
    np.testing.assert_array_equal(survivors.alive, np.arange(1, rows, 2))  # class 1 is right
    wanted = np.random.default_rng(0).permutation(rows)
    survivors.attempt(Countdown(), KEY, wanted)
    taken = np.where(labels == 1, 100.0 - np.clip(wanted, 1, 33), -1000)
    np.testing.assert_array_equal(survivors._best.margin, taken)
    np.testing.assert_array_equal(survivors._best.x_adv, inputs + labels[:, None])


def test_rows_by_hand():
    tree = {"a": jnp.zeros((2, 1)), "b": jnp.ones((2, 2))}
    rows = as_rows(tree, [0, 1], 0.5, ({"a": 0.0, "b": 1.0}, {"a": 1.0, "b": jnp.array([2.0, 3.0])}))
    np.testing.assert_array_equal(rows.lower, [[0, 1, 1]] * 2)
    np.testing.assert_array_equal(rows.upper, [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(rows.epsilon, [0.5, 0.5])
    assert as_rows(tree, [0, 1], 0.5, None).upper == np.inf
    logits = jnp.array([[1.0, 5.0, 3.0, 2.0], [4.0, 0.0, 1.0, 2.0]])
    np.testing.assert_array_equal(ranked_classes(logits, jnp.array([1, 3]), 2), [[2, 0], [3, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "auto_attack: norm"),
        ({"norm": "l7"}, "norm must be"),
        ({"version": "plus"}, "version"),
        ({"batch_size": 0}, "batch_size"),
        ({"bounds": (0.0, 0.5)}, "outside the box"),
        ({"y": y + CLASSES}, "labels"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"apply": lambda x: x[:, 0]}, "logits"),
        ({"apply": lambda x: jnp.full((len(x), 3), jnp.nan)}, "NaN"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"apply": Linear(weights), "x": x, "y": y % 3, "epsilon": 0.1, "steps": 1, "queries": 1, **change}
    with pytest.raises(ValueError, match=message):
        auto_attack(KEY, **given)
