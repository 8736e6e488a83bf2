"""What the commands for embeddings do with `--scheduler`: the workers of a Dask cluster read and write the files."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polywhiten.cli.embeddings.messages import in_words_of_options
from polywhiten.cli.embeddings.progress import RowProgress
from polywhiten.cli.embeddings.stopping import terminable
from polywhiten.cli.options import bad
from polywhiten.cli.streams import STOPPED, WRONG_USE, complain, reason
from polywhiten.embeddings.files import Piece, Source, pieces
from polywhiten.embeddings.files.writers import SUFFIXES, check_space

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening

PIECE_BYTES = 2**30  # of a task, at most: a few seconds of work
PIECES_OF_A_THREAD = 8  # at least, so that the last pieces of all end at nearly the same time
BATCH_BYTES = 2**26  # that a thread reads at once, unless it has less memory
COPIES = 4  # of a batch, that a thread may hold: rows and outputs, either in another dtype too

scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Let the workers of a Dask cluster read and write the files; the address is that of its scheduler, such as "
    "tcp://10.0.0.1:8786. --memory then says how much a thread of a worker may take.",
)


def fit_on_cluster(
    address: str, whitening: Whitening, source: Source, memory: int | None, progress: RowProgress
) -> None:
    """Fit an estimator to files."""
    with _cluster(address, source, memory, progress) as (dask, parts, options):
        dask.fit_files(whitening, parts, **options)


def transform_on_cluster(
    address: str,
    whitening: Whitening,
    source: Source,
    out: Path,
    dtype: str | None,
    *,
    overwrite: bool,
    memory: int | None,
    quiet: bool,
) -> int:
    """Whiten files into one file a piece in a folder, report how that ended, and return the exit code."""
    earlier = _earlier_outputs(out, source, overwrite)
    if dtype is None and source.dtype.kind != "f":
        dtype = "float32"
    itemsize = source.dtype.itemsize if dtype is None else int(dtype.removeprefix("float")) // 8
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad("--out", f"{out} can't be created ({error.strerror or error})") from error
    check_space(out, source.rows * len(whitening.matrix_) * itemsize)
    progress = RowProgress("transform", source.rows, quiet=quiet)
    try:
        with terminable(), _cluster(address, source, memory, progress) as (dask, parts, options):
            outputs = dask.transform_files(whitening, parts, out, dtype=dtype, **options)
    except click.ClickException:
        raise
    except (Exception, KeyboardInterrupt) as error:
        complain(f"{_in_words(error)}; the files in {out} are complete, but not all there")
        return STOPPED if isinstance(error, KeyboardInterrupt) else WRONG_USE
    for path in set(earlier).difference(path.name for path in outputs):
        (out / path).unlink()  # an earlier run had more pieces
    click.echo(
        f"{len(outputs)} files in {out}: {source.rows:,} rows of {len(whitening.matrix_)}, in {progress.summary}"
    )
    return 0


def _in_words(error: BaseException) -> str:
    """Return a line about what ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    return in_words_of_options(str(error)) if isinstance(error, ValueError) else reason(error)


@contextmanager
def _cluster(
    address: str, source: Source, memory: int | None, progress: RowProgress
) -> Iterator[tuple[Any, list[Piece], dict[str, Any]]]:
    """Connect to a cluster inside this `with` statement.

    Yields the module `polywhiten.dask`, the pieces for this cluster, and the options of the module's functions.
    """
    try:
        dask = importlib.import_module("polywhiten.dask")
    except ImportError as error:
        raise bad("--scheduler", f'Dask is needed ({error}): pip install "polywhiten[distributed]"') from error
    batch_bytes = BATCH_BYTES if memory is None else min(BATCH_BYTES, memory // COPIES)
    row = source.dimension * max(file.dtype.itemsize for file in source.files)
    try:
        with _no_logs(), dask.connected(address) as client, progress:
            even = source.rows // (PIECES_OF_A_THREAD * sum(client.nthreads().values()))
            parts = pieces(source, max(min(max(even, batch_bytes // row), PIECE_BYTES // row), 1))

            def report(index: int) -> None:
                progress.advance(parts[index].last - parts[index].first)

            yield dask, parts, {"batch_bytes": batch_bytes, "report": report}
    except dask.ClusterError as error:
        raise bad("--scheduler", str(error)) from error


@contextmanager
def _no_logs() -> Iterator[None]:
    """Let libraries log nothing inside this `with` statement; Dask's lines would surround the one of an error."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _earlier_outputs(out: Path, source: Source, overwrite: bool) -> list[str]:
    """Return the names of the outputs of an earlier run; raise an error if they must not be replaced."""
    if out.suffix.lower() in SUFFIXES and not out.is_dir():
        raise bad("--out", f"{out} is one file: with --scheduler, name a folder, for a file of each piece")
    if not out.is_dir():
        return []
    if any(file.path.resolve().parent == out.resolve() for file in source.files):
        raise bad("--out", f"{out} has inputs: name another folder")
    earlier = sorted(path.name for suffix in SUFFIXES for path in out.glob(f"part-*{suffix}"))
    if earlier and not overwrite:
        raise bad("--out", f"{out / earlier[0]} exists: name another folder, or replace it with --overwrite")
    return earlier
