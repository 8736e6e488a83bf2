"""The command line: one command measures, the other draws figures and writes the page's tables."""

from pathlib import Path

import click
from rich.console import Console

from embeddings.measuring import measure as measure_tasks
from embeddings.measuring import read_rows

ROOT = Path(__file__).parent.parent.parent
RESULTS = click.option(
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    default=ROOT / "benchmarks" / "results" / "embeddings.csv",
    help="CSV file of the scores.  [default: benchmarks/results/embeddings.csv]",
)


@click.group()
def main() -> None:
    """Measure whether whitening helps on real embeddings.

    Both commands need the packages that docs/embeddings-results.md lists.
    """


@main.command()
@RESULTS
@click.option(
    "--vectors",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to keep the texts' vectors in, about 200 MB.",
)
@click.option(
    "--cifar",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="CIFAR-10 as a .npz file with x_train, y_train, x_test and y_test.  [default: without these pictures]",
)
def measure(results: Path, vectors: Path, cifar: Path | None) -> None:
    """Score every transform on every task. A command that was interrupted continues where it stopped."""
    from embeddings.tasks import Texts, tasks  # needs the sentence model's packages, which a report doesn't

    try:
        measure_tasks(tasks(Texts(vectors), cifar), results, Console())
    except KeyboardInterrupt:
        raise click.ClickException(f"stopped: {results} has what was measured; the same command continues") from None
    except (ModuleNotFoundError, ValueError) as error:
        raise click.ClickException(str(error)) from error


@main.command()
@RESULTS
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=ROOT / "docs" / "embeddings-results.md",
    help="File that the tables are written into.  [default: docs/embeddings-results.md]",
)
def report(results: Path, page: Path) -> None:
    """Draw the figures beside the CSV file, and write the page's tables between their comments."""
    from embeddings.report import write

    try:
        for path in write(read_rows(results), results.parent, page):
            click.echo(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
