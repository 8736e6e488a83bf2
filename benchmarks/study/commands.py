"""The study's command line: a command an experiment, and one for the report."""

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
SEEDS = {"disturbance": 1}  # it has its own standard error
SIZES = ("tiny", "small", "large")
PICTURES = click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="CIFAR-10 as a .npz file; README.md says of what.",
)


@click.group()
def main() -> None:
    """Measure what the papers on IterNorm and group whitening claim; what is interrupted goes on where it was."""


def add_command(experiment: Experiment) -> None:
    """A command that makes the runs which its file lacks."""

    @main.command(experiment.name, help=f"{experiment.title} Writes results/{experiment.name}-SIZE.csv.")
    @(PICTURES if experiment.needs_pictures else lambda command: command)
    @click.option("--size", type=click.Choice(SIZES), default="small", show_default=True, help="small: for two cores.")
    @click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
    @click.option("--seeds", type=click.IntRange(min=1), default=SEEDS.get(experiment.name, 3), show_default=True)
    @click.option("--threads", type=click.IntRange(min=1), help="Of PyTorch.  [default: its own]")
    @click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default=HERE / "results",
        help="Folder of the CSV files.  [default: results, beside this script]",
    )
    def command(size: str, device: str, seeds: int, threads: int | None, out: Path, data: Path | None = None) -> None:
        if size == "tiny" and out == HERE / "results":
            raise click.UsageError("--size tiny is a trial, and no result: say by --out where to")
        if device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError("--device cuda: PyTorch finds no such device")
        if threads:
            torch.set_num_threads(threads)
        warnings.simplefilter("ignore", InfeasibleWarning)  # what infeasible numbers of groups do is measured too
        console, path = Console(), experiment.path(out, size)
        perform = partial(experiment.perform, source=Source(data, device), device=device)
        wanted = experiment.plan(size, seeds)
        try:
            made = resume(experiment, wanted, path, perform, device, console)
        except KeyboardInterrupt:
            raise click.ClickException(f"stopped: the same command goes on; {path} has what is finished") from None
        except (DataError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        console.print(f"{path}: {len(wanted)} runs, {made} of them now", markup=False, highlight=False)


for experiment in EXPERIMENTS:
    add_command(experiment)


@main.command()
@click.option(
    "--results",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=HERE / "results",
    help="Folder of the CSV files, and for the pictures.  [default: results, beside this script]",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=HERE / "README.md",
    help="Where the tables go.  [default: README.md, beside this script]",
)
@click.option("--size", "sizes", type=click.Choice(SIZES), multiple=True, default=("small", "large"), show_default=True)
def report(results: Path, page: Path, sizes: tuple[str, ...]) -> None:
    """Draw the pictures, and write the page's tables between their comments."""
    try:
        for path in write(EXPERIMENTS, sizes, results.resolve(), page.resolve()):
            click.echo(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
