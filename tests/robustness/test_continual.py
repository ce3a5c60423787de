"""Tasks in order: measures by hand, elastic weight consolidation against its closed form, a reservoir that is fair."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from jaxalign import Network
from jaxalign.robustness.adversarial_training import accuracy
from jaxalign.robustness.continual import continual_learning_metrics, sequential_training
from jaxalign.robustness.elastic_weight_consolidation import (
    consolidate,
    diagonal_fisher,
    elastic_weight_consolidation,
)
from jaxalign.robustness.replay import add_to_reservoir, draw_from_reservoir, empty_reservoir, replay

LINEAR = Network(
    init=lambda key: {"w": 0.1 * jax.random.normal(key, (2, 2)), "b": jnp.zeros(2)},
    apply=lambda params, x: x @ params["w"] + params["b"][None, :],
)


def test_measures_by_hand():
    accuracies = np.array([[0.9, 0.5, 0.4], [0.95, 0.8, 0.6], [0.6, 0.7, 0.9]])
    found = continual_learning_metrics(accuracies, [0.5, 0.4, 0.5])
    np.testing.assert_allclose(found, [2.2 / 3, (0.35 + 0.1) / 2, (-0.3 - 0.1) / 2, (0.1 + 0.1) / 2], rtol=1e-5)
    assert np.isnan(continual_learning_metrics(accuracies).forward_transfer)
    kept = continual_learning_metrics(np.tile(accuracies[:1], (3, 1)))
    assert (kept.forgetting, kept.backward_transfer) == (0.0, 0.0)
    single = continual_learning_metrics(np.array([[0.7]]))
    assert single.average_accuracy == np.float32(0.7)
    assert np.isnan(single.forgetting)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        continual_learning_metrics(accuracies[:2])


def test_fisher_of_a_linear_classifier():
    rng = np.random.default_rng(0)
    x, params = rng.normal(size=(6, 2)), {"w": rng.normal(size=(2, 2)), "b": rng.normal(size=2)}
    p = special.softmax(x @ params["w"] + params["b"], axis=1)
    # d log p_c / d w[i, j] = x_i (1[c = j] - p_j), so that the mean of its square over c is x_i^2 p_j (1 - p_j).
    expected = {"b": (p * (1 - p)).mean(axis=0), "w": np.mean(x[:, :, None] ** 2 * (p * (1 - p))[:, None, :], axis=0)}
    for parts in (1, 3):
        fisher = jax.jit(functools.partial(diagonal_fisher, LINEAR.apply, microbatches=parts))
        for name, value in fisher(jax.tree.map(jnp.float32, params), jnp.float32(x)).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def quadratic_loss(logits, labels):
    """Half the squared distance to (3, -1) in units of curvature (1, 4)."""
    return jnp.sum(jnp.array([[1.0, 4.0]]) * jnp.square(logits - jnp.array([[3.0, -1.0]])), axis=1) / 2


@pytest.mark.parametrize("parts", [1, 2])
def test_consolidation_of_quadratics_has_its_closed_form(parts):
    network = Network(lambda key: jnp.zeros(2), lambda params, x: jnp.broadcast_to(params, (len(x), 2)))
    batch = (jnp.zeros((4, 1)), jnp.zeros(4, int))

    @jax.jit
    def solve(strength):
        algorithm = elastic_weight_consolidation(
            network, optax.sgd(0.1), strength=strength, loss=quadratic_loss, microbatches=parts
        )
        state = algorithm.init(jax.random.key(0)).replace(anchor=jnp.array([1.0, 2.0]), fisher=jnp.array([3.0, 0.5]))
        return jax.lax.scan(lambda s, _: algorithm.step(s, batch), state, length=200)

    for strength in (0.0, 1.0, 2.0):
        state, metrics = solve(strength)
        f1, f2, t1, t2 = strength * np.array([3, 0.5]), np.array([1, 4]), np.array([1, 2]), np.array([3, -1])
        expected = (f1 * t1 + f2 * t2) / (f1 + f2)
        np.testing.assert_allclose(state.params, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["penalty"][-1], np.sum(f1 * (expected - t1) ** 2) / 2, rtol=1e-4)


def test_consolidating_adds_up_and_leaves_frozen_leaves_out():
    x, y = jax.random.normal(jax.random.key(1), (4, 2)), jnp.arange(4) % 2
    algorithm = elastic_weight_consolidation(LINEAR, optax.sgd(0.1), strength=1.0, trainable=lambda name: name == "w")
    state = algorithm.init(jax.random.key(0))
    end = functools.partial(consolidate, LINEAR, x=x, decay=0.5)

    @jax.jit
    def run(state):
        once = end(state)
        twice = end(once)
        moved, _ = algorithm.step(twice, {"x": x, "y": y})
        fisher = diagonal_fisher(LINEAR.apply, state.all_params, x)["w"]
        return algorithm.step(state, (x, y))[1], once, twice, moved, end(moved), fisher

    first, once, twice, moved, last, expected = run(state)
    assert first["penalty"] == 0.0
    assert once.fisher["b"] is None
    np.testing.assert_allclose(once.fisher["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(twice.fisher["w"], 1.5 * expected, rtol=1e-5)
    np.testing.assert_array_equal(last.anchor["w"], moved.params["w"])
    np.testing.assert_array_equal(moved.frozen["b"], state.frozen["b"])


@pytest.fixture(scope="module")
def offer():
    """Offers 30 numbered rows in batches of 6 to a reservoir of 5."""

    def one(key):
        def add(reservoir, step):
            rows = {"row": step * 6 + jnp.arange(6), "x": jnp.full((6, 2), 7.0)}
            return add_to_reservoir(jax.random.fold_in(key, step), reservoir, rows), reservoir

        example = {"row": jnp.zeros(6, jnp.int32), "x": jnp.zeros((6, 2))}
        return jax.lax.scan(add, empty_reservoir(example, capacity=5), jnp.arange(5))

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 2000))


def test_a_reservoir_keeps_each_row_with_the_same_probability(offer):
    final, _ = offer
    assert (final.seen == 30).all()
    np.testing.assert_array_equal(final.rows["x"], 7.0)
    rows = np.asarray(final.rows["row"])
    assert (np.diff(np.sort(rows, axis=1), axis=1) > 0).all()  # no row twice
    expected, kept = 2000 * 5 / 30, np.bincount(rows.ravel(), minlength=30)
    # Counts of a draw of 5 from 30 without replacement: their variance is expected * (1 - 5 / 30).
    statistic = np.sum((kept - expected) ** 2) / (expected * (1 - 5 / 30)) * 29 / 30
    assert 0.001 < stats.chi2.sf(statistic, 29) < 0.999


def test_rows_enter_one_after_another(offer):
    _, (before) = offer
    key, step = jax.random.split(jax.random.key(2), 2000)[0], 2
    start = jax.tree.map(lambda leaf: leaf[0, step], before)
    draws = jax.random.randint(jax.random.fold_in(key, step), (6,), 0, 12 + jnp.arange(6) + 1, jnp.int32)
    expected = np.array(start.rows["row"])
    for row, slot in enumerate(np.asarray(draws)):
        if slot < 5:
            expected[slot] = 12 + row
    np.testing.assert_array_equal(before.rows["row"][0, step + 1], expected)


def test_drawing_from_an_empty_and_from_a_part_filled_reservoir():
    key = jax.random.key(0)

    @jax.jit
    def run(batch):
        empty = empty_reservoir(batch, capacity=8)
        return [draw_from_reservoir(key, kept, count=50) for kept in (empty, add_to_reservoir(key, empty, batch))]

    (_, none), (rows, valid) = run(jnp.array([1.0, 2.0, 3.0]))
    assert not none.any()
    assert valid.all()
    assert set(np.asarray(rows).tolist()) == {1.0, 2.0, 3.0}
    with pytest.raises(ValueError, match="capacity"):
        empty_reservoir(jnp.zeros(3), capacity=0)


def test_the_first_step_with_replay_is_one_without():
    batch = (jax.random.normal(jax.random.key(3), (6, 2)), jnp.arange(6) % 2)
    plain = elastic_weight_consolidation(LINEAR, optax.sgd(0.1), strength=0.0)
    kept = replay(LINEAR, optax.sgd(0.1), example=batch, capacity=4, replayed=3)

    @jax.jit
    def run(key):
        return [algorithm.step(algorithm.init(key), batch) for algorithm in (plain, kept)]

    (a, first), (b, second) = run(jax.random.key(0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), a.params, b.params)
    np.testing.assert_allclose([first["loss"], first["accuracy"]], [second["loss"], second["accuracy"]], rtol=1e-5)
    assert b.reservoir.seen == 6


SIGNS = jnp.where(jnp.arange(8) % 2 == 0, 1.0, -1.0)
# Both can be had together, but the second is learned fastest by turning the first weight round.
TASKS = jnp.stack([SIGNS[:, None] * jnp.array([[1.0, 0.0]]), SIGNS[:, None] * jnp.array([[-3.0, 1.0]])])


def run_both(algorithm, between=None):
    """What is measured of the two tasks in order, for three seeds."""
    labels = (SIGNS > 0).astype(int)
    tests = (TASKS, jnp.stack([labels, labels]))
    run = functools.partial(
        sequential_training,
        algorithm,
        tasks=jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], 100, axis=1), tests),
        tests=tests,
        score=lambda state, test: accuracy(LINEAR.apply(state.all_params, test[0]), test[1]),
        between=between,
    )
    found = jax.vmap(run)(jax.random.split(jax.random.key(0), 3))
    return found, jax.vmap(continual_learning_metrics)(found.scores, found.initial)


def test_consolidation_keeps_what_fine_tuning_forgets():
    @jax.jit
    def run(strength):
        algorithm = elastic_weight_consolidation(LINEAR, optax.sgd(0.1), strength=strength)
        return run_both(algorithm, lambda state, batches: consolidate(LINEAR, state, batches[0][-1]))

    for strength, forgetting in ((0.0, 1.0), (50.0, 0.0)):
        found, measures = run(strength)
        assert found.scores.shape == (3, 2, 2)
        assert found.metrics["loss"].shape == (3, 2, 100)
        np.testing.assert_array_equal(jnp.diagonal(found.scores, axis1=1, axis2=2), 1.0)
        np.testing.assert_array_equal(measures.forgetting, forgetting)


@pytest.mark.slow
def test_replay_keeps_it_too():
    example = (TASKS[0], jnp.zeros(8, int))
    algorithm = replay(LINEAR, optax.sgd(0.5), example=example, capacity=16, replayed=8, replay_weight=3.0)
    found, _ = jax.jit(lambda: run_both(algorithm))()
    np.testing.assert_array_equal(found.scores[:, 1], 1.0)


def test_tasks_and_tests_of_different_number_are_named():
    algorithm = elastic_weight_consolidation(LINEAR, optax.sgd(0.1), strength=0.0)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        sequential_training(
            algorithm, jax.random.key(0), jnp.zeros((2, 5)), jnp.zeros((3, 5)), score=lambda state, test: test.sum()
        )
