"""Demonstrations and worlds go to files and come back; faults name the file and the line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import RowFileError, load_world, read_demonstrations, save_world, write_demonstrations
from jaxalign.irl import sample_trajectories
from jaxalign.mdp import dense_transition, gridworld, random_mdp


def test_demonstrations_come_back(tmp_path):
    mdp = gridworld(2, 3, goal=5)
    uniform = jnp.full((6, 5), -np.log(5.0))
    sampled = sample_trajectories(jax.random.key(0), mdp, uniform, num=8, length=6)
    assert not sampled.mask.all()
    for name in ("demos.jsonl", "demos.jsonl.gz"):
        write_demonstrations(tmp_path / name, sampled)
        read = read_demonstrations(tmp_path / name, mdp=mdp)
        length = read.states.shape[1]
        np.testing.assert_array_equal(read.mask, sampled.mask[:, :length])
        np.testing.assert_array_equal(read.states, np.where(sampled.mask, sampled.states, 0)[:, :length])
        np.testing.assert_array_equal(read.actions, np.where(sampled.mask, sampled.actions, 0)[:, :length])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"states": [0, 1], "actions": [0]}, "differ in length"),
        ({"states": [], "actions": []}, "`states` is missing or empty"),
        ({"actions": [0]}, "`states` is missing or empty"),
        ({"states": [0, 6], "actions": [0, 0]}, r"`states` holds a number outside 0\.\.5"),
        ({"states": [0], "actions": [-1]}, r"`actions` holds a number outside 0\.\.4"),
        ({"states": [0.5], "actions": [0]}, "other than integers"),
        ([0, 1], "not an object"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    path = tmp_path / "demos.jsonl"
    path.write_text(json.dumps({"states": [0], "actions": [1]}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(RowFileError, match=rf"demos\.jsonl, line 3: .*{reason}"):
        read_demonstrations(path, mdp=gridworld(2, 3))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(RowFileError, match=r"none\.jsonl: the file holds no demonstrations"):
        read_demonstrations(tmp_path / "none.jsonl")


@pytest.mark.parametrize("branching", [None, 3])
def test_a_world_comes_back(tmp_path, branching):
    mdp = random_mdp(jax.random.key(1), 5, 2, branching=branching, discount=0.8)
    features, reward = np.eye(5)[:, :2], np.arange(5.0)
    save_world(tmp_path / "world.npz", mdp, features=features, reward=reward)
    world = load_world(tmp_path / "world.npz")
    assert jax.tree.structure(world.mdp) == jax.tree.structure(mdp)
    for old, new in zip(jax.tree.leaves(mdp), jax.tree.leaves(world.mdp), strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(world.features, features)
    np.testing.assert_array_equal(world.reward, reward)


def test_a_grid_is_saved_dense_and_what_is_unknown_stays_unknown(tmp_path):
    mdp = gridworld(2, 2, slip=0.2)
    save_world(tmp_path / "grid.npz", mdp)
    world = load_world(tmp_path / "grid.npz")
    np.testing.assert_allclose(world.mdp.transition, dense_transition(mdp.transition))
    assert world.shape == (2, 2)
    assert world.features is None
    assert world.reward is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transition": np.full((2, 1, 2), 0.4)}, r"transition\[0, 0\] does not sum to 1"),
        ({"transition": np.array([[[1.5, -0.5]], [[0.5, 0.5]]])}, r"transition\[0, 0, 1\] is negative"),
        ({"discount": np.array(1.5)}, "discount must be in"),
        ({"features": np.zeros((3, 2))}, r"features must be \[2, F\]"),
        ({"reward": np.zeros(3)}, "reward must be"),
        ({"shape": np.array([3, 1])}, "shape must be"),
        ({"initial": None}, "there is no array 'initial'"),
    ],
)
def test_a_bad_world_names_file_and_array(tmp_path, changes, reason):
    arrays = {"transition": np.full((2, 1, 2), 0.5), "initial": np.array([1.0, 0.0]), "discount": np.array(0.9)}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=rf"bad\.npz: .*{reason}"):
        load_world(tmp_path / "bad.npz")


def test_what_is_no_npz_is_named(tmp_path):
    (tmp_path / "world.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"world\.npz"):
        load_world(tmp_path / "world.npz")
