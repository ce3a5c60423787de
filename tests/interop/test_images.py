"""Images come from digits or files as they are, split by class; faults name the file, the array and the value."""

import sys

import numpy as np
import pytest

from jaxalign.interop.images import batches, load_images

X = np.arange(12 * 6, dtype=np.uint8).reshape(12, 2, 3)
Y = np.arange(12) % 3


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_split_file_is_scaled_and_kept_in_order(tmp_path):
    path = saved(tmp_path / "i.npz", x_train=X, y_train=Y[:, None], x_test=X[::-1], y_test=Y[::-1].astype(np.float32))
    images = load_images(path)
    assert images.x_train.shape == (12, 2, 3, 1)
    assert images.x_train.dtype == np.float32
    assert images.y_train.dtype == images.y_test.dtype == np.int32
    np.testing.assert_array_equal(images.x_train[..., 0], X / np.float32(255))
    np.testing.assert_array_equal(images.x_test, images.x_train[::-1])
    np.testing.assert_array_equal(images.y_test, Y[::-1])
    assert (images.name, images.num_classes) == (str(path), 3)


def test_floats_with_channels_are_taken_as_they_are_and_split_by_class(tmp_path):
    x = np.random.default_rng(0).random((12, 2, 3, 3))
    path = saved(tmp_path / "i.npz", x=x, y=Y)
    images = load_images(path, held_out=0.25)
    np.testing.assert_array_equal(np.bincount(images.y_test), [1, 1, 1])
    whole = np.concatenate([images.x_train, images.x_test])
    np.testing.assert_array_equal(np.sort(whole.ravel()), np.sort(x.astype(np.float32).ravel()))
    again, other = load_images(path, held_out=0.25), load_images(path, held_out=0.25, seed=1)
    np.testing.assert_array_equal(images.x_test, again.x_test)
    assert (images.x_test != other.x_test).any()


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images = load_images("digits")
    assert (len(images.x_train), len(images.x_test), images.num_classes) == (1438, 359, 10)
    raw = datasets.load_digits()
    assert images.x_train.min() == 0
    assert images.x_train.max() == 1
    total = images.x_train.sum(dtype=np.float64) + images.x_test.sum(dtype=np.float64)
    np.testing.assert_allclose(total, raw.data.sum() / 16)
    counts = np.bincount(raw.target)
    np.testing.assert_allclose(np.bincount(images.y_test), counts * 0.2, atol=0.5)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "jaxalign\[images\]"'):
        load_images("digits")


def floats(value):
    x = np.zeros((12, 2, 3))
    x[4, 1, 2] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": X}, "no array 'y', there are: x"),
        ({"x_train": X, "y_train": Y}, "no array 'x_test', there are: x_train, y_train"),
        ({"x": X[:, 0], "y": Y}, r"x is \(12, 3\), needs images"),
        ({"x": X.astype(np.int64), "y": Y}, "x is int64, needs uint8"),
        ({"x": floats(1.5), "y": Y}, r"x\[4, 1, 2, 0\] is 1.5; floats must lie in \[0, 1\]"),
        ({"x": floats(np.nan), "y": Y}, r"x\[4, 1, 2, 0\] is nan"),
        ({"x": X, "y": Y[:11]}, "x has 12 images, y has 11 labels"),
        ({"x": X, "y": Y - 1}, r"y\[0\] is -1; labels are whole numbers"),
        ({"x": X, "y": Y + 0.5}, r"y\[0\] is 0.5; labels are whole numbers"),
        ({"x": X, "y": np.eye(12)}, r"y is \(12, 12\) float64, needs labels"),
        ({"x": X, "y": Y.astype(str)}, r"needs labels \[N\]"),
        ({"x": X, "y": 0 * Y}, "all images are of class 0"),
        ({"x": X[:3], "y": Y[:3]}, "of each class there is one image"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 4}, r"y_test\[0\] is 4, y_train ends at 2"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :, 1:], "y_test": Y}, r"images \(2, 3, 1\), x_test \(2, 2, 1\)"),
    ],
)
def test_a_bad_file_is_named(tmp_path, arrays, reason):
    with pytest.raises(ValueError, match=rf"i\.npz: .*{reason}"):
        load_images(saved(tmp_path / "i.npz", **arrays))


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "one.npy", X)
    for name in ("text.npz", "one.npy"):
        with pytest.raises(ValueError, match=rf"{name}: not an \.npz file"):
            load_images(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"give 'digits' or an \.npz file"):
        load_images(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="held_out must lie in"):
        load_images("digits", held_out=1.0)


def test_batches_depend_on_the_step_alone_and_an_epoch_repeats_nothing(tmp_path):
    path = saved(tmp_path / "i.npz", x_train=X, y_train=Y, x_test=X, y_test=Y)
    images = load_images(path)
    batch = batches(images, batch_size=5, seed=3)
    seen = [batch(step) for step in range(4)]
    again = batches(images, batch_size=5, seed=3)
    for step in (3, 0, 2, 1):
        np.testing.assert_array_equal(again(step).index, seen[step].index)
        np.testing.assert_array_equal(again(step).x, images.x_train[seen[step].index])
        np.testing.assert_array_equal(again(step).y, images.y_train[seen[step].index])
    epochs = [set(np.concatenate([seen[i].index, seen[i + 1].index])) for i in (0, 2)]
    assert [len(rows) for rows in epochs] == [10, 10]
    assert seen[0].index.tolist() != seen[2].index.tolist()
    assert batches(images, batch_size=5, seed=4)(0).index.tolist() != seen[0].index.tolist()
    with pytest.raises(ValueError, match=r"batch_size must be in 1\.\.12"):
        batches(images, batch_size=13, seed=0)
