"""Times of polywhiten on a GPU beside PyTorch's layers and the papers' algorithms: `python benchmarks/gpu_speed.py`.

Writes all that is measured to results/gpu-DEVICE.csv and prints the ratios that have a bar. The parts, of which
`--only` chooses some:

- layers: forward and backward of single layers on ResNet-50's shapes. As CUDA graphs, where the device's time is what
  counts, in float32 and bfloat16 and both memory layouts; launched one by one ("eager") in float32 with channels first
  alone, as the time of Python, which small layers wait for, is hardly another elsewhere.
- inverse_sqrt: of 32 matrices 64 x 64, and its gradient.
- cupy: CuPy's forward pass and its pullback, eager and as CUDA graphs.
- host: microseconds of the host for small layers, eager and by torch.compile (gpu_host.py).
- networks: training steps of torchvision's ResNet-50, and their memory (gpu_networks.py).

Competitors take turns in one process; both structures of polywhiten's kernels are competitors of each other. A
measurement on the device is a batch of calls between two events on it, each call on another of several input sets,
together larger than the device's cache: a network's layers don't find their input there either. PyTorch's settings are
its defaults, but where gpu_networks.py says so: products of float32 in full float32. Kernels are compiled before all
else, by several processes.

`--device cpu` tries the script, not the library: tiny shapes, the host's clock, NumPy in CuPy's place, and a
torch.compile that traces and compiles nothing.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import click
import gpu_floors as floors
import torch
from gpu_cases import FIELDS, Case, Row
from gpu_compile import compile_ahead, processes_for
from gpu_parts import PARTS, cases
from gpu_summary import tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import polywhiten as pw


def versions() -> str:
    found = [pw, torch]
    for name in ("torchvision", "cupy", "triton"):
        with suppress(ImportError, RuntimeError):  # the latter from a torchvision that is made for another PyTorch
            found.append(import_module(name))
    return ", ".join(f"{module.__name__} {module.__version__}" for module in found)


class Clock:
    """How long the command runs already."""

    def __init__(self, minutes: float) -> None:
        self._start, self._minutes = time.perf_counter(), minutes

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def check(self) -> None:
        """TimeoutError where the minutes are over."""
        if self.seconds > 60 * self._minutes:
            raise TimeoutError(f"not measured: {self._minutes:g} minutes were over")


def measure(
    found: Sequence[Case], about: dict[str, str], path: Path, seconds: float, clock: Clock, console: Console
) -> list[Row]:
    """The rows of all cases, which are in the file as soon as they are measured."""
    rows: list[Row] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with path.open("w", newline="", encoding="utf-8") as file, Progress(*columns, console=console) as progress:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        task = progress.add_task("", total=len(found))
        for case in found:
            progress.update(task, description=str(case))
            measured = case.measure(seconds, clock.check)
            for competitor, reason in measured.failures.items():
                console.print(f"failed: {case}, {competitor}: {reason}", markup=False, highlight=False)
            new = case.rows(measured, about["device"])
            writer.writerows(about | row for row in new)
            file.flush()  # what is measured stays, whatever comes
            rows += new
            progress.advance(task)
    return rows


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@click.command()
@click.option(
    "--device",
    "kind",
    type=click.Choice(["cuda", "cpu"]),
    default="cuda",
    help="cpu tries the script.  [default: cuda]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).with_name("results"),
    help="Folder for gpu-DEVICE.csv.  [default: results, beside this script]",
)
@click.option(
    "--only", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, help="Parts, for less than all."
)
@click.option("--seconds", default=0.1, show_default=True, help="To measure every case for, beside its preparation.")
@click.option("--minutes", default=4.2, show_default=True, help="What hasn't begun by then fails.")
@click.option("--floors", "floors_only", is_flag=True, help="Print an H200's floors, which needs no GPU, and no more.")
def main(kind: str, out: Path, parts: tuple[str, ...], seconds: float, minutes: float, floors_only: bool) -> None:
    """Measure polywhiten on a GPU against its bars."""
    if floors_only:
        for line in floors.table(floors.H200):
            click.echo(line)
        return
    device = torch.device(kind)
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no CUDA device: --device cpu tries the script, --floors needs none")
    torch.manual_seed(0)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    clock = Clock(minutes)

    def tell(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    found = cases(device, parts, tell)
    if kind == "cuda":
        processes = processes_for(device)
        tell(f"compiling ahead, in {processes} processes")
        for reason in compile_ahead(device, parts, found, processes):
            tell(f"not compiled: {reason}")
        tell(f"compiled ahead: {clock.seconds:.0f} s")
    out.mkdir(parents=True, exist_ok=True)
    about = {"device": name_of(device), "versions": versions()}
    path = out / f"gpu-{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}.csv"
    rows = measure(found, about, path, seconds, clock, console)
    for table in tables(rows):
        console.print(table)
    tell(f"{about['device']}; {about['versions']}; {clock.seconds:.0f} s; {path}")
    failed = sum(row["failure"] is not None for row in rows)
    if failed:
        raise click.ClickException(
            f"{failed} of {len(rows)} measurements failed: the column failure of {path} says why"
        )


if __name__ == "__main__":
    main()
