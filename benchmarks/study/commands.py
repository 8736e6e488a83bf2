"""The study's command line, with a command for each experiment and one for the report."""

import warnings
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console

from polywhiten.analysis import InfeasibleWarning
from polywhiten.cli.demo.data import DataError
from study import conditioning, disturbance, groups, resnet, training
from study.pictures import Source
from study.report import write
from study.runs import Experiment, resume

HERE = Path(__file__).parent
EXPERIMENTS = [module.EXPERIMENT for module in (disturbance, conditioning, training, groups, resnet)]
SEEDS = {"disturbance": 1}  # one is enough, because each of its values has a standard error
SIZES = ("tiny", "small", "large")
PICTURES = click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="CIFAR-10 as a .npz file, whose layout README.md describes.",
)


@click.group()
def main() -> None:
    """Measure what the papers on IterNorm and group whitening claim.

    A command that was interrupted continues where it stopped.
    """


def add_command(experiment: Experiment) -> None:
    """Add the command of an experiment, which makes the runs that are missing in its file."""

    @main.command(experiment.name, help=f"{experiment.title} Writes results/{experiment.name}-SIZE.csv.")
    @(PICTURES if experiment.needs_pictures else lambda command: command)
    @click.option(
        "--size", type=click.Choice(SIZES), default="small", show_default=True, help="small is for two cores."
    )
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--seeds", type=click.IntRange(min=1), default=SEEDS.get(experiment.name, 3), show_default=True)
    @click.option(
        "--threads", type=click.IntRange(min=1), help="Threads of PyTorch.  [default: as many as PyTorch chooses]"
    )
    @click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default=HERE / "results",
        help="Folder of the CSV files.  [default: results, beside this script]",
    )
    def command(size: str, device: str, seeds: int, threads: int | None, out: Path, data: Path | None = None) -> None:
        if size == "tiny" and out == HERE / "results":
            raise click.UsageError("--size tiny is a trial and gives no results to keep: give a folder with --out")
        if device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError("--device cuda: PyTorch finds no CUDA device")
        if threads:
            torch.set_num_threads(threads)
        warnings.simplefilter("ignore", InfeasibleWarning)  # infeasible numbers of groups are measured on purpose
        console, path = Console(), experiment.path(out, size)
        perform = partial(experiment.perform, source=Source(data, device), device=device)
        wanted = experiment.plan(size, seeds)
        try:
            made = resume(experiment, wanted, path, perform, device, console)
        except KeyboardInterrupt:
            raise click.ClickException(f"stopped: {path} has the finished runs; the same command continues") from None
        except (DataError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        console.print(f"{path}: {len(wanted)} runs, {made} of them made now", markup=False, highlight=False)


for experiment in EXPERIMENTS:
    add_command(experiment)


@main.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=HERE / "results",
    help="Folder of the CSV files, where the figures are written too.  [default: results, beside this script]",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=HERE / "README.md",
    help="File that the tables are written into.  [default: README.md, beside this script]",
)
@click.option("--size", "sizes", type=click.Choice(SIZES), multiple=True, default=("small", "large"), show_default=True)
def report(results: Path, page: Path, sizes: tuple[str, ...]) -> None:
    """Draw the figures, and write the page's tables between their comments."""
    try:
        for path in write(EXPERIMENTS, sizes, results.resolve(), page.resolve()):
            click.echo(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
