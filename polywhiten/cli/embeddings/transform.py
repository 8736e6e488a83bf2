"""The command `polywhiten transform`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from polywhiten.cli.embeddings.cluster import scheduler_option, transform_on_cluster
from polywhiten.cli.embeddings.messages import in_words_of_options
from polywhiten.cli.embeddings.options import (
    check_output,
    input_options,
    opened,
    overwrite_option,
    rows_at_once,
    run_options,
)
from polywhiten.cli.embeddings.progress import RowProgress
from polywhiten.cli.embeddings.stopping import terminable
from polywhiten.cli.options import bad
from polywhiten.cli.streams import STOPPED, WRONG_USE, complain, reason
from polywhiten.embeddings.files import Source
from polywhiten.embeddings.files.writers import SUFFIXES, check_space, writing_rows

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening

DTYPES = "float16", "float32", "float64"
MATRICES = 3  # (d, d): the moments and the map of the estimator, and a copy in the dtype of the rows

Outputs = list[tuple[Path, Source]]


@click.command(context_settings={"show_default": True})
@input_options
@click.option(
    "--whitening", "whitening_path", type=Path, required=True, metavar="FILE", help="What polywhiten fit has written."
)
@click.option(
    "--out",
    type=Path,
    required=True,
    metavar="PATH",
    help="A file PATH.npy or PATH.parquet for all rows, or a folder for one file an input.",
)
@overwrite_option
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    show_default="the inputs', float32 for integers",
    help="The dtype of the output.",
)
@click.option("--skip-nonfinite", is_flag=True, help="Write NaN for rows with NaN or infinity, instead of an error.")
@scheduler_option
@run_options
def transform(
    inputs: tuple[str, ...],
    key: str | None,
    column: str | None,
    memory: int | None,
    quiet: bool,
    whitening_path: Path,
    out: Path,
    overwrite: bool,
    dtype: str | None,
    skip_nonfinite: bool,
    scheduler: str | None,
) -> int:
    """Whiten embeddings, with what polywhiten fit has written.

    INPUT... are .npy, .npz and Parquet files with one embedding a row, folders of such files, or patterns in quotes.
    They are read in the order in which they are named, and the files of a folder or a pattern in the order of their
    names, so that part-10 comes before part-2. The output has the rows in this order. Of Parquet files, it has only the
    embeddings.

    If PATH is a folder, which is created if it doesn't exist, it gets a file for each input, with its name: Parquet
    for Parquet, and .npy for the others. With --scheduler, PATH has to be a folder that all workers see. It gets a file
    for each piece that a worker has read, part-0.npy, part-1.npy and so on, in the order of the rows.

    Outputs get their names when they are complete; until then, their names start with a dot. Existing ones are replaced
    only with --overwrite.
    """
    source = opened(inputs, key, column)
    whitening = load_whitening(whitening_path, source)
    if skip_nonfinite:
        whitening.set_params(on_nonfinite="skip")
        whitening.moments_ = whitening.moments_
    if scheduler is not None:
        return transform_on_cluster(
            scheduler, whitening, source, out, dtype, overwrite=overwrite, memory=memory, quiet=quiet
        )
    outputs = _outputs(out, source)
    for path, _ in outputs:
        check_output(path, source, overwrite)
    writes_parquet = any(path.suffix.lower() == ".parquet" for path, _ in outputs)
    batch_size = rows_at_once(source, memory, matrices=MATRICES, writes_parquet=writes_parquet)
    if outputs[0][0] != out:
        _make_folder(out)
    dimension = len(whitening.matrix_)
    sizes = [part.rows * dimension * _dtype(part, dtype).itemsize for _, part in outputs]
    check_space(outputs[0][0].parent, sum(sizes))
    return _write(whitening, outputs, dtype, batch_size, quiet)


def _write(whitening: Whitening, outputs: Outputs, dtype: str | None, batch_size: int, quiet: bool) -> int:
    """Write all outputs, report how that ended, and return the exit code."""
    written: list[Path] = []
    total = sum(part.rows for _, part in outputs)
    progress = RowProgress("transform", total, quiet=quiet)
    try:
        with terminable(), progress:
            for path, part in outputs:
                _write_one(whitening, path, part, _dtype(part, dtype), batch_size, progress)
                written.append(path)
    except (Exception, KeyboardInterrupt) as error:
        complete = f"{len(written)} of {len(outputs)} outputs are complete"
        state = complete if len(outputs) > 1 else "no output was written"
        if isinstance(error, KeyboardInterrupt):
            complain(f"stopped: {state}")
            return STOPPED
        complain(f"{in_words_of_options(str(error)) if isinstance(error, ValueError) else reason(error)}; {state}")
        return WRONG_USE
    name = outputs[0][0] if len(outputs) == 1 else f"{len(outputs)} files in {outputs[0][0].parent}"
    click.echo(f"{name}: {total:,} rows of {len(whitening.matrix_)}, in {progress.summary}")
    return 0


def _write_one(
    whitening: Whitening, path: Path, part: Source, dtype: np.dtype, batch_size: int, progress: RowProgress
) -> None:
    """Write the white rows of a part of the inputs to one file."""
    column = next((file.column for file in part.files if file.column), "embedding")
    done = 0
    with writing_rows(path, part.rows, len(whitening.matrix_), dtype, column=column) as write:
        for batch in part.batches(batch_size):
            rows = batch.astype(dtype) if batch.dtype.kind == "f" and batch.itemsize < dtype.itemsize else batch
            try:
                write(whitening.transform(rows))
            except ValueError as error:
                raise part.nonfinite_error(batch, done) or error from None
            done += len(batch)
            progress.advance(len(batch))


def load_whitening(path: Path, source: Source) -> Whitening:
    """Return the whitening in a file; raise an error if it doesn't fit the inputs."""
    from polywhiten.embeddings.whitening import Whitening  # slow to import, with scikit-learn

    try:
        whitening = Whitening.load(path)
    except OSError as error:
        raise bad("--whitening", f"{path} can't be read ({error.strerror or error})") from error
    except (ValueError, ModuleNotFoundError) as error:
        raise bad("--whitening", str(error)) from error
    known, dimension = whitening.n_features_in_, source.dimension
    if known != dimension:
        raise bad("--whitening", f"{path} is for rows of {known} numbers, and {source.files[0].path} has {dimension}")
    return whitening


def _outputs(out: Path, source: Source) -> Outputs:
    """Return each output with the inputs whose rows it will have."""
    if out.suffix.lower() in SUFFIXES and not out.is_dir():
        return [(out, source)]
    if out.suffix and not out.is_dir():
        raise bad("--out", f"{out} must end with {' or '.join(SUFFIXES)}, or be a folder")
    outputs: dict[Path, Source] = {}
    for file in source.files:
        path = out / f"{file.path.stem}{'.parquet' if file.path.suffix.lower() == '.parquet' else '.npy'}"
        if path in outputs:
            raise bad("--out", f"{outputs[path].files[0].path} and {file.path} would both become {path}: rename one")
        outputs[path] = Source((file,))
    return list(outputs.items())


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad("--out", f"{out} can't be created ({error.strerror or error})") from error


def _dtype(part: Source, wanted: str | None) -> np.dtype:
    """Return the dtype of an output."""
    if wanted is not None:
        return np.dtype(wanted)
    return part.dtype if part.dtype.kind == "f" else np.dtype(np.float32)
