"""Arguments that the commands for embeddings share, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

from polywhiten.cli.options import bad
from polywhiten.embeddings.files import FileError, Source, open_source
from polywhiten.embeddings.files.memory import LEAST_ROWS, batch_rows, machine_memory, parse_size

PARQUET_BYTES = 48 * 2**20  # what pyarrow was measured to keep for reading, and again for writing

Command = TypeVar("Command", bound=Callable[..., Any])


def size(value: str) -> int:
    """Convert a size such as 2GiB to bytes."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def number(value: Any) -> float:
    """Convert to a finite number; click's own type would accept NaN and infinity."""
    with suppress(ValueError):
        if math.isfinite(float(value)):
            return float(value)
    raise click.BadParameter(f"{value} is not a number")


def input_options(command: Command) -> Command:
    """Add the arguments that say what is read."""
    return _with(
        command,
        click.argument("inputs", nargs=-1, required=True, metavar="INPUT..."),
        click.option("--key", metavar="NAME", help="The array in .npz files, if they have several that are 2-D."),
        click.option("--column", metavar="NAME", help="The column of Parquet files, if several have lists of numbers."),
    )


def run_options(command: Command) -> Command:
    """Add the arguments that say how the inputs are read."""
    help_of_memory = "The most memory to take, such as 2GiB or 500MB."
    default = "a quarter of the machine's"
    return _with(
        command,
        click.option("--memory", type=size, metavar="SIZE", show_default=default, help=help_of_memory),
        click.option("--quiet", is_flag=True, help="Show no progress."),
    )


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an output that exists, when the new one is complete."
)


def opened(inputs: tuple[str, ...], key: str | None, column: str | None) -> Source:
    """Look into the inputs; an error is that of the arguments."""
    try:
        return open_source(inputs, key=key, column=column)
    except FileError as error:
        raise bad("INPUT...", str(error)) from error


def rows_at_once(
    source: Source, memory: int | None, *, matrices: int, sampled: int = 0, writes_parquet: bool = False
) -> int:
    """Return how many rows to read at once for --memory.

    `matrices` of shape (dimension, dimension), and copies of sampled rows, in float64, are needed at the same time.
    """
    from polywhiten.embeddings.whitening import Whitening  # slow to import, with scikit-learn

    # What reading and kernels load, when they are first used, would come on top of the memory that is measured.
    with closing(source.batches(LEAST_ROWS)) as batches:
        next(batches)
    Whitening().fit_transform(np.array([[0, 0], [0, 1], [1, 0], [1, 1]] * 3, source.dtype))
    itemsize, dimension = max(file.dtype.itemsize for file in source.files), source.dimension
    reserved = 8 * dimension * (matrices * dimension + sampled)
    reserved += PARQUET_BYTES * (writes_parquet + any(file.column is not None for file in source.files))
    try:
        return batch_rows(machine_memory() // 4 if memory is None else memory, dimension, itemsize, reserved)
    except ValueError as error:
        raise bad("--memory", str(error)) from error


def check_output(path: Path, source: Source, overwrite: bool) -> None:
    """Raise an error if an output exists and must not be replaced, or is an input."""
    with suppress(OSError):  # a name that is too long, for example, which is reported when the file is written
        if any(path.exists() and path.samefile(file.path) for file in source.files):
            raise bad("--out", f"{path} is one of the inputs: name another file")
        if path.is_dir():
            raise bad("--out", f"{path} is a folder: name a file")
        if path.exists() and not overwrite:
            raise bad("--out", f"{path} exists: name another file, or replace it with --overwrite")
