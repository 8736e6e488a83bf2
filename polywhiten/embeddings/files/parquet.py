"""Read rows from a column of lists in a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polywhiten.embeddings.files.errors import FileError, named

READ_AT_ONCE = 1 << 20  # bytes; without it, pyarrow reads all of a row group's column


class ParquetFile:
    """A column of lists of numbers, one list a row.

    A row that is null, or a number in it, is read as NaN if the numbers are floating point, and an error otherwise.

    Parameters
    ----------
    path : Path
    column : str, optional
        By default the only column of lists of numbers.

    Attributes
    ----------
    path : Path
    rows, dimension : int
    dtype : numpy.dtype

    Raises
    ------
    FileError
        The file, or the column, doesn't exist, or holds something else.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        self.path, parquet = path, import_parquet(path)
        with _readable(path):
            self._file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_AT_ONCE)
        try:
            self.column, kind = _find_column(path, self._file.schema_arrow, column)
            self.rows = self._file.metadata.num_rows
            self.dtype = np.dtype(kind.value_type.to_pandas_dtype())
            self.dimension = getattr(kind, "list_size", None) or self._first_length()
            if not self.dimension:
                raise FileError(f"{path}, column {self.column} has lists without numbers: at least 1 is needed")
        except BaseException:
            self.close()
            raise

    def read(self, first: int, last: int) -> NDArray[Any]:
        """Return the rows from `first` to before `last` as a new array."""
        rows, filled = np.empty((last - first, self.dimension), self.dtype), 0
        for batch in self.batches(1 << 14, first, last):
            rows[filled : filled + len(batch)] = batch
            filled += len(batch)
        return rows

    def batches(self, size: int, first: int, last: int) -> Iterator[NDArray[Any]]:
        """Yield the rows from `first` to before `last` in batches of at most `size`, which are read-only."""
        group_start = 0
        for group in range(self._file.num_row_groups):
            group_end = group_start + self._file.metadata.row_group(group).num_rows
            if group_start < last and first < group_end:
                yield from self._group_batches(group, group_start, size, first, last)
            group_start = group_end

    def close(self) -> None:
        self._file.close()

    def _group_batches(self, group: int, start: int, size: int, first: int, last: int) -> Iterator[NDArray[Any]]:
        """Yield the rows of one row group that starts at the row `start` of the file."""
        with _readable(self.path):
            for batch in self._file.iter_batches(size, row_groups=[group], columns=[self.column], use_threads=False):
                end = start + batch.num_rows
                if end > first:
                    begin = max(first, start)
                    yield self._numbers(batch.column(0)[begin - start : last - start], begin)
                start = end
                if start >= last:
                    break

    def _numbers(self, lists: Any, first: int) -> NDArray[Any]:
        """Return lists, the first of which is in a given row of the file, as an array."""
        lengths = np.asarray(lists.value_lengths().fill_null(self.dimension))
        wrong = np.flatnonzero(lengths != self.dimension)
        if len(wrong):
            raise FileError(
                f"{self.path}, row {first + wrong[0]} has {lengths[wrong[0]]} numbers: all rows need the "
                f"{self.dimension} of the first"
            )
        values = lists.flatten()  # without those of rows that are null
        if (lists.null_count or values.null_count) and self.dtype.kind != "f":
            raise FileError(f"{self.path} has nulls from row {first} on: write rows of {self.dtype} without nulls")
        numbers = np.asarray(values.to_numpy(zero_copy_only=False), self.dtype).reshape(-1, self.dimension)
        if not lists.null_count:
            return numbers
        rows = np.full((len(lists), self.dimension), np.nan, self.dtype)
        rows[np.asarray(lists.is_valid())] = numbers
        return rows

    def _first_length(self) -> int:
        """Return the length of the first list that isn't null, or 1 if there is none."""
        with _readable(self.path):
            for batch in self._file.iter_batches(256, columns=[self.column], use_threads=False):
                lengths = batch.column(0).value_lengths().drop_null()
                if len(lengths):
                    return int(lengths[0].as_py())
        return 1


def import_parquet(path: Path) -> ModuleType:
    """Import pyarrow's module; raise FileError if a file needs it and it isn't installed."""
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise FileError(f'{path} needs pyarrow: pip install "polywhiten[embeddings]"') from error


def _find_column(path: Path, schema: Any, column: str | None) -> tuple[str, Any]:
    """Return the name of a column of lists of numbers, and its type."""
    from pyarrow import types

    kinds = {field.name: field.type for field in schema}
    lists = [
        name
        for name, kind in kinds.items()
        if (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
        and (types.is_integer(kind.value_type) or types.is_floating(kind.value_type))
    ]
    if column is None and len(lists) == 1:
        return lists[0], kinds[lists[0]]
    if column in lists:
        return str(column), kinds[column]
    if column in kinds:
        raise FileError(f"{path}, column {column} has type {kinds[column]}: a column of lists of numbers is needed")
    held = ", ".join(f"{name} ({kind})" for name, kind in list(kinds.items())[:8]) or "no columns"
    if column is not None:
        raise FileError(f"{path} has no column {column}, but {held}")
    if not lists:
        raise FileError(f"{path} has {held}: a column of lists of numbers is needed, one list a row")
    raise FileError(f"{path} has several columns of lists of numbers, {', '.join(lists)}: choose one (--column NAME)")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise FileError for what pyarrow raises inside this `with` statement about a file."""
    from pyarrow import ArrowException

    try:
        with named(path, "read"):
            yield
    except ArrowException as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"{path} is damaged or not in the Parquet format ({first_line}): write it again") from error
