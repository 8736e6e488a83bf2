"""Read rows from `.npy` files and from the arrays in `.npz` files, with two buffers for all batches."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from polywhiten.embeddings.files.errors import FileError, named

DECOMPRESSED_AT_ONCE = 1 << 20  # bytes, which are copied once more
LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip file: the lengths of its name and of its extra field

# NumPy lets some errors of the functions pass by which it parses a header.
HEADER_ERRORS = ValueError, TypeError, SyntaxError, RecursionError, MemoryError, TokenError

# Both kinds of streams can seek: that of a compressed array decompresses what it passes over, and starts again to go
# back.
Stream = io.RawIOBase | zipfile.ZipExtFile


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    offset: int  # of the first value in the stream


class NpyFile:
    """A 2-D array in a `.npy` or `.npz` file.

    Parameters
    ----------
    path : Path
        A file whose suffix names its format.
    key : str, optional
        Name of the array in a `.npz` file; by default the only 2-D array.

    Attributes
    ----------
    path : Path
    rows, dimension : int
        The shape of the array.
    dtype : numpy.dtype
        Dtype of the rows that are read: that of the array, in native byte order.

    Raises
    ------
    FileError
        The file holds something else, or less than its header says.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        with named(path, "read"):
            self._file = path.open("rb", buffering=0)
        try:
            with _readable(path):
                self._stream, self._header = self._find_array(key)
            _check(path, self._header)
        except BaseException:
            self.close()
            raise
        self.rows, self.dimension = self._header.shape
        self.dtype = self._header.dtype.newbyteorder("=")

    def read(self, first: int, last: int) -> NDArray[Any]:
        """Return the rows from `first` to before `last` as a new array."""
        rows = np.empty((last - first, self.dimension), self._header.dtype)
        return self._fill(rows, first).astype(self.dtype, copy=False)

    def batches(self, size: int, first: int, last: int) -> Iterator[NDArray[Any]]:
        """Yield the rows from `first` to before `last` by `size`; each batch overwrites the one before the last."""
        shape = min(size, last - first), self.dimension
        buffers = cycle([np.empty(shape, self._header.dtype), np.empty(shape, self._header.dtype)])
        for begin, buffer in zip(range(first, last, size), buffers, strict=False):
            yield self._fill(buffer[: last - begin], begin).astype(self.dtype, copy=False)

    def close(self) -> None:
        self._file.close()

    def _find_array(self, key: str | None) -> tuple[Stream, _Header]:
        """Return a stream that holds the array, and the array's header."""
        if self.path.suffix.lower() != ".npz":
            end = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            return self._file, _read_header(self.path, self._file, end)
        archive = zipfile.ZipFile(self._file)
        member = _find_member(self.path, archive, key)
        if member.compress_type != zipfile.ZIP_STORED:
            stream = cast(zipfile.ZipExtFile, archive.open(member))
            return stream, _read_header(self.path, stream, member.file_size)
        self._file.seek(member.header_offset)
        start = member.header_offset + 30 + sum(LOCAL_HEADER.unpack(self._file.read(30)))
        self._file.seek(start)
        return self._file, _read_header(self.path, self._file, start + member.file_size)

    def _fill(self, rows: NDArray[Any], first: int) -> NDArray[Any]:
        """Read the rows from `first` on into an array, and return it."""
        with _readable(self.path):
            if not self._header.fortran_order:
                self._read_values(rows.reshape(-1), first * self.dimension)
                return rows
            column = np.empty(len(rows), rows.dtype)
            for index in range(self.dimension):
                self._read_values(column, index * self.rows + first)
                rows[:, index] = column
        return rows

    def _read_values(self, values: NDArray[Any], index: int) -> None:
        """Read the values from the given index in the array on."""
        self._stream.seek(self._header.offset + index * values.itemsize)
        remaining = values.view(np.uint8).data
        at_once = DECOMPRESSED_AT_ONCE if isinstance(self._stream, zipfile.ZipExtFile) else len(remaining)
        while remaining:
            count = self._stream.readinto(remaining[:at_once])
            if not count:
                raise FileError(f"{self.path} has become shorter since it was opened: write or copy it again")
            remaining = remaining[count:]


def _read_header(path: Path, stream: Stream, end: int) -> _Header:
    """Return the header of an array that ends at a position of the stream, and starts where the stream is."""
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape={shape}")
    except HEADER_ERRORS as error:  # NumPy's message might advise to trust the file
        raise FileError(f"{path} is not in the .npy format: write it with numpy.save or numpy.savez") from error
    offset, claimed = stream.tell(), math.prod(shape) * dtype.itemsize
    if end - offset != claimed and not dtype.hasobject:
        state = "is truncated" if end - offset < claimed else "has more than its array"
        raise FileError(
            f"{path} {state}: {shape} values of {dtype} take {claimed:,} bytes, but there are {end - offset:,}: "
            "write or copy it again"
        )
    return _Header(shape, fortran_order, dtype, offset)


def _check(path: Path, header: _Header) -> None:
    """Raise FileError if an array is not a table of real numbers."""
    if header.dtype.kind not in "iuf" or header.dtype.itemsize > 8:
        raise FileError(
            f"{path} has dtype {header.dtype}: save rows of equal length as integers, float16, float32 or float64"
        )
    if len(header.shape) == 2 and header.shape[1]:
        return
    needed = "(rows, dimension)"
    if len(header.shape) == 1:
        needed += f", and (1, {header.shape[0]}) for a single row"
    raise FileError(f"{path} has shape {header.shape}: reshape it to {needed}")


def _find_member(path: Path, archive: zipfile.ZipFile, key: str | None) -> zipfile.ZipInfo:
    """Return the member of a .npz file that has a name, or is the only 2-D array if no name is given."""
    members = {
        member.filename.removesuffix(".npy"): member
        for member in archive.infolist()
        if member.filename.endswith(".npy")
    }
    if key is not None and key in members:
        return members[key]
    shapes = {}
    for name, member in members.items():
        with archive.open(member) as content:
            shapes[name] = _read_header(path, cast(zipfile.ZipExtFile, content), member.file_size).shape
    tables = [name for name, shape in shapes.items() if len(shape) == 2]
    if key is None and len(tables) == 1:
        return members[tables[0]]
    listed = [f"{name} {shape}" for name, shape in list(shapes.items())[:8]]
    listed += [f"{len(shapes) - 8} more"] if len(shapes) > 8 else []
    held = ", ".join(listed) or "no arrays"
    if key is not None:
        raise FileError(f"{path} has no array {key}, but {held}")
    if not tables:
        raise FileError(f"{path} has {held}: an array (rows, dimension) is needed")
    raise FileError(f"{path} has several 2-D arrays among {held}: choose one (--key NAME)")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise FileError for what reading a damaged or unreadable file raises inside this `with` statement."""
    try:
        with named(path, "read"):
            yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error) as error:
        raise FileError(f"{path} is damaged or not in the .npz format ({error}): write or copy it again") from error
