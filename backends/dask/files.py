"""Whiten files of embeddings on Dask's workers, which read the rows, and write the outputs, themselves."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import numpy as np
import numpy.typing as npt
from dask.delayed import delayed

from polywhiten.dask.reduction import Report, total
from polywhiten.dispatch import backend_of
from polywhiten.embeddings.files import FileError, Piece, Source
from polywhiten.embeddings.files.writers import writing_rows
from polywhiten.embeddings.recipe import Recipe
from polywhiten.moments import Moments

if TYPE_CHECKING:  # the estimator imports scikit-learn
    from polywhiten.embeddings.whitening import Whitening


BATCH_BYTES = 2**26  # as many as moments are computed of at once


def fit_files(
    whitening: Whitening, pieces: Sequence[Piece], *, batch_bytes: int = BATCH_BYTES, report: Report | None = None
) -> Whitening:
    """Fit an estimator to files, on Dask's current scheduler.

    Every task reads one piece and returns its moments, and a tree of tasks adds them. On a cluster of `distributed`,
    most additions run where their summands are, and the pieces of a worker that is lost are read again by the others.

    Parameters
    ----------
    whitening : polywhiten.Whitening
        What it was fitted to before is forgotten.
    pieces : sequence of Piece
        At least one, see `polywhiten.embeddings.files.pieces`. All workers have to see the files under the same names.
        Pieces of a GiB keep workers busy for seconds, and the scheduler idle.
    batch_bytes : int
        A thread of a worker reads a piece in batches of so many bytes.
    report : callable, optional
        Called once with the index of every piece, when its moments have been taken.

    Returns
    -------
    Whitening
        The estimator itself.

    Raises
    ------
    FileError
        A worker can't read a file, or the file was changed.
    ValueError
        A parameter of the estimator doesn't fit, or a row has NaN or infinity.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> from polywhiten.dask import fit_files
    >>> from polywhiten.embeddings.files import open_source, pieces
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("a.npy", "b.npy"):
    ...     np.save(folder / name, np.random.default_rng(0).normal(size=(100, 8)))
    >>> fit_files(pw.Whitening(), pieces(open_source([folder]), 50)).n_samples_seen_
    200
    """
    recipe = Recipe.of(whitening.get_params(deep=False))
    task = delayed(_piece_moments, pure=False, traverse=False)
    whitening.moments_ = total([task(_anywhere(piece), recipe, batch_bytes) for piece in pieces], report)
    return whitening


def transform_files(
    whitening: Whitening,
    pieces: Sequence[Piece],
    folder: Path | str,
    *,
    dtype: Any = None,
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> list[Path]:
    """Whiten files, on Dask's current scheduler, into one file for each piece.

    The worker that reads a piece writes its outputs. A file gets its name when it is complete, so a piece can be
    computed again if a worker is lost.

    Parameters
    ----------
    whitening : polywhiten.Whitening
        A fitted estimator.
    pieces : sequence of Piece
        At least one, see `polywhiten.embeddings.files.pieces`.
    folder : Path or str
        An existing folder that all workers see under the same name, for the outputs part-0.npy, part-1.npy and so on,
        or part-0.parquet for pieces of Parquet files. Files of these names are replaced. Numbers have as many digits as
        the largest, so the order of the names is that of the rows.
    dtype : dtype, optional
        That of the outputs; by default the rows', or float32 or float64 if these are integers.
    batch_bytes : int
        A thread of a worker reads a piece in batches of so many bytes.
    report : callable, optional
        Called once with the index of every piece, when its outputs have been written.

    Returns
    -------
    list of Path
        The outputs, in the order of the pieces.

    Raises
    ------
    FileError
        A worker can't read a file, or can't write into the folder.
    ValueError
        A row has NaN or infinity, or another dimension than the estimator.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> import polywhiten as pw
    >>> from polywhiten.dask import transform_files
    >>> from polywhiten.embeddings.files import open_source, pieces
    >>> folder = Path(tempfile.mkdtemp())
    >>> np.save(folder / "x.npy", x := np.random.default_rng(0).normal(size=(100, 8)))
    >>> outputs = transform_files(pw.Whitening().fit(x), pieces(open_source([folder]), 40), folder)
    >>> [path.name for path in outputs], np.load(outputs[-1]).shape
    (['part-0.npy', 'part-1.npy', 'part-2.npy'], (20, 8))
    """
    digits = len(str(len(pieces) - 1))
    folder = Path(folder).absolute()
    names = (f"part-{index:0{digits}}{_suffix(piece)}" for index, piece in enumerate(pieces))
    outputs = [folder / name for name in names]
    _ = whitening.matrix_  # which is computed here then, once for all workers
    fitted = delayed(whitening, pure=False, traverse=False)  # a task, which a worker fetches once for all pieces
    task = delayed(_write_outputs, pure=False, traverse=False)
    each = zip(pieces, outputs, strict=True)
    # Dask warns of 10 MB in a graph because they are often data; the estimator of 1024 dimensions has more
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "2 GiB"}):
        total([task(_anywhere(piece), output, fitted, dtype, batch_bytes) for piece, output in each], report)
    return outputs


def _suffix(piece: Piece) -> str:
    """Return that of the outputs, which are Parquet files for Parquet files."""
    return ".parquet" if piece.file.path.suffix.lower() == ".parquet" else ".npy"


def _anywhere(piece: Piece) -> Piece:
    """Return a piece that can be read in any working directory."""
    return replace(piece, file=replace(piece.file, path=piece.file.path.absolute()))


def _piece_moments(piece: Piece, recipe: Recipe, batch_bytes: int) -> Moments:
    moments = Moments.empty(piece.file.dimension, fourth=recipe.needs_fourth_moment)
    with _worker_named():
        for rows, first in _batches(piece, batch_bytes):
            with _file_named(piece, rows, first):
                moments += backend_of(rows).moments(rows, None, recipe.read, fourth=recipe.needs_fourth_moment)
    return moments


def _write_outputs(piece: Piece, output: Path, whitening: Whitening, dtype: Any, batch_bytes: int) -> int:
    """Write the outputs of a piece, and return their number."""
    if dtype is None:
        dtype = whitening.transform(np.zeros((1, piece.file.dimension), piece.file.dtype)).dtype
    dtype, number, column = np.dtype(dtype), piece.last - piece.first, piece.file.column or "embedding"
    with _worker_named():
        _check_visible(output.parent)
        with writing_rows(output, number, len(whitening.matrix_), dtype, column=column) as write:
            for rows, first in _batches(piece, batch_bytes):
                if rows.dtype.kind == "f" and rows.itemsize < dtype.itemsize:
                    rows = rows.astype(dtype)  # outputs have the digits that their dtype can hold then
                with _file_named(piece, rows, first):
                    y = whitening.transform(rows)
                write(y)
    return number


def _batches(piece: Piece, batch_bytes: int) -> Iterator[tuple[npt.NDArray[Any], int]]:
    """Yield the rows of a piece in batches, each with the number of its first row in the file.

    A batch is valid until the next one is taken, which may be read into the same memory.
    """
    _check_visible(piece.file.path)
    size, first = max(batch_bytes // (piece.file.dimension * piece.file.dtype.itemsize), 1), piece.first
    with closing(piece.file.open()) as file:
        for batch in file.batches(size, piece.first, piece.last):
            yield batch, first
            first += len(batch)


@contextmanager
def _worker_named() -> Iterator[None]:
    """Add the name of the machine that this worker runs on to the error of a file."""
    try:
        yield
    except FileError as error:
        raise FileError(f"on {socket.gethostname()}: {error}") from error


def _check_visible(path: Path) -> None:
    if not path.exists():
        raise FileError(
            f"{path} doesn't exist: all workers need the inputs, and the folder of outputs, under these names"
        )


@contextmanager
def _file_named(piece: Piece, rows: npt.NDArray[Any], first: int) -> Iterator[None]:
    """Add the name of the file, and the number of the row if that is wrong, to errors inside this `with` statement."""
    try:
        yield
    except ValueError as error:
        raise (
            Source((piece.file,)).nonfinite_error(rows, first) or ValueError(f"{piece.file.path}: {error}")
        ) from error
