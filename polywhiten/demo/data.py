"""Pictures and labels that the demo trains on, checked and standardized; NumPy alone."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEYS = ("x_train", "y_train", "x_test", "y_test")
LAYOUT = f"a .npz file with {', '.join(KEYS[:-1])} and {KEYS[-1]} is needed, as Keras' data sets have them"


class DataError(ValueError):
    """What is wrong with the data, in one line that says what is needed."""


@dataclass(frozen=True)
class Data:
    """Training and test pictures.

    Attributes
    ----------
    name : str
        For titles.
    x_train, x_test : float32 array, shape (N, height, width, channels)
        Of mean 0 and deviation 1 in every channel of the training pictures.
    y_train, y_test : int64 array, shape (N,)
        Classes, counted from 0.
    classes : int
    """

    name: str
    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    classes: int


def load_digits() -> Data:
    """Scikit-learn's bundled digits (8 x 8, grey); every fifth one is a test picture."""
    from sklearn import datasets  # type: ignore[import-untyped]  # optional, and slow to import

    digits = datasets.load_digits()
    test = np.arange(len(digits.target)) % 5 == 4
    images, labels = digits.images, digits.target
    return prepare("scikit-learn's digits", images[~test], labels[~test], images[test], labels[test])


def load_npz(path: Path) -> Data:
    """Pictures in the layout of Keras' data sets, from a file; nothing in it is unpickled.

    Parameters
    ----------
    path : Path
        An .npz file with x_train and x_test, shape (N, height, width) or (N, height, width, 1 or 3), and y_train and
        y_test, integers of shape (N,) or (N, 1).

    Returns
    -------
    Data

    Raises
    ------
    DataError
        There is no such file, or something else is in it.
    """
    if not path.exists():
        raise DataError(f"{path} doesn't exist: {LAYOUT}")
    if not path.is_file():
        raise DataError(f"{path} is not a file: {LAYOUT}")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is not in the .npz format: {LAYOUT}")
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in KEYS if key not in file]
            if missing:
                found = ", ".join(file) or "nothing"
                raise DataError(f"{path} holds {found}, but no {' and no '.join(missing)}: {LAYOUT}")
            arrays = [_read(file, key) for key in KEYS]
    except DataError:
        raise
    except Exception as error:  # a damaged zip file raises nearly anything
        raise DataError(f"{path} can't be read ({error}): {LAYOUT}") from error
    return prepare(path.name, *arrays)


def prepare(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Data:
    """Check arrays in the layout of Keras' data sets and standardize them; DataError where they don't fit."""
    train, test = _pictures("x_train", x_train), _pictures("x_test", x_test)
    if test.shape[1:] != train.shape[1:]:
        raise DataError(f"x_test has pictures of {_size(test)}, x_train of {_size(train)}: they have to be the same")
    labels, test_labels = _labels("y_train", y_train, train), _labels("y_test", y_test, test)
    classes, classified = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"y_train has no label but {classes[0]}: at least 2 classes are needed")
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise DataError(f"y_test has label {unknown[0]}, which y_train lacks: test only classes that are trained")
    encoded = np.searchsorted(classes, test_labels).astype(np.int64)
    _standardize(train, test)
    return Data(name, train, classified.astype(np.int64), test, encoded, len(classes))


def _read(file: Any, key: str) -> NDArray[Any]:
    try:
        array = file[key]
    except ValueError as error:
        raise DataError(f"{key} can't be read ({error}): save plain arrays of numbers with numpy.savez") from error
    if not isinstance(array, np.ndarray):  # NumPy hands over what isn't in its format as bytes
        raise DataError(f"{key} is not an array: save plain arrays of numbers with numpy.savez")
    return array


def _pictures(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """A new float32 array (N, height, width, channels)."""
    if not (values.ndim == 3 or (values.ndim == 4 and values.shape[3] in (1, 3))) or 0 in values.shape:
        raise DataError(
            f"{name} has shape {values.shape}: (N, height, width) or (N, height, width, 1) is needed "
            "for grey pictures, (N, height, width, 3) for colour"
        )
    if values.dtype.kind not in "buif":
        raise DataError(f"{name} has dtype {values.dtype}: real numbers are needed")
    with np.errstate(over="ignore"):  # too large a value becomes infinite, and is refused as such
        pictures = values.astype(np.float32)
    if not np.isfinite(pictures).all():
        raise DataError(f"{name} has values that are not finite in float32: leave such pictures out")
    return pictures if pictures.ndim == 4 else pictures[..., None]


def _labels(name: str, values: NDArray[Any], pictures: NDArray[np.float32]) -> NDArray[Any]:
    if values.ndim == 2 and values.shape[1] == 1:  # as Keras has CIFAR-10's
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{name} has shape {values.shape}: (N,) or (N, 1) is needed, one label a picture")
    if values.dtype.kind not in "ui":
        raise DataError(f"{name} has dtype {values.dtype}: integer labels are needed")
    if len(values) != len(pictures):
        x = name.replace("y", "x")
        raise DataError(f"{name} has {len(values)} labels, {x} {len(pictures)} pictures: one label a picture is needed")
    return values


def _standardize(train: NDArray[np.float32], test: NDArray[np.float32]) -> None:
    """Subtract the training pictures' mean and divide by their deviation, channel by channel, in place."""
    mean = train.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    train -= mean
    test -= mean
    # without the array of squares, which would be as large as the data
    variance = np.einsum("nhwc,nhwc->c", train, train, dtype=np.float64) / train[..., 0].size
    deviation = np.where(variance > 0, np.sqrt(variance), 1).astype(np.float32)
    train /= deviation
    test /= deviation


def _size(pictures: NDArray[np.float32]) -> str:
    return " x ".join(map(str, pictures.shape[1:]))
