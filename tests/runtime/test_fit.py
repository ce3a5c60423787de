"""fit against train, and what it does with shapes, buffers, callbacks and numbers that are not finite."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from small_run import FEATURES, TARGETS, batch, regression

import jaxalign
from jaxalign.runtime import NonFiniteError, StopTraining, curves, fit

STEPS = 24
KEY = jax.random.key(11)


def stacked(steps=STEPS):
    rows = [batch(i) for i in range(steps)]
    return np.stack([x for x, _ in rows]), np.stack([y for _, y in rows])


def leaves(tree):
    return [np.asarray(jax.random.key_data(x) if "key" in str(x.dtype) else x) for x in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def counting(algorithm):
    traces = []

    def step(state, batch):
        traces.append(1)
        return algorithm.step(state, batch)

    return jaxalign.Algorithm(algorithm.init, step), traces


@pytest.fixture(scope="module")
def reference():
    return fit(regression(), KEY, stacked(), steps=STEPS, progress=False)


def test_equals_train(reference):
    state, metrics = reference
    expected_state, expected = jax.jit(lambda key: jaxalign.train(regression(), key, stacked()))(KEY)
    assert int(state.step) == STEPS
    assert {name: value.shape for name, value in metrics.items()} == {name: (STEPS,) for name in expected}
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], expected_state.params["w"], rtol=1e-5)
    assert metrics["loss"][-1] < 0.7 * metrics["loss"][0]


@pytest.mark.parametrize("mode", ["scan", "step"])
@pytest.mark.parametrize("form", ["numpy", "device", "callable"])
def test_chunks_and_forms_of_batches_give_the_same_bits_and_one_trace(reference, mode, form):
    batches = {"numpy": stacked(), "device": jax.tree.map(jnp.asarray, stacked()), "callable": batch}[form]
    for chunk in (None, 7):
        algorithm, traces = counting(regression())
        result = fit(algorithm, KEY, batches, steps=STEPS, chunk=chunk, mode=mode, progress=False)
        assert len(traces) == 1
        assert_same_bits(result, reference)


def test_batch_shapes_that_vary_compile_once_each():
    def bucketed(step):
        return batch(step, rows=(4, 8, 8, 16)[step % 4])

    runs = {}
    for mode in ("scan", "step"):
        algorithm, traces = counting(regression())
        state, metrics = fit(algorithm, KEY, bucketed, steps=16, chunk=8, mode=mode, progress=False)
        assert len(traces) == 3
        assert metrics["loss"].shape == (16,)
        runs[mode] = state
    by_hand, step = regression().init(KEY), jax.jit(regression().step)
    for i in range(16):
        by_hand, _ = step(by_hand, bucketed(i))
    for state in runs.values():
        np.testing.assert_allclose(state.params["w"], by_hand.params["w"], rtol=1e-4)


def test_each_batch_is_made_once():
    made = []

    def bucketed(step):
        made.append(step)
        return batch(step, rows=4 if step < 5 else 8)

    fit(regression(), KEY, bucketed, steps=10, chunk=4, progress=False)
    assert made == list(range(10))


def test_algorithm_that_makes_its_own_data():
    def step(state, batch):
        assert batch is None
        key, draw = jax.random.split(state["key"])
        return {"key": key, "sum": state["sum"] + jax.random.normal(draw)}, {}

    algorithm = jaxalign.Algorithm(lambda key: {"key": key, "sum": jnp.float32(0)}, step)
    state, metrics = fit(algorithm, KEY, None, steps=9, chunk=4, progress=False)
    expected, _ = jax.jit(lambda key: jaxalign.train(algorithm, key, None, length=9))(KEY)
    np.testing.assert_allclose(state["sum"], expected["sum"], rtol=1e-6)
    assert metrics == {}


def test_caller_keeps_its_arrays_and_frozen_is_not_copied():
    base = jnp.ones((FEATURES, TARGETS))
    bias = jnp.full((TARGETS,), 0.5)
    network = jaxalign.Network(lambda key: {"w": base, "b": bias}, lambda p, x: x @ p["w"] + p["b"][None, :])

    def objective(params, batch, key):
        return jnp.mean((network.apply(params, batch[0]) - batch[1]) ** 2), {}

    algorithm = jaxalign.gradient_algorithm(network, objective, optax.sgd(0.1), trainable=lambda name: name == "b")
    seen = []
    state, _ = fit(
        algorithm, KEY, batch, steps=6, chunk=2, callbacks=[lambda n, s, m: seen.append(s.frozen["w"])], progress=False
    )
    assert state.frozen["w"] is base
    assert all(w is base for w in seen)
    np.testing.assert_array_equal(base, 1.0)
    np.testing.assert_array_equal(bias, 0.5)
    assert np.abs(np.asarray(state.params["b"]) - 0.5).max() > 1e-3


def test_state_is_donated():
    kept = []
    fit(regression(), KEY, batch, steps=4, chunk=2, callbacks=[lambda n, s, m: kept.append(s)], progress=False)
    assert kept[0].params["w"].is_deleted()
    assert not kept[-1].params["w"].is_deleted()


def test_lanes():
    lanes = 3
    algorithm = jaxalign.replicate(regression(), lanes)

    def batches(step):
        return jax.tree.map(lambda x: np.stack([x] * lanes), batch(step))

    state, metrics = fit(algorithm, KEY, batches, steps=8, progress=False)
    assert metrics["loss"].shape == (8, lanes)
    assert state.params["w"].shape == (lanes, FEATURES, TARGETS)
    alone, _ = fit(regression(), jax.random.split(KEY, lanes)[1], batch, steps=8, progress=False)
    np.testing.assert_allclose(state.params["w"][1], alone.params["w"], rtol=1e-5)
    pytest.importorskip("matplotlib")
    assert len(curves(metrics).axes) == 3


def test_sharded_state_keeps_its_sharding():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))

    def init(key):
        return {"w": jax.device_put(jnp.zeros((4, 3)), sharding)}

    def step(state, batch):
        return {"w": state["w"] + batch}, {"norm": jnp.sum(state["w"])}

    state, metrics = fit(jaxalign.Algorithm(init, step), KEY, np.ones(6, np.float32), steps=6, progress=False)
    assert state["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(metrics["norm"], np.arange(6) * 12)


def diverging(at, *, where):
    """State counts steps; the metric "loss" or the parameter "w" is NaN from step `at` on."""

    def step(state, batch):
        bad = jnp.where(state["n"] >= at, jnp.nan, 1.0)
        new = {"n": state["n"] + 1, "params": {"w": bad if where == "params" else jnp.float32(1)}}
        return new, {"loss": bad if where == "loss" else jnp.float32(1), "n": state["n"]}

    return jaxalign.Algorithm(lambda key: {"n": jnp.int32(0), "params": {"w": jnp.float32(1)}}, step)



def test_nan_metric_names_its_step_and_keeps_the_good_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="'loss' is nan at step 13; the last checkpoint is of step 10") as caught:
        fit(
            diverging(13, where="loss"), KEY, None, steps=30, chunk=5, checkpoint_every=5, directory=tmp_path,
            progress=False, tensorboard=False,
        )  # fmt: skip
    assert isinstance(caught.value, FloatingPointError)
    assert (caught.value.step, caught.value.name) == (13, "loss")
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [5, 10]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 14


def test_nan_parameter_is_named(tmp_path):
    network = jaxalign.Network(lambda key: {"w": jnp.ones(2)}, lambda p, x: p["w"])

    def objective(params, batch, key):
        return jnp.float32(0) * batch, {}

    def update(grads, state, params):
        return {"w": jnp.where(state >= 7, jnp.inf, 0.0) * jnp.ones(2)}, state + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    algorithm = jaxalign.gradient_algorithm(network, objective, optimizer)
    arguments = {"steps": 12, "chunk": 4, "progress": False, "tensorboard": False, "checkpoint_every": 4}
    with pytest.raises(NonFiniteError, match="params/w is not finite after step 7") as caught:
        fit(algorithm, KEY, np.ones(12, np.float32), directory=tmp_path, **arguments)
    assert caught.value.step == 7
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    state, _ = fit(algorithm, KEY, np.ones(12, np.float32), nan_ok=("params/w",), **arguments)
    assert np.isinf(state.params["w"]).all()


def test_nan_ok_lets_a_metric_be_nan():
    _, metrics = fit(diverging(3, where="loss"), KEY, None, steps=5, nan_ok=("loss",), progress=False)
    np.testing.assert_array_equal(np.isnan(metrics["loss"]), [False, False, False, True, True])


def test_lane_of_a_nan_is_named():
    def step(state, batch):
        return state + 1, {"loss": jnp.where(jnp.arange(3) == 2, jnp.log(4.0 - state), 0.0)}

    with pytest.raises(NonFiniteError, match=r"'loss' is -inf in loss\[2\] at step 4"):
        fit(jaxalign.Algorithm(lambda key: jnp.float32(0), step), KEY, None, steps=9, chunk=9, progress=False)


def test_callbacks_see_each_chunk_and_may_stop():
    seen = []

    def callback(step, state, metrics):
        seen.append((step, int(state.step), len(metrics["loss"])))
        if step >= 10:
            raise StopTraining

    state, metrics = fit(regression(), KEY, batch, steps=20, chunk=4, callbacks=[callback], progress=False)
    assert seen == [(4, 4, 4), (8, 8, 4), (12, 12, 4)]
    assert int(state.step) == 12
    assert metrics["loss"].shape == (12,)


def test_progress_away_from_a_terminal_is_a_few_lines():
    out = io.StringIO()
    fit(regression(), KEY, batch, steps=50, chunk=1, tokens_per_step=lambda step: 8, progress=Console(file=out))
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 0/50: compiling"
    assert lines[1].startswith("step 1/50: loss ")
    assert lines[-1].startswith("step 50/50: loss ")
    assert lines[-1].endswith("tokens/s")
    assert len(lines) <= 4


def test_progress_on_a_terminal():
    out = io.StringIO()
    fit(regression(), KEY, batch, steps=5, progress=Console(file=out, force_terminal=True, width=100))
    assert "compiling" in out.getvalue()
    assert "5/5" in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batches": stacked(4)}, "holds 4 steps"),
        ({"batches": {"a": np.zeros((9, 2)), "b": np.zeros(8)}}, "one leading step axis"),
        ({"batches": batch, "chunk": 0}, "chunk must be at least 1"),
        ({"batches": batch, "resume": True}, "needs the `directory`"),
        ({"batches": batch, "mode": "fast"}, "mode must be one of"),
    ],
)
def test_clear_errors(arguments, said):
    with pytest.raises(ValueError, match=said):
        fit(regression(), KEY, arguments.pop("batches"), steps=8, progress=False, **arguments)
