"""A run that is killed, stopped or damaged goes on as if nothing had happened, bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import batch, regression
from test_fit import assert_same_bits

import jaxalign
from jaxalign.runtime import DamagedCheckpointError, NonFiniteError, Preempted, StopTraining, fit, read_metrics

# Orbax leaves its other reads unfinished when one of them fails; they are collected during some later test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

KEY = jax.random.key(11)
SCRIPT = Path(__file__).with_name("small_run.py")
COMMON = {"chunk": 5, "checkpoint_every": 10, "progress": False, "tensorboard": False}


@pytest.fixture(scope="module")
def reference():
    return fit(regression(), KEY, batch, steps=60, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 40 steps with checkpoints 20, 30, 40."""
    directory = tmp_path_factory.mktemp("finished")
    fit(regression(), KEY, batch, steps=40, directory=directory, fingerprint={"rate": 0.05, "sizes": (6, 3)}, **COMMON)
    return directory


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resumed(directory, steps=60, algorithm=None, key=KEY, **more):
    algorithm = algorithm or regression()
    return fit(algorithm, key, batch, steps=steps, directory=directory, resume=True, **{**COMMON, **more})


def steps_in(directory):
    return [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def checkpoints_in(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


def start(directory, steps, pause):
    command = [sys.executable, str(SCRIPT), str(directory), str(steps), str(pause)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def wait_for_steps(process, directory, steps):
    """Return once the run has written `steps` lines of metrics."""
    path, deadline = directory / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_9_at_a_random_moment(tmp_path, reference):
    process = start(tmp_path, 60, 0.02)
    wait_for_steps(process, tmp_path, random.choice((1, 12, 25)))
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert len(steps_in(tmp_path)) < 60
    assert_same_bits(resumed(tmp_path), reference)
    assert steps_in(tmp_path) == list(range(60))
    assert checkpoints_in(tmp_path) == [40, 50, 60]


def test_sigterm_saves_and_exits_with_143(tmp_path, reference):
    process = start(tmp_path, 60, 0.03)
    wait_for_steps(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    process.stderr.close()
    done = len(steps_in(tmp_path))
    assert 5 <= done < 60
    assert checkpoints_in(tmp_path)[-1] == done
    assert_same_bits(resumed(tmp_path), reference)
    assert steps_in(tmp_path) == list(range(60))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_process_says_how_to_go_on_and_handlers_come_back(tmp_path, reference, number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def raise_signal(step, state, metrics):
        if step == 15:
            signal.raise_signal(number)

    with pytest.raises(Preempted, match=r"stopped after 15 of 60 steps.*resume=True") as caught:
        resumed(tmp_path, callbacks=[raise_signal])
    assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert checkpoints_in(tmp_path) == [10, 15]
    assert_same_bits(resumed(tmp_path), reference)


def test_second_ctrl_c_interrupts_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a process started in the background ignores it

    def twice(step, state, metrics):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        resumed(tmp_path, callbacks=[twice])
    assert signal.getsignal(signal.SIGINT) == before


def test_stop_training_checkpoints(tmp_path, reference):
    def stop(step, state, metrics):
        if step == 25:
            raise StopTraining

    state, metrics = resumed(tmp_path, callbacks=[stop])
    assert int(state.step) == len(metrics["loss"]) == 25
    assert checkpoints_in(tmp_path) == [10, 20, 25]
    assert_same_bits(resumed(tmp_path), reference)


def test_cut_anywhere_with_any_chunk_is_the_same(tmp_path, reference):
    for steps, chunk in ((3, 2), (17, None), (41, 7)):
        resumed(tmp_path, steps=steps, chunk=chunk, checkpoint_every=None)
    assert_same_bits(resumed(tmp_path), reference)


def test_longer_and_finished(copy, reference):
    assert_same_bits(resumed(copy), reference)

    def never(step):
        raise AssertionError("a finished run asked for a batch")

    again = fit(regression(), KEY, never, steps=60, directory=copy, resume=True, **COMMON)
    assert_same_bits(again, reference)
    assert {name: value.dtype for name, value in again[1].items()} == {n: v.dtype for n, v in reference[1].items()}
    with pytest.raises(ValueError, match="60 steps, more than steps=50"):
        resumed(copy, steps=50)


def test_refuses_to_overwrite(copy):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds a run already"):
        fit(regression(), KEY, batch, steps=40, directory=copy, **COMMON)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def damage_missing(step):
    shutil.rmtree(step / "state" / "d")


def damage_truncated(step):
    for path in (step / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_meta(step):
    (step / "meta" / "metadata").write_text('{"step": 40')


@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_meta])
def test_damaged_newest_falls_back_to_the_one_before(copy, reference, damage):
    damage(copy / "checkpoints" / "40")
    with pytest.warns(UserWarning, match="checkpoint 40 is damaged.*going on from 30"):
        result = resumed(copy)
    assert_same_bits(result, reference)
    assert steps_in(copy) == list(range(60))
    assert (copy / "damaged" / "40-0").is_dir()
    assert checkpoints_in(copy) == [40, 50, 60]


def test_one_flipped_bit_in_the_arrays_is_found(tmp_path):
    # Noise does not compress, so it is stored as it is, and nothing below us notices a changed byte of it.
    start_state = jax.random.normal(KEY, (200, 200))
    algorithm = jaxalign.Algorithm(lambda key: {"x": start_state}, lambda s, b: (s, {"sum": jnp.sum(s["x"])}))
    run = {"steps": 4, "directory": tmp_path, **COMMON, "checkpoint_every": 2}
    fit(algorithm, KEY, None, **run)
    largest = max((tmp_path / "checkpoints" / "4" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x01
    largest.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint 4 is damaged"):
        state, _ = fit(algorithm, KEY, None, resume=True, **run)
    np.testing.assert_array_equal(state["x"], start_state)


def test_nothing_good_is_an_error_not_a_new_start(copy):
    for step in (20, 30, 40):
        damage_missing(copy / "checkpoints" / str(step))
    with pytest.raises(DamagedCheckpointError, match="40: its arrays cannot be read"):
        resumed(copy)
    assert checkpoints_in(copy) == [20, 30, 40]
    assert len(steps_in(copy)) == 40


def test_another_configuration_is_named(copy):
    with pytest.raises(ValueError, match=r"rate: 0\.05 then, 0\.1 now, seed: None then, 3 now"):
        resumed(copy, fingerprint={"rate": 0.1, "sizes": [6, 3], "seed": 3})
    resumed(copy, steps=40, fingerprint={"rate": 0.05, "sizes": [6, 3]})
    with pytest.raises(ValueError, match="JSON"):
        resumed(copy, fingerprint={"rate": object()})


def test_another_algorithm_is_named_and_not_taken_for_damage(copy):
    with pytest.raises(ValueError, match=r"params/w is float32\[6, 3\] in the checkpoint and float32\[2, 6, 3\]"):
        resumed(copy, algorithm=jaxalign.replicate(regression(), 2))
    assert checkpoints_in(copy) == [20, 30, 40]


def frozen_algorithm(size=4096):
    def init(key):
        base = jax.random.normal(key, (size,))
        return jaxalign.TrainState(jnp.int32(0), {"b": jnp.zeros(1), "w": None}, (), key, {"b": None, "w": base})

    def step(state, batch):
        b = state.params["b"] + jnp.sum(state.frozen["w"])
        return state.replace(step=state.step + 1, params={"b": b, "w": None}), {"b": b[0]}

    return jaxalign.Algorithm(init, step)


def test_frozen_leaves_are_not_written_and_must_be_the_same(tmp_path):
    run = {"directory": tmp_path, "chunk": 2, "progress": False, "tensorboard": False}
    fit(frozen_algorithm(), KEY, None, steps=2, **run)
    names = (tmp_path / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "params" in names
    assert "frozen', 'w" not in names
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert size < 4096 * 4
    state, metrics = fit(frozen_algorithm(), KEY, None, steps=6, resume=True, **run)
    alone = fit(frozen_algorithm(), KEY, None, steps=6, progress=False)
    assert_same_bits((state, metrics), alone)
    with pytest.raises(ValueError, match=r"frozen leaves are not those .* began with: frozen/w"):
        fit(frozen_algorithm(), jax.random.key(5), None, steps=8, resume=True, **run)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"empty": jnp.zeros((0, 3)), "none": None, "pair": (jnp.ones(2, jnp.bfloat16), ()), "flag": jnp.array(True)},
        [jnp.arange(3, dtype=jnp.int8), jnp.array(1 + 2j), jax.random.split(KEY, 2)],
        jnp.float32(2),
    ],
)
def test_odd_states(tmp_path, state):
    algorithm = jaxalign.Algorithm(lambda key: state, lambda s, batch: (s, {"x": batch}))
    run = {"directory": tmp_path, "chunk": 2, "progress": False, "tensorboard": False}
    fit(algorithm, KEY, np.arange(4), steps=2, **run)
    result, metrics = fit(algorithm, KEY, np.arange(4), steps=4, resume=True, **run)
    assert jax.tree.structure(result) == jax.tree.structure(state)
    assert_same_bits(result, state)
    assert metrics["x"].tolist() == [0, 1, 2, 3]
    assert metrics["x"].dtype == np.int32


def test_lost_metrics_are_not_papered_over(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:25]))
    with pytest.raises(ValueError, match="ends after 25 steps, but the checkpoint is at step 40"):
        resumed(copy)


def test_resume_after_a_nan_repeats_from_the_good_checkpoint(tmp_path):
    def algorithm(limit):
        def step(state, batch):
            return state + 1, {"loss": jnp.where(state < limit, 1.0, jnp.nan)}

        return jaxalign.Algorithm(lambda key: jnp.int32(0), step)

    with pytest.raises(NonFiniteError):
        fit(algorithm(13), KEY, None, steps=20, directory=tmp_path, **COMMON)
    assert np.isnan(read_metrics(tmp_path)["loss"][13])
    _, metrics = fit(algorithm(99), KEY, None, steps=20, directory=tmp_path, resume=True, **COMMON)
    assert metrics["loss"].tolist() == [1.0] * 20
    assert steps_in(tmp_path) == list(range(20))
