"""Find files of embeddings, and read them as one long table of rows, in batches or in pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polywhiten.embeddings.files.errors import FileError, named
from polywhiten.embeddings.files.npy import NpyFile
from polywhiten.embeddings.files.parquet import ParquetFile

SUFFIXES = ".npy", ".npz", ".parquet"
NEEDED = "name .npy, .npz or .parquet files, a folder of them, or a pattern such as 'part-*.npy'"


class RowFile(Protocol):
    """An open file with a table of numbers; see `NpyFile` for its attributes and methods."""

    path: Path
    rows: int
    dimension: int
    dtype: np.dtype[Any]

    def read(self, first: int, last: int) -> NDArray[Any]: ...

    def batches(self, size: int, first: int, last: int) -> Iterator[NDArray[Any]]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class FileRows:
    """Where the rows of a file are, and what they are; only the names and the shape are kept, so it can be pickled.

    Attributes
    ----------
    path : Path
    key : str or None
        The array in a .npz file.
    column : str or None
        The column of a Parquet file, None for other files.
    rows, dimension : int
    dtype : numpy.dtype
    """

    path: Path
    key: str | None
    column: str | None
    rows: int
    dimension: int
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, path: Path, key: str | None = None, column: str | None = None) -> FileRows:
        """Look into a file; raise FileError if it has no table of numbers."""
        with closing(_open(path, key, column)) as file:
            column = file.column if isinstance(file, ParquetFile) else None
            return cls(path, key, column, file.rows, file.dimension, file.dtype)

    def open(self) -> RowFile:
        """Open the file again; raise FileError if its rows have become others."""
        file = _open(self.path, self.key, self.column)
        if (file.rows, file.dimension, file.dtype) != (self.rows, self.dimension, self.dtype):
            file.close()
            raise FileError(f"{self.path} has been changed since it was first read: start again")
        return file


@dataclass(frozen=True)
class Piece:
    """Some successive rows of one file, which any process that sees the file can read.

    Attributes
    ----------
    file : FileRows
    first, last : int
        The first row, counted in the file from 0, and the one after the last.
    """

    file: FileRows
    first: int
    last: int

    def read(self) -> NDArray[Any]:
        """Return the rows as a new array (last - first, dimension)."""
        with closing(self.file.open()) as file:
            return file.read(self.first, self.last)


@dataclass(frozen=True)
class Source:
    """The rows of files, one file after the other.

    Attributes
    ----------
    files : tuple of FileRows

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from polywhiten.embeddings.files import open_source, pieces
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in "ab":
    ...     np.save(folder / f"{name}.npy", np.zeros((5, 3), "float32"))
    >>> source = open_source([folder])
    >>> source.rows, source.dimension, source.dtype
    (10, 3, dtype('float32'))
    >>> [len(batch) for batch in source.batches(4)]
    [4, 1, 4, 1]
    >>> [(piece.file.path.name, piece.first, piece.last) for piece in pieces(source, 3)]
    [('a.npy', 0, 3), ('a.npy', 3, 5), ('b.npy', 0, 3), ('b.npy', 3, 5)]
    """

    files: tuple[FileRows, ...]

    @property
    def rows(self) -> int:
        """Number of rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def dimension(self) -> int:
        """Number of numbers in a row."""
        return self._filled()[0].dimension

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype that has the numbers of all files; each batch has the dtype of its file."""
        return np.result_type(*(file.dtype for file in self._filled()))

    def batches(self, size: int, first: int = 0) -> Generator[NDArray[Any]]:
        """Yield the rows from the row `first` of all on, and read the next batch in another thread in the meantime.

        A batch has at most `size` rows, all of one file. It is valid until the next one is taken: others may be read
        into the same memory.
        """
        with closing(self._batches(size, first)) as batches, ThreadPoolExecutor(1) as executor:
            following = executor.submit(next, batches, None)
            while (batch := following.result()) is not None:
                following = executor.submit(next, batches, None)
                yield batch

    def _batches(self, size: int, first: int) -> Generator[NDArray[Any]]:
        """Yield batches, each of which is valid until the one after the next is read."""
        for file_rows, start in zip(self.files, self._starts(), strict=True):
            if first < start + file_rows.rows:
                with closing(file_rows.open()) as file:
                    yield from file.batches(size, max(0, first - start), file.rows)

    def nonfinite_error(self, batch: NDArray[Any], first: int) -> FileError | None:
        """Return an error that names the first row of a batch with NaN or infinity, or None if there is none.

        The batch starts at the row `first` of all.
        """
        wrong = np.flatnonzero(~np.all(np.isfinite(batch), axis=1))
        if not len(wrong):
            return None
        row = first + int(wrong[0])
        file, start = max(
            (pair for pair in zip(self.files, self._starts(), strict=True) if pair[1] <= row and pair[0].rows),
            key=lambda pair: pair[1],
        )
        return FileError(
            f"{file.path}, row {row - start} has NaN or infinity: correct it, or leave out such rows (--skip-nonfinite)"
        )

    def _filled(self) -> tuple[FileRows, ...]:
        """Return the files that have rows, or all if none has any; the dimension of an empty one may be unknown."""
        return tuple(file for file in self.files if file.rows) or self.files

    def _starts(self) -> list[int]:
        """Return the number of rows before each file."""
        return list(accumulate((file.rows for file in self.files[:-1]), initial=0))


def open_source(names: Sequence[str | Path], *, key: str | None = None, column: str | None = None) -> Source:
    """Look into files, folders and patterns of files, and return them as one table of rows.

    Parameters
    ----------
    names : sequence of str or Path
        Each is a file, a folder, of which all .npy, .npz and .parquet files are taken, or a pattern, as `glob.glob` has
        it. Names keep their order; the files of a folder or a pattern are sorted by their paths.
    key : str, optional
        Name of the array in .npz files; by default the only 2-D one.
    column : str, optional
        Name of the column in Parquet files; by default the only one of lists of numbers.

    Returns
    -------
    Source

    Raises
    ------
    FileError
        There are no such files or rows, a file can't be read, or the dimensions of files differ.
    """
    paths = [path for name in names for path in _find(str(name))]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise FileError(f"{twice[0]} is named twice: name every file once")
    for chosen, suffix in ((key, ".npz"), (column, ".parquet")):
        if chosen is not None and not any(path.suffix.lower() == suffix for path in paths):
            raise FileError(f"no {suffix} file is named, in which {chosen} could be: leave it out")
    files = tuple(FileRows.of(path, key, column) for path in paths)
    filled = [file for file in files if file.rows]
    if not filled:
        raise FileError(f"{paths[0]} has no rows: {NEEDED}" if paths else f"no file is named: {NEEDED}")
    one = filled[0]
    for file in filled:
        if file.dimension != one.dimension:
            raise FileError(
                f"{file.path} has rows of {file.dimension} numbers, and {one.path} of {one.dimension}: name files of "
                "one dimension"
            )
        if (file.dtype.kind == "f") != (one.dtype.kind == "f"):
            raise FileError(
                f"{file.path} has dtype {file.dtype}, and {one.path} {one.dtype}: name files of integers, or of "
                "floating point"
            )
    return Source(files)


def pieces(source: Source, rows: int) -> list[Piece]:
    """Cut the rows of all files, in their order, into pieces of at most `rows`, each of one file."""
    return [
        Piece(file, first, min(first + rows, file.rows)) for file in source.files for first in range(0, file.rows, rows)
    ]


def _find(name: str) -> list[Path]:
    """Return the files that a name stands for."""
    path = Path(name)
    with named(path, "read"):
        if path.is_dir():
            found = [entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES and entry.name[0] != "."]
            if not found:
                raise FileError(f"the folder {path} has no .npy, .npz or .parquet files: {NEEDED}")
            return sorted(found)
        found = [path] if path.exists() else sorted(Path(match) for match in glob(name, recursive=True))
    if not found:
        is_pattern = any(char in name for char in "*?[")
        raise FileError(f"no file matches {name}: {NEEDED}" if is_pattern else f"{path} doesn't exist: {NEEDED}")
    for each in found:
        if not each.is_file() or each.suffix.lower() not in SUFFIXES:
            raise FileError(f"{each} is not a .npy, .npz or .parquet file: {NEEDED}")
    return found


def _open(path: Path, key: str | None, column: str | None) -> RowFile:
    return ParquetFile(path, column) if path.suffix.lower() == ".parquet" else NpyFile(path, key)
