"""Early stopping on a problem whose validation loss is known at each step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Algorithm, Network, gradient_algorithm, replicate, sweep, train
from jaxalign.early_stopping import EarlyStoppingState, with_early_stopping
from jaxalign.runtime import fit
from jaxalign.runtime.early_stopping import stop_when_all_stopped

GOAL = 3.0


def walker(stride=1.0):
    """params move up by `stride` a step, from 0."""
    network = Network(lambda key: {"x": jnp.zeros(())}, lambda params: params["x"])
    objective = lambda params, batch, key: (-params["x"], {})  # noqa: E731
    return gradient_algorithm(network, objective, optax.sgd(stride))


def distance(state):
    return jnp.abs(state.params["x"] - GOAL)


def watched(stride=1.0, *, every=1, patience=2):
    return with_early_stopping(walker(stride), distance, every=every, patience=patience)


@functools.cache
def run():
    return jax.jit(lambda key: train(watched(), key, None, length=8))(jax.random.key(0))


def test_it_stops_after_patience_and_keeps_the_best():
    state, metrics = run()
    assert isinstance(state, EarlyStoppingState)
    # distances 3 2 1 0 1 2: two checks without improvement end it at step 5
    np.testing.assert_array_equal(metrics["validation/loss"], [2, 1, 0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(metrics["validation/best"], [2, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(metrics["validation/stopped"], [0, 0, 0, 0, 1, 1, 1, 1])
    assert (state.best_params["x"], state.params["x"]) == (3.0, 5.0)
    assert (int(state.best_step), int(state.taken), int(state.step)) == (3, 5, 5)
    assert state.best_all_params == {"x": 3.0}
    assert np.isfinite(metrics["loss"]).all()


def test_steps_after_the_stop_change_nothing_not_even_the_key():
    state, _ = run()
    after, _ = jax.jit(watched().step)(state, None)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert old.dtype == new.dtype
        unwrapped = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (old, new))
        np.testing.assert_array_equal(*unwrapped)


def test_checks_come_every_so_many_steps():
    calls = []

    def counted(state):
        jax.debug.callback(lambda: calls.append(0))
        return distance(state)

    algorithm = with_early_stopping(walker(), counted, every=3, patience=1)
    state, metrics = jax.jit(lambda key: train(algorithm, key, None, length=7))(jax.random.key(0))
    jax.block_until_ready(state)
    jax.effects_barrier()
    np.testing.assert_array_equal(metrics["validation/loss"], [3, 3, 0, 0, 0, 3, 3])
    assert bool(state.stopped)
    assert len(calls) == 1 + 2  # at init, and after steps 3 and 6


def test_the_untrained_parameters_may_be_the_best():
    algorithm = with_early_stopping(walker(), lambda state: state.params["x"], every=1, patience=1)
    state, _ = train(algorithm, jax.random.key(0), None, length=2)
    assert (int(state.best_step), int(state.taken), float(state.best_params["x"])) == (0, 1, 0.0)


def test_each_lane_of_a_sweep_stops_by_itself():
    def one(stride, key):
        state, _ = train(watched(stride), key, None, length=16)
        return state.best_params["x"], state.taken, state.stopped

    best, taken, stopped = sweep(one, jnp.array([1.0, 0.5, 0.125]), jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(best[:, 0], [3.0, 3.0, 2.0])
    np.testing.assert_array_equal(taken, [[5, 5], [8, 8], [16, 16]])
    np.testing.assert_array_equal(stopped[:, 1], [True, True, False])


def test_fit_ends_when_every_lane_has_stopped(tmp_path):
    lanes = replicate(watched(), 2)
    state, metrics = fit(
        lanes, jax.random.key(0), None, steps=100, chunk=4, callbacks=[stop_when_all_stopped], progress=False
    )
    assert metrics["validation/stopped"].shape == (8, 2)
    np.testing.assert_array_equal(state.taken, [5, 5])


def test_frozen_leaves_are_kept_apart_and_a_nan_is_no_improvement():
    network = Network(lambda key: {"x": jnp.zeros(()), "base": jnp.ones(4)}, lambda params: params["x"])
    inner = gradient_algorithm(
        network, lambda params, batch, key: (-params["x"] * params["base"].mean(), {}), optax.sgd(1.0),
        trainable=lambda name: name == "x",
    )  # fmt: skip
    loss = lambda state: jnp.where(state.params["x"] > 1, jnp.nan, -state.all_params["x"])  # noqa: E731
    algorithm = with_early_stopping(inner, loss, every=1, patience=2)
    state, _ = train(algorithm, jax.random.key(0), None, length=4)
    assert state.frozen["base"].shape == (4,)
    assert state.best_params["base"] is None
    assert (float(state.best_all_params["x"]), bool(state.stopped), int(state.taken)) == (1.0, True, 3)
    lanes = replicate(algorithm, 2).init(jax.random.key(0))
    assert (lanes.frozen["base"].shape, lanes.best_params["x"].shape) == ((4,), (2,))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        watched(patience=0)
    with pytest.raises(ValueError, match=r"scalar, got \(2,\)"):
        with_early_stopping(walker(), lambda state: jnp.zeros(2), every=1, patience=1).init(jax.random.key(0))
    bare = Algorithm(lambda key: jnp.zeros(()), lambda state, batch: (state, {}))
    with pytest.raises(ValueError, match="must be a TrainState"):
        with_early_stopping(bare, distance, every=1, patience=1).init(jax.random.key(0))
