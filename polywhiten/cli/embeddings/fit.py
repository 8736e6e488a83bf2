"""The command `polywhiten fit`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from polywhiten.cli.embeddings.checkpoint import Checkpoint
from polywhiten.cli.embeddings.cluster import fit_on_cluster, scheduler_option
from polywhiten.cli.embeddings.messages import in_words_of_options, warnings_as_lines
from polywhiten.cli.embeddings.options import (
    check_output,
    input_options,
    number,
    opened,
    overwrite_option,
    rows_at_once,
    run_options,
)
from polywhiten.cli.embeddings.progress import RowProgress
from polywhiten.cli.embeddings.stopping import terminable
from polywhiten.cli.options import Integer, bad
from polywhiten.cli.streams import STOPPED, WRONG_USE, complain, reason
from polywhiten.embeddings.files import Source
from polywhiten.embeddings.files.errors import named
from polywhiten.embeddings.files.writers import check_space
from polywhiten.embeddings.matrices import METHODS
from polywhiten.embeddings.recipe import LEDOIT_WOLF, Recipe
from polywhiten.embeddings.replacement import check_replaceable
from polywhiten.embeddings.storage import SUFFIXES

if TYPE_CHECKING:
    from polywhiten.embeddings.whitening import Whitening

MATRICES = 6  # (d, d), which merging moments and an eigendecomposition hold at once


def _components(value: str) -> int | float:
    return int(value) if value.isdecimal() else number(value)


def _shrinkage(value: str) -> float | str:
    return value if value == LEDOIT_WOLF else number(value)


_METHOD_HELP = (
    "zca changes the data least; pca has the principal components as outputs; cholesky is triangular; zca_cor is zca "
    "of the correlations; newton is a partial zca, which leaves small variances small."
)


@click.command(context_settings={"show_default": True})
@input_options
@click.option("--out", type=Path, required=True, metavar="FILE", help="The whitening, FILE.npz or FILE.safetensors.")
@overwrite_option
@click.option("--method", type=click.Choice(METHODS), default="zca", help=_METHOD_HELP)
@click.option(
    "--components",
    "n_components",
    type=_components,
    metavar="NUMBER",
    show_default="all",
    help="How many principal components to keep, or the share of the variance, below 1, that they keep.",
)
@click.option("--group-size", type=Integer(1), help="Whiten groups of so many dimensions separately.")
@click.option("--iterations", type=Integer(1), show_default="5", help="Steps of the method newton.")
@click.option(
    "--eps", type=number, metavar="NUMBER", default=1e-5, help="Added to variances, as a share of their mean."
)
@click.option("--absolute-eps", is_flag=True, help="Add --eps itself, instead of a share of the mean variance.")
@click.option(
    "--shrinkage",
    type=_shrinkage,
    metavar="NUMBER",
    default=0.0,
    help=f"From 0 to 1, towards equal variances without correlation, or {LEDOIT_WOLF} to estimate it.",
)
@click.option("--normalize", is_flag=True, help="Divide outputs by their length.")
@click.option("--scale", type=number, metavar="NUMBER", help="Multiply inputs by it, as quantized integers need it.")
@click.option("--skip-nonfinite", is_flag=True, help="Leave out rows with NaN or infinity, instead of an error.")
@click.option(
    "--checkpoint-every",
    "seconds",
    type=click.FloatRange(0, min_open=False),
    metavar="SECONDS",
    default=30.0,
    help="How often to save the state.",
)
@scheduler_option
@run_options
def fit(
    inputs: tuple[str, ...],
    key: str | None,
    column: str | None,
    memory: int | None,
    quiet: bool,
    out: Path,
    overwrite: bool,
    seconds: float,
    scheduler: str | None,
    **options: Any,
) -> int:
    """Fit a whitening to embeddings.

    INPUT... are .npy, .npz and Parquet files with one embedding a row, folders of such files, or patterns in quotes.
    All are read once, in batches that fit into --memory.

    The state is saved in FILE.checkpoint from time to time, and when the command is stopped or fails. The same command
    then goes on from there, if the inputs haven't changed, and removes FILE.checkpoint at the end. Of the options, only
    --scale and whether --shrinkage is ledoit_wolf have to be the same. With --scheduler, no state is saved: other
    workers read again what a worker that is lost has read.

    An existing FILE is replaced only with --overwrite.
    """
    source = opened(inputs, key, column)
    _check_suffix(out)
    check_output(out, source, overwrite)
    check_space(out.parent, 4 * source.dimension**2 * 8)  # the output and the checkpoint, with two matrices each
    whitening = _estimator(source.dimension, options)
    checkpoint = Checkpoint(out, source, whitening, seconds)
    with named(checkpoint.path, "written"):  # whose name is the longest
        check_replaceable(checkpoint.path)
    if scheduler is None:
        batch_size = rows_at_once(source, memory, matrices=MATRICES)
        progress = _start(whitening, source, checkpoint, quiet)
        add_rows = partial(_add_rows, whitening, source, batch_size, checkpoint, progress)
    else:
        progress = RowProgress("fit", source.rows, quiet=quiet)
        add_rows = partial(fit_on_cluster, scheduler, whitening, source, memory, progress)
    try:
        with terminable(), warnings_as_lines():
            add_rows()
            with named(out, "written"):
                whitening.save(out)
    except click.ClickException:  # of --scheduler
        raise
    except (Exception, KeyboardInterrupt) as error:  # hours of reading may come before any error
        return _report_failure(error, whitening, source, checkpoint)
    checkpoint.remove()
    skipped = f", {whitening.n_skipped_:,} of them skipped" if whitening.n_skipped_ else ""
    outputs = f" to {whitening.n_components_}" if whitening.n_components_ != source.dimension else ""
    what = f"{whitening.method} of {source.dimension} dimensions{outputs}"
    click.echo(f"{out}: {what}, fitted to {source.rows:,} rows{skipped}, in {progress.summary}")
    return 0


def _start(whitening: Whitening, source: Source, checkpoint: Checkpoint, quiet: bool) -> RowProgress:
    """Let the estimator go on from a checkpoint that fits, say so, and return the progress so far."""
    moments, note = checkpoint.load()
    if note:
        complain(note)
    if moments is not None:
        whitening.moments_ = moments
    return RowProgress("fit", source.rows, _rows_seen(whitening), quiet=quiet)


def _add_rows(
    whitening: Whitening, source: Source, batch_size: int, checkpoint: Checkpoint, progress: RowProgress
) -> None:
    """Add the rows that the estimator hasn't seen to its statistics."""
    with progress:
        for batch in source.batches(batch_size, _rows_seen(whitening)):
            try:
                whitening.partial_fit(batch)
            except ValueError as error:
                raise source.nonfinite_error(batch, _rows_seen(whitening)) or error from None
            progress.advance(len(batch))
            checkpoint.save_at_times(whitening.moments_)


def _rows_seen(whitening: Whitening) -> int:
    """Return how many rows are in the statistics, or were skipped."""
    is_fitted = whitening.__sklearn_is_fitted__()
    return whitening.n_samples_seen_ + whitening.n_skipped_ if is_fitted else 0


def _report_failure(failure: BaseException, whitening: Whitening, source: Source, checkpoint: Checkpoint) -> int:
    """Save the state, say in a line what happened and how to go on, and return the exit code."""
    kept = "there is no state to go on from"
    seen = _rows_seen(whitening)
    if seen:
        done = f"{seen:,} of {source.rows:,} rows"
        try:
            checkpoint.save(whitening.moments_)
            kept = f"{done} are in {checkpoint.path}, from which the same command goes on"
        except OSError as error:
            kept = f"{done} were read, but {checkpoint.path} can't be written ({error.strerror or error})"
    if isinstance(failure, KeyboardInterrupt):
        complain(f"stopped: {kept}")
        return STOPPED
    message = in_words_of_options(str(failure)) if isinstance(failure, ValueError) else reason(failure)
    complain(f"{message}; {kept}")
    return WRONG_USE


def _estimator(dimension: int, options: dict[str, Any]) -> Whitening:
    """Return the estimator that the options ask for; an error names the option."""
    from polywhiten.embeddings.whitening import Whitening  # slow to import, with scikit-learn

    relative, skips = not options.pop("absolute_eps"), options.pop("skip_nonfinite")
    whitening = Whitening(**options, relative_eps=relative, on_nonfinite="skip" if skips else "raise")
    try:
        Recipe.of(whitening.get_params(deep=False)).check_dimension(dimension)
    except ValueError as error:
        raise click.UsageError(in_words_of_options(str(error))) from error
    return whitening


def _check_suffix(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise bad("--out", f"{out} must end with {' or '.join(SUFFIXES)}")
