"""Write rows to `.npy` and Parquet files, which get their names when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from polywhiten.embeddings.files.errors import FileError, named
from polywhiten.embeddings.files.parquet import import_parquet
from polywhiten.embeddings.replacement import replacing

SUFFIXES = ".npy", ".parquet"

Write = Callable[[NDArray[Any]], Any]


@contextmanager
def writing_rows(path: Path, rows: int, dimension: int, dtype: np.dtype[Any], *, column: str) -> Iterator[Write]:
    """Yield a function that appends rows to a new file, which replaces `path` when this `with` statement ends.

    Parameters
    ----------
    path : Path
        Ends in .npy or .parquet.
    rows, dimension : int
        The shape of all that will be written.
    dtype : numpy.dtype
        Rows are converted to it.
    column : str
        Name of the column in a Parquet file, whose lists have a fixed size.

    Raises
    ------
    FileError
        There is not enough space, or the file can't be written. Then, and if anything else is raised inside the `with`
        statement, the new file is removed, and an earlier one stays.
    """
    check_space(path.parent, rows * dimension * dtype.itemsize)
    with _replaced(path) as part:
        if path.suffix.lower() == ".npy":
            writer = _npy_writer(part, rows, dimension, dtype)
        else:
            writer = _parquet_writer(import_parquet(path), part, dimension, dtype, column)
        with writer as write:
            yield write


def check_space(folder: Path, needed: int) -> None:
    """Raise FileError if a folder doesn't exist, or has less than the needed bytes free."""
    with named(folder, "written to"):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise FileError(
            f"{folder} has {free:,} bytes free, and the output takes {needed:,}: free some or name another folder"
        )


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Like `replacing`, but errors name the final file, and the file is on the disk before it is renamed.

    After a loss of power, the name would otherwise refer to an empty file.
    """
    with named(path, "written"), replacing(path) as part:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def _npy_writer(part: Path, rows: int, dimension: int, dtype: np.dtype[Any]) -> Iterator[Write]:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows, dimension)}
    with part.open("wb") as file:
        npy.write_array_header_1_0(file, header)

        def write(batch: NDArray[Any]) -> None:
            file.write(np.ascontiguousarray(batch, dtype).data)

        yield write


@contextmanager
def _parquet_writer(
    parquet: ModuleType, part: Path, dimension: int, dtype: np.dtype[Any], column: str
) -> Iterator[Write]:
    """Yield a function that writes a row group, plain, because compression makes embeddings hardly smaller."""
    import pyarrow as pa

    kind = pa.list_(pa.from_numpy_dtype(dtype), dimension)
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with closing(parquet.ParquetWriter(part, pa.schema([(column, kind)]), **options)) as writer:

        def write(batch: NDArray[Any]) -> None:
            values = pa.array(np.ascontiguousarray(batch, dtype).reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(values, type=kind)
            writer.write_batch(pa.record_batch([lists], [column]))

        yield write
