"""Pictures and labels that the demo trains on, checked and standardized; NumPy alone."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

KEYS = ("x_train", "y_train", "x_test", "y_test")
LAYOUT = f"a .npz file with {', '.join(KEYS[:-1])} and {KEYS[-1]} is needed, as Keras' data sets have them"

PLAIN = "save plain arrays of numbers with numpy.savez"


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
    try:
        return prepare(_shown(path.name), *_unpack(path))
    except MemoryError as error:
        raise DataError(f"{path} needs more memory than there is ({error}): use fewer or smaller pictures") from error


def prepare(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Data:
    """Check arrays in the layout of Keras' data sets and standardize them; DataError where they don't fit."""
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


class _Layout(Protocol):
    """What an array has, and its header in a file, too."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


class _Header(NamedTuple):
    """Of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def _unpack(path: Path) -> list[NDArray[Any]]:
    """The four arrays of a file, of which nothing is unpacked unless they fit."""
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
                raise DataError(f"{path} holds {_some(members)}, but no {' and no '.join(missing)}: {LAYOUT}")
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


def _header(file: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> _Header:
    with file.open(member) as content:
        try:
            version = npy.read_magic(content)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(content)
        except ValueError as error:
            raise DataError(f"{key} is not an array: {PLAIN}") from error  # NumPy might advise to trust the file
        held = member.file_size - content.tell()
    if dtype.hasobject:
        raise DataError(f"{key} has dtype {dtype}, which is not read: {PLAIN}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != held:
        raise DataError(f"{key} is damaged: {held} bytes are there for shape {shape} of {dtype}, which takes {claimed}")
    return _Header(shape, dtype)


def _check_layout(x_train: _Layout, y_train: _Layout, x_test: _Layout, y_test: _Layout) -> None:
    """DataError where shapes or dtypes don't fit."""
    for name, x in (("x_train", x_train), ("x_test", x_test)):
        if not (len(x.shape) == 3 or (len(x.shape) == 4 and x.shape[3] in (1, 3))) or min(x.shape) < 1:
            raise DataError(
                f"{name} has shape {x.shape}: (N, height, width) or (N, height, width, 1) is needed "
                "for grey pictures, (N, height, width, 3) for colour"
            )
        if x.dtype.kind not in "buif":
            raise DataError(f"{name} has dtype {x.dtype}: real numbers are needed")
    size, test_size = (" x ".join(map(str, (*x.shape[1:], 1)[:3])) for x in (x_train, x_test))
    if test_size != size:
        raise DataError(f"x_test has pictures of {test_size}, x_train of {size}: they have to be the same")
    for name, y, x in (("y_train", y_train, x_train), ("y_test", y_test, x_test)):
        if not (len(y.shape) == 1 or (len(y.shape) == 2 and y.shape[1] == 1)):  # the latter as Keras has CIFAR-10's
            raise DataError(f"{name} has shape {y.shape}: (N,) or (N, 1) is needed, one label a picture")
        if y.dtype.kind not in "ui":
            raise DataError(f"{name} has dtype {y.dtype}: integer labels are needed")
        labels, pictures = y.shape[0], x.shape[0]
        if labels != pictures:
            raise DataError(
                f"{name} has {labels} labels, {name.replace('y', 'x')} {pictures} pictures: "
                "one label a picture is needed"
            )


def _check_memory(path: Path, headers: list[_Header]) -> None:
    """DataError where the arrays, and the pictures in float32 beside them, exceed this machine's memory.

    A small file can unpack to any size, and where memory is promised before it is there, as on Linux, the system
    ends the process.
    """
    needed = sum(math.prod(shape) * (dtype.itemsize + 4) for shape, dtype in headers)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows and others don't tell
        return
    if needed > memory:
        raise DataError(
            f"{path} takes {needed / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f}: "
            "use fewer or smaller pictures"
        )


def _pictures(name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    """A new float32 array (N, height, width, channels)."""
    with np.errstate(over="ignore"):  # too large a value becomes infinite, and is refused as such
        pictures = values.astype(np.float32)
    if not np.isfinite(pictures).all():
        raise DataError(f"{name} has values that are not finite in float32: leave such pictures out")
    return pictures if pictures.ndim == 4 else pictures[..., None]


def _labels(name: str, values: NDArray[Any]) -> NDArray[np.int64]:
    """Of one dtype: NumPy compares uint64 with int64 in float64, where neighbours are the same."""
    most = np.iinfo(np.int64).max
    if values.max() > most:
        raise DataError(f"{name} has label {values.max()}: labels of at most {most} are needed")
    return values.reshape(-1).astype(np.int64)


def _standardize(train: NDArray[np.float32], test: NDArray[np.float32]) -> None:
    """Subtract the training pictures' mean and divide by their deviation, channel by channel, in place."""
    mean = train.mean(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what isn't finite then is refused
        train -= mean
        test -= mean
        # without the array of squares, which would be as large as the data
        variance = np.einsum("nhwc,nhwc->c", train, train, dtype=np.float64) / train[..., 0].size
        deviation = np.sqrt(variance).astype(np.float32)
        deviation[deviation == 0] = 1
        train /= deviation
        test /= deviation
    for name, pictures in (("x_train", train), ("x_test", test)):
        if not np.isfinite(pictures).all():
            raise DataError(f"{name} has values too far from most of x_train's for float32: leave such pictures out")


def _shown(name: str) -> str:
    """A file's name in characters that can be printed, also where the locale's encoding lacks some of them."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _some(names: Iterable[str], most: int = 8) -> str:
    """The first of them, separated by commas."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "nothing") + more
