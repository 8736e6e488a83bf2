"""The study's command line: a command for each experiment, one for all of them, and one for the report."""

import time
from collections.abc import Callable
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from study.experiments import EXPERIMENTS
from study.jobs import Job, Maker, prepare
from study.pictures import Source
from study.recording import Recorder
from study.runs import Experiment, Place, Rows

HERE = Path(__file__).parent
SIZES = ("tiny", "small", "cpu", "gpu", "large")
ALONE = "steps"  # is made last in one process, because its times are those of an idle device
ALONE_SECONDS = 60  # that the time limit keeps for it
PICTURES = click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="CIFAR-10 as a .npz file, whose layout README.md describes.",
)
OPTIONS = [
    click.option(
        "--size",
        type=click.Choice(SIZES),
        default="small",
        show_default=True,
        help="small and cpu are for two cores, gpu for ten minutes of one GPU, large for hours of it.",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option(
        "--seeds", type=click.IntRange(min=1), help="Number of seeds.  [default: 3, or fewer where README.md says so]"
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        help="Processes that share the device.  [default: 4 on a GPU, 1 on a CPU]",
    ),
    click.option(
        "--minutes",
        type=click.FloatRange(min=0, min_open=True),
        help="Time after which no run begins, and those that have begun stop after their epoch.  [default: no limit]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Threads of PyTorch in each process.  [default: as many as PyTorch chooses]",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default=HERE / "results",
        help="Folder of the CSV files.  [default: results, beside this script]",
    ),
    click.option(
        "--checkpoints",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the networks of unfinished runs.  [default: checkpoints, in the folder of the CSV files]",
    ),
]


@click.group()
def main() -> None:
    """Measure what the papers on IterNorm and group whitening claim.

    A command that was interrupted continues where it stopped. Don't run two at a time on one folder.
    """


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def add_command(experiment: Experiment) -> None:
    """Add the command of an experiment, which makes the runs that are missing in its file."""

    @main.command(experiment.name, help=f"{experiment.title} Writes results/{experiment.name}-SIZE.csv.")
    @(PICTURES if experiment.needs_pictures else lambda command: command)
    @with_options
    def command(data: Path | None = None, **options: Any) -> None:
        run([experiment], data=data, **options)


for experiment in EXPERIMENTS:
    add_command(experiment)


@main.command("all")
@PICTURES
@with_options
def make_everything(data: Path, **options: Any) -> None:
    """Make the runs of all experiments that have the size, the most important ones first."""
    run(EXPERIMENTS, data=data, **options)


def run(
    experiments: list[Experiment],
    *,
    data: Path | None,
    size: str,
    device: str,
    seeds: int | None,
    processes: int | None,
    minutes: float | None,
    threads: int | None,
    out: Path,
    checkpoints: Path | None,
) -> None:
    """Make the runs that are missing in the experiments' files."""
    if size == "tiny" and out == HERE / "results":
        raise click.UsageError("--size tiny is a trial and gives no results to keep: give a folder with --out")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no CUDA device")
    for experiment in experiments if len(experiments) == 1 else ():
        if size not in experiment.sizes:
            raise click.UsageError(f"--size {size}: {experiment.name} has sizes {', '.join(experiment.sizes)}")
    if threads:
        torch.set_num_threads(threads)
    end = time.time() + 60 * minutes if minutes else float("inf")
    place = Place(Source(data, device), device, checkpoints or out / "checkpoints")
    prepare(device)
    try:
        rows = {experiment.name: Rows(experiment, out, size) for experiment in experiments}
        jobs = missing(experiments, rows, size, seeds)
        together, alone = ([job for job in jobs if (job.experiment == ALONE) == last] for last in (False, True))
        with Recorder(rows, jobs, place, Console()) as recorder:
            number = processes or (4 if device == "cuda" else 1)
            kept = ALONE_SECONDS if together and alone and minutes else 0
            Maker(place, end - kept, threads, recorder.update).make(together, number)
            Maker(place, end, threads, recorder.update).make(alone, 1)
    except KeyboardInterrupt:
        raise click.ClickException(f"stopped: {out} has all finished epochs; the same command continues") from None
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    recorder.summarize()


def missing(experiments: list[Experiment], rows: dict[str, Rows], size: str, seeds: int | None) -> list[Job]:
    """Return the runs without a finished row: the first round of every experiment, then the second ones, and so on."""
    jobs = []
    plans = [[(each, part) for part in each.rounds(size, seeds)] for each in experiments]
    for experiment, part in (pair for level in zip_longest(*plans) for pair in level if pair is not None):
        left = [settings for settings in part if not rows[experiment.name].finished(settings)]
        for _, settings in groupby(left, experiment.together):
            jobs.append(Job(experiment.name, tuple(settings)))
    return jobs


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
@click.option(
    "--size",
    "sizes",
    type=click.Choice(SIZES),
    multiple=True,
    default=("small", "cpu", "gpu", "large"),
    show_default=True,
)
def report(results: Path, page: Path, sizes: tuple[str, ...]) -> None:
    """Draw the figures, and write the page's tables between their comments."""
    from study.report import write  # needs matplotlib, which a machine that only measures may lack

    try:
        for path in write(EXPERIMENTS, sizes, results.resolve(), page.resolve()):
            click.echo(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
