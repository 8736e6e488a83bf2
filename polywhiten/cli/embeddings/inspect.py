"""The command `polywhiten inspect`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from polywhiten.cli.embeddings.messages import OPTION_NAMES, in_words_of_options, warnings_as_lines
from polywhiten.cli.embeddings.options import (
    input_options,
    number,
    opened,
    rows_at_once,
    run_options,
)
from polywhiten.cli.embeddings.progress import RowProgress
from polywhiten.cli.embeddings.transform import load_whitening
from polywhiten.cli.options import bad
from polywhiten.cli.streams import WRONG_USE, complain
from polywhiten.cli.tables import full_width
from polywhiten.embeddings.files import FileError, Source

if TYPE_CHECKING:
    from polywhiten.embeddings.inspection import Inspection

MATRICES = 6  # (d, d), which merging moments and an eigendecomposition hold at once


@click.command(short_help="Measure how far embeddings are from white.", context_settings={"show_default": True})
@input_options
@click.option(
    "--plot",
    type=Path,
    metavar="FILE",
    help="Write a picture to FILE.png (or .svg, .pdf), and replace it if it exists.",
)
@click.option(
    "--whitening",
    "whitening_path",
    type=Path,
    metavar="FILE",
    show_default="the one that is suggested",
    help="What polywhiten fit has written, to be measured.",
)
@click.option("--scale", type=number, metavar="NUMBER", help="Multiply inputs by it, as quantized integers need it.")
@click.option("--skip-nonfinite", is_flag=True, help="Leave out rows with NaN or infinity, instead of an error.")
@run_options
def inspect(
    inputs: tuple[str, ...],
    key: str | None,
    column: str | None,
    memory: int | None,
    quiet: bool,
    plot: Path | None,
    whitening_path: Path | None,
    scale: float | None,
    skip_nonfinite: bool,
) -> int:
    """Measure how far embeddings are from white, and suggest a whitening.

    INPUT... are .npy, .npz and Parquet files with one embedding a row, folders of such files, or patterns in quotes.
    All are read once, in batches that fit into --memory.

    The condition number is the largest variance of a direction divided by the smallest. The effective dimension is the
    number of directions that would have the variance if it were spread evenly. The mean cosine is near 1 if all
    embeddings point in the same direction, and near 0 if they point in all.
    """
    source = opened(inputs, key, column)
    if plot is not None:
        _check_plot(plot)
    whitening = None if whitening_path is None else load_whitening(whitening_path, source)
    from polywhiten.embeddings import inspection  # slow to import, with scikit-learn

    sampled = 8 * min(inspection.SAMPLE, source.rows)  # with what is computed of them
    batch_size = rows_at_once(source, memory, matrices=MATRICES, sampled=sampled)
    try:
        with warnings_as_lines(), RowProgress("inspect", source.rows, quiet=quiet) as progress:
            found = inspection.inspect(
                _counted(source, batch_size, progress, skip_nonfinite),
                whitening=whitening,
                scale=scale,
                on_nonfinite="skip" if skip_nonfinite else "raise",
            )
    except FileError:
        raise
    except ValueError as error:
        complain(f"{source.files[0].path}: {in_words_of_options(str(error))}")
        return WRONG_USE
    click.echo(full_width(_table(found)), nl=False)
    for line in _suggestion(found, inputs, key, column, scale, skip_nonfinite, measured=whitening is None):
        click.echo(line)
    if plot is not None:
        from polywhiten.cli.embeddings.picture import save_picture

        save_picture(found, _title(source), plot)
        click.echo(f"The picture is in {plot}.")
    return 0


def _counted(source: Source, batch_size: int, progress: RowProgress, skips: bool) -> Iterator[Any]:
    """Yield batches, and count the rows of each as done when the next one is asked for."""
    done = 0
    for batch in source.batches(batch_size):
        error = None if skips or batch.dtype.kind != "f" else source.nonfinite_error(batch, done)
        if error is not None:
            raise error
        yield batch
        done += len(batch)
        progress.advance(len(batch))


def _table(found: Inspection) -> Table:
    """Return what was measured as a table, before and after whitening."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("Embeddings", justify="right")
    table.add_column("White", justify="right")
    shares = {f"Components for {share:.0%} of the variance": f"{k}" for share, k in found.components.items()}
    before = {
        "Rows": f"{found.rows + found.skipped:,}",
        "Skipped, with NaN or infinity": f"{found.skipped:,}" if found.skipped else "",
        "Dimension": f"{found.dimension}",
        "Rank": f"{found.rank}" if found.rank < found.dimension else "",
        "Mean length of rows": f"{found.mean_norm:.4g}",
        "Length of the mean": f"{found.centre_norm:.4g}",
        **_spectrum(found.eigenvalues, found.condition_number),
        **shares,
        "Mean cosine of random pairs": f"{found.mean_cosine:z.3f}",
        "Standard deviation of cosines": f"{found.cosines.std():.3f}",
    }
    white = found.white_eigenvalues
    after = {
        "Dimension": f"{len(white)}",
        **_spectrum(white, white[0] / white[-1] if white[-1] > 0 else math.inf),
        "Mean cosine of random pairs": f"{found.white_mean_cosine:z.3f}",
        "Standard deviation of cosines": f"{found.white_cosines.std():.3f}",
    }
    for name, value in before.items():
        if value:
            table.add_row(name, value, after.get(name, ""))
    return table


def _spectrum(eigenvalues: NDArray[np.float64], condition_number: float) -> dict[str, str]:
    """Return the rows of the table about a spectrum."""
    from polywhiten.embeddings.inspection import effective_dimension

    return {
        "Largest variance of a direction": f"{eigenvalues[0]:.3g}",
        "Smallest variance of a direction": f"{eigenvalues[-1]:.3g}",
        "Condition number": f"{condition_number:,.0f}" if 10 <= condition_number < 1e6 else f"{condition_number:.3g}",
        "Effective dimension": f"{effective_dimension(eigenvalues):.1f}",
    }


def _suggestion(
    found: Inspection,
    inputs: tuple[str, ...],
    key: str | None,
    column: str | None,
    scale: float | None,
    skips: bool,
    *,
    measured: bool,
) -> Iterator[str]:
    """Yield the lines of the suggestion: the reasons, and the command to type."""
    yield "Suggestion" + (", with which White was measured:" if measured else ":")
    for reason in found.suggestion.reasons:
        yield f"- {reason}"
    options = {"--key": key, "--column": column, "--scale": scale}
    names = (f"./{name}" if name.startswith("-") else name for name in inputs)  # which would be taken for options
    words = ["polywhiten", "fit", *names, "--out", "whitening.npz"]
    for name, value in found.suggestion.parameters.items():
        words += ["--normalize"] if name == "normalize" else [OPTION_NAMES[name], f"{value}"]
    for name, value in options.items():
        words += [] if value is None else [name, f"{value}"]
    words += ["--skip-nonfinite"] if skips else []
    yield ""
    yield f"  {shlex.join(words)}"
    yield ""
    yield (  # see docs/embeddings-results.md
        f"Random pairs have a mean cosine of {found.mean_cosine:z.2f}. In measured searches, embeddings with one of "
        "about 0.7 gained much from whitening; those of a model that was trained for similarity gained little, or "
        "lost. Compare results with and without it."
    )


def _title(source: Source) -> str:
    first = source.files[0].path
    names = str(first) if len(source.files) == 1 else f"{first} and {len(source.files) - 1} more"
    return f"{names}: {source.rows:,} rows of {source.dimension}"


def _check_plot(plot: Path) -> None:
    """Raise an error before the rows are read if the picture can't be written."""
    try:
        from polywhiten.cli.embeddings.picture import SUFFIXES
    except ImportError as error:
        raise bad("--plot", f'matplotlib is needed ({error}): pip install "polywhiten[embeddings]"') from error

    if plot.suffix.lower() not in SUFFIXES:
        raise bad("--plot", f"{plot} must end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if not plot.parent.is_dir():
        raise bad("--plot", f"the folder {plot.parent} doesn't exist")
