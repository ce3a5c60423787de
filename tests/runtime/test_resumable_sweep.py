"""A sweep that is cut and called again: equal to an uncut one, finished lanes not run twice, another sweep refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sweep
from jaxalign.runtime import resumable_sweep

HYPERS = {"rate": np.array([0.1, 0.2, 0.4], np.float32)}
KEYS = jax.random.split(jax.random.key(0), 3)


def run(hyper, key):
    noise = jax.random.normal(key, (2,))
    return {"value": hyper["rate"] * noise, "large": jnp.sum(noise) > 0}


class Cut(Exception):
    pass


def cut_after(lanes):
    def callback(done, total):
        if done >= lanes:
            raise Cut

    return callback


def test_a_cut_sweep_goes_on_where_it_was(tmp_path):
    with pytest.raises(Cut):
        resumable_sweep(run, HYPERS, KEYS, directory=tmp_path, lanes=4, progress=False, callback=cut_after(4))
    first = tmp_path / "lanes-000000.npz"
    kept = first.stat().st_mtime_ns
    found = resumable_sweep(run, HYPERS, KEYS, directory=tmp_path, lanes=4, progress=False)
    assert first.stat().st_mtime_ns == kept
    assert sorted(p.name for p in tmp_path.glob("lanes-*")) == [f"lanes-00000{i}.npz" for i in (0, 4, 8)]
    expected = sweep(run, HYPERS, KEYS)
    np.testing.assert_array_equal(found["value"], expected["value"])
    np.testing.assert_array_equal(found["large"], expected["large"])
    assert found["value"].shape == (3, 3, 2)


def test_a_finished_sweep_is_only_read_and_a_damaged_group_run_again(tmp_path):
    without = lambda _, key: jax.random.normal(key)  # noqa: E731
    expected = resumable_sweep(without, None, KEYS, directory=tmp_path, lanes=2, progress=False)
    assert expected.shape == (3,)

    def never(_, key):
        return jax.pure_callback(lambda k: 1 / 0, jax.ShapeDtypeStruct((), jnp.float32), 0)

    again = resumable_sweep(never, None, KEYS, directory=tmp_path, lanes=2, progress=False)
    np.testing.assert_array_equal(again, expected)
    group = tmp_path / "lanes-000002.npz"
    group.write_bytes(group.read_bytes()[:40])
    with pytest.warns(UserWarning, match=r"lanes-000002.npz is damaged"):
        mended = resumable_sweep(without, None, KEYS, directory=tmp_path, lanes=2, progress=False)
    np.testing.assert_array_equal(mended, expected)


def test_another_sweep_is_refused_by_name(tmp_path):
    resumable_sweep(run, HYPERS, KEYS, directory=tmp_path, progress=False, fingerprint={"world": "a"})
    with pytest.raises(ValueError, match=r"holds another sweep: fingerprint, hypers/rate differ"):
        other = {"rate": HYPERS["rate"] + 1}
        resumable_sweep(run, other, KEYS, directory=tmp_path, progress=False, fingerprint={"world": "b"})
    with pytest.raises(ValueError, match="'key' is key<fry>, not numeric"):
        resumable_sweep(lambda _, key: {"key": key}, None, KEYS, directory=tmp_path / "keys", progress=False)
