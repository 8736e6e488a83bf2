"""Read, check and standardize the pictures and labels that the demo trains on."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

KEYS = ("x_train", "y_train", "x_test", "y_test")
LAYOUT = f"a .npz file with {', '.join(KEYS[:-1])} and {KEYS[-1]} is needed, as Keras' data sets have them"

PLAIN = "save plain arrays of numbers with numpy.savez"


class DataError(ValueError):
    """The data don't fit; the message is one line that says what is needed."""


@dataclass(frozen=True)
class Data:
    """Training and test pictures.

    Attributes
    ----------
    name : str
        Name to show in titles.
    x_train, x_test : float32 array, shape (N, height, width, channels)
        Pictures, scaled such that every channel of the training pictures has mean 0 and deviation 1.
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
    """Return the digits that come with scikit-learn (8 x 8, grey); every fifth one is a test picture."""
    from sklearn import datasets

    digits = datasets.load_digits()
    test = np.arange(len(digits.target)) % 5 == 4
    images, labels = digits.images, digits.target
    return prepare("scikit-learn's digits", images[~test], labels[~test], images[test], labels[test])


def load_npz(path: Path) -> Data:
    """Read pictures in the layout of Keras' data sets from a file, without unpickling anything.

    x_train and x_test have shape (N, height, width) or (N, height, width, 1 or 3), y_train and y_test are integers of
    shape (N,) or (N, 1). Raise DataError if there is no such file, or it holds something else.
    """
    try:
        return prepare(_shown(path.name), *read_npz(path))
    except MemoryError as error:
        raise DataError(f"{path} needs more memory than there is ({error}): use fewer or smaller pictures") from error


def prepare(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Data:
    """Check and standardize arrays in the layout of Keras' data sets; raise DataError if they don't fit."""
    _check_layout(x_train, y_train, x_test, y_test)
    train, test = _pictures("x_train", x_train), _pictures("x_test", x_test)
    labels, test_labels = _labels("y_train", y_train), _labels("y_test", y_test)
    classes, classified = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"y_train has no label but {classes[0]}: at least 2 classes are needed")
    unknown = np.setdiff1d(test_labels, classes)
    if len(unknown):
        raise DataError(f"y_test has label {unknown[0]}, which y_train lacks: test only classes that are trained")
    encoded = np.searchsorted(classes, test_labels).astype(np.int64)
    _standardize(train, test)
    return Data(name, train, classified.astype(np.int64), test, encoded, len(classes))


def read_npz(path: Path) -> list[NDArray[Any]]:
    """Return the arrays of `KEYS` from a file as they are. Raise DataError, before unpacking, if they don't fit."""
    try:
        if not path.exists():
            raise DataError(f"{path} doesn't exist: {LAYOUT}")
        if not path.is_file():
            raise DataError(f"{path} is not a file: {LAYOUT}")
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is not in the .npz format: {LAYOUT}")
        with zipfile.ZipFile(path) as file:
            members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
            missing = [key for key in KEYS if key not in members]
            if missing:
                raise DataError(f"{path} holds {_listed(members)}, but no {' and no '.join(missing)}: {LAYOUT}")
            headers = [_header(file, members[key], key) for key in KEYS]
            _check_layout(*headers)
            _check_memory(path, headers)
            arrays = []
            for key in KEYS:
                with file.open(members[key]) as member:
                    arrays.append(npy.read_array(member, allow_pickle=False))
            return arrays
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a damaged zip file raises nearly anything
        raise DataError(f"{path} can't be read ({error}): {LAYOUT}") from error


def _header(file: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> NDArray[Any]:
    """Return an array of the shape and dtype that a member of the file has, without its values or their memory."""
    with file.open(member) as content:
        try:
            version = npy.read_magic(content)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(content)
        except ValueError as error:
            raise DataError(f"{key} is not an array: {PLAIN}") from error  # NumPy might advise to trust the file
        size = member.file_size - content.tell()
    if dtype.hasobject:
        raise DataError(f"{key} has dtype {dtype}, which is not read: {PLAIN}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != size:
        raise DataError(f"{key} is damaged: it has {size} bytes, and shape {shape} of {dtype} takes {claimed}")
    return np.broadcast_to(np.zeros((), dtype), shape)


def _check_layout(x_train: NDArray[Any], y_train: NDArray[Any], x_test: NDArray[Any], y_test: NDArray[Any]) -> None:
    """Raise DataError if shapes or dtypes don't fit."""
    for name, x in (("x_train", x_train), ("x_test", x_test)):
        if x.shape[3:] not in ((), (1,), (3,)) or x.ndim < 3 or min(x.shape) < 1:
            raise DataError(
                f"{name} has shape {x.shape}: (N, height, width) or (N, height, width, 1) is needed "
                "for grey pictures, (N, height, width, 3) for colour"
            )
        if x.dtype.kind not in "buif":
            raise DataError(f"{name} has dtype {x.dtype}: real numbers are needed")
    size, test_size = (" x ".join(map(str, (*x.shape[1:], 1)[:3])) for x in (x_train, x_test))
    if test_size != size:
        raise DataError(f"x_test has pictures of {test_size}, x_train of {size}: their sizes have to be the same")
    for name, y, x in (("y_train", y_train, x_train), ("y_test", y_test, x_test)):
        if y.ndim < 1 or y.shape[1:] not in ((), (1,)):  # (N, 1) in Keras' CIFAR-10
            raise DataError(f"{name} has shape {y.shape}: (N,) or (N, 1) is needed, one label for each picture")
        if y.dtype.kind not in "ui":
            raise DataError(f"{name} has dtype {y.dtype}: integer labels are needed")
        if len(y) != len(x):
            pictures = f"{name.replace('y', 'x')} {len(x)} pictures"
            raise DataError(f"{name} has {len(y)} labels, {pictures}: one label for each picture is needed")


def _check_memory(path: Path, arrays: list[NDArray[Any]]) -> None:
    """Raise DataError if the arrays, and their float32 copies, need more memory than this machine has.

    A small file can unpack to any size. Systems that overcommit memory, such as Linux, end a process that fills it.
    """
    needed = sum(array.size * (array.itemsize + 4) for array in arrays)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows and others don't say
        return
    if needed > memory:
        sizes = f"{path} takes {needed / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}"
        raise DataError(f"{sizes}: use fewer or smaller pictures")


def _pictures(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """Return a new float32 array (N, height, width, channels)."""
    with np.errstate(over="ignore"):  # too large a value becomes infinite, which is reported
        pictures = values.astype(np.float32)
    if not np.isfinite(pictures).all():
        raise DataError(f"{name} has values that are not finite in float32: leave such pictures out")
    return pictures if pictures.ndim == 4 else pictures[..., None]


def _labels(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """Return labels as int64: NumPy compares uint64 with int64 in float64, which rounds large labels."""
    most = np.iinfo(np.int64).max
    if values.max() > most:
        raise DataError(f"{name} has label {values.max()}: labels of at most {most} are needed")
    return values.reshape(-1).astype(np.int64)


def _standardize(train: NDArray[np.float32], test: NDArray[np.float32]) -> None:
    """Subtract the training pictures' mean and divide by their deviation, for each channel, in place."""
    mean = train.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite results are reported below
        train -= mean
        test -= mean
        # without an array of squares, which would be as large as the data
        variance = np.einsum("nhwc,nhwc->c", train, train, dtype=np.float64) / train[..., 0].size
        deviation = np.sqrt(variance).astype(np.float32)
        deviation[deviation == 0] = 1
        train /= deviation
        test /= deviation
    for name, pictures in (("x_train", train), ("x_test", test)):
        if not np.isfinite(pictures).all():
            raise DataError(f"{name} has values too far from most of x_train's for float32: leave such pictures out")


def _shown(name: str) -> str:
    """Return a file's name with each character replaced that can't be printed or isn't in the locale's encoding."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _listed(names: Iterable[str], most: int = 8) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    first, more = list(names)[:most], list(names)[most:]
    return (", ".join(first) or "nothing") + (f" and {len(more)} more" if more else "")
