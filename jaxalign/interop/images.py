"""Labelled images: scikit-learn's digits by name, or arrays in an .npz file, checked, scaled to [0, 1] and split."""

import pathlib
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxalign.robustness.labelled_batch import LabelledBatch

DIGITS, DIGITS_GREYS = "digits", 16.0
SPLIT, WHOLE = (("x_train", "y_train"), ("x_test", "y_test")), (("x", "y"),)


class Images(NamedTuple):
    """Images of `num_classes` kinds, N to train on and M to test on.

    x_train [N, H, W, C], x_test [M, H, W, C]: float32 in [0, 1]
    y_train [N], y_test [M]: int32 in 0..num_classes-1
    name: where they come from
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    name: str
    num_classes: int


def load_images(source: str | pathlib.Path, *, held_out: float = 0.2, seed: int = 0) -> Images:
    """Images by name, or from an .npz file.

    Args:
        source: "digits", the 1,797 handwritten 8x8 digits that come with scikit-learn (extra `images`); or an .npz file
            with x_train, y_train, x_test, y_test, or with x and y alone. Images are [N, H, W] or [N, H, W, C], uint8
            (0 to 255) or floats in [0, 1]; labels are whole numbers from 0 on, [N] or [N, 1].
        held_out: the share of each class kept for the test where the source is not split already; at least one.
        seed: of that split.

    Raises ImportError without scikit-learn, FileNotFoundError, and ValueError naming the file, the array and what is
    wrong with it: missing, of another shape or length, NaN, outside [0, 1], no labels of classes.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"load_images: held_out must lie in (0, 1), got {held_out}")
    name = str(source)
    arrays = _digits() if name == DIGITS else _read(pathlib.Path(source))
    pairs = SPLIT if arrays.keys() & {part for pair in SPLIT for part in pair} else WHOLE
    if missing := [part for pair in pairs for part in pair if part not in arrays]:
        there = ", ".join(sorted(arrays)) or "none"
        raise ValueError(
            f"{name}: there is no array {missing[0]!r}, there are: {there}. It needs x_train, y_train, x_test and "
            "y_test, or x and y"
        )
    parts = [_checked(name, pair, arrays) for pair in pairs]
    if len(parts) == 1:
        (x, y), test = parts[0], _drawn(name, parts[0][1], held_out, seed)
        parts = [(x[~test], y[~test]), (x[test], y[test])]
    (x_train, y_train), (x_test, y_test) = parts
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{name}: x_train has images {x_train.shape[1:]}, x_test {x_test.shape[1:]}")
    classes = int(y_train.max()) + 1
    if (unknown := np.flatnonzero(y_test >= classes)).size:
        raise ValueError(f"{name}: y_test[{unknown[0]}] is {y_test[unknown[0]]}, y_train ends at {classes - 1}")
    if classes < 2:
        raise ValueError(f"{name}: all images are of class 0; a classifier needs two classes")
    return Images(x_train, y_train, x_test, y_test, name, classes)


def batches(images: Images, *, batch_size: int, seed: int) -> Callable[[int], LabelledBatch]:
    """`step -> LabelledBatch` of training images, for `fit`: a pure function of the step, so that runs can go on.

    An epoch is a permutation drawn from (seed, epoch), cut into floor(N / batch_size) batches; the few images left over
    are others in each epoch. `index` [B] says which training images they are.
    Raises ValueError if there are fewer images than `batch_size`.
    """
    count = len(images.x_train)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batches: batch_size must be in 1..{count}, the images to train on, got {batch_size}")
    per_epoch = count // batch_size
    newest: dict[int, np.ndarray] = {}

    def batch(step: int) -> LabelledBatch:
        epoch, place = divmod(step, per_epoch)
        if epoch not in newest:
            newest.clear()
            newest[epoch] = np.random.default_rng((seed, epoch)).permutation(count)
        rows = newest[epoch][place * batch_size : (place + 1) * batch_size]
        return LabelledBatch(images.x_train[rows], images.y_train[rows], index=rows.astype(np.int32))  # type: ignore[arg-type]

    return batch


def _digits() -> dict[str, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "jaxalign[images]"') from error
    digits = load_digits()
    return {"x": (digits.images / DIGITS_GREYS).astype(np.float32), "y": digits.target}


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give {DIGITS!r} or an .npz file of images")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array without a name")
        with file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not an .npz file of arrays ({error})") from error


def _checked(name: str, pair: tuple[str, str], arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    x, y = _images(f"{name}: {pair[0]}", arrays[pair[0]]), _labels(f"{name}: {pair[1]}", arrays[pair[1]])
    if len(x) != len(y):
        raise ValueError(f"{name}: {pair[0]} has {len(x)} images, {pair[1]} has {len(y)} labels")
    return x, y


def _images(what: str, x: np.ndarray) -> np.ndarray:
    """[N, H, W, C] float32 in [0, 1]."""
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise ValueError(f"{what} is {x.shape}, needs images [N, H, W] or [N, H, W, C]")
    x = x if x.ndim == 4 else x[..., None]
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{what} is {x.dtype}, needs uint8 (0 to 255) or floats in [0, 1]")
    if (outside := ~((x >= 0) & (x <= 1))).any():  # NaN too
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"{what}{list(place)} is {x[place]}; floats must lie in [0, 1]: scale them, or give uint8")
    return x.astype(np.float32)


def _labels(what: str, y: np.ndarray) -> np.ndarray:
    """[N] int32, from 0 on."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "iuf":
        raise ValueError(f"{what} is {y.shape} {y.dtype}, needs labels [N], whole numbers from 0 on")
    wrong = np.flatnonzero(~((y >= 0) & (y < 2**31) & (np.floor(y) == y)))
    if wrong.size:
        raise ValueError(f"{what}[{wrong[0]}] is {y[wrong[0]]}; labels are whole numbers from 0 on")
    return y.astype(np.int32)


def _drawn(name: str, y: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [N], true for `share` of each class, rounded, but at least one and never all of those there are."""
    rng, drawn = np.random.default_rng(seed), np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        drawn[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    if not drawn.any():
        raise ValueError(f"{name}: of each class there is one image, so that none can be kept for the test")
    return drawn
