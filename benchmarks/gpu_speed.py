"""Compares polywhiten on a GPU with PyTorch's layers and the papers' algorithms: `python benchmarks/gpu_speed.py`.

Writes all measurements to results/gpu-DEVICE.csv, and prints the ratios that have a bar. `--only` selects parts:

- layers: forward and backward of single layers on ResNet-50's shapes. They run as CUDA graphs, which show the device's
  time, in float32 and bfloat16 and both memory layouts. They run eagerly only in float32 with channels first, because
  the time of Python, which dominates there for small layers, hardly depends on dtype and layout.
- inverse_sqrt: the inverse square root of 32 matrices of 64 x 64, and its gradient.
- cupy: CuPy's forward pass and its pullback, eagerly and as CUDA graphs.
- host: the host's microseconds for small layers, eagerly and by torch.compile (gpu_host.py).
- networks: time and memory of training steps of torchvision's ResNet-50 (gpu_networks.py).

Competitors take turns in one process; the two structures of polywhiten's kernels compete with each other. A
measurement on the device is a number of calls between two events on it. The calls use several input sets in turn, which
are together larger than the device's cache, because layers of a network don't find their input in the cache either.
PyTorch has its default settings, so products of float32 are in full float32; gpu_networks.py changes some. Several
processes compile the kernels before anything is measured.

`--device cpu` tries the script, not the library: it uses tiny shapes, the host's clock, NumPy instead of CuPy, and a
torch.compile that only traces.
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
        with suppress(ImportError, RuntimeError):  # RuntimeError if torchvision was built for another PyTorch
            found.append(import_module(name))
    return ", ".join(f"{module.__name__} {module.__version__}" for module in found)


class Clock:
    """The time since the command began, and its limit."""

    def __init__(self, minutes: float) -> None:
        self._start, self._minutes = time.perf_counter(), minutes

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def check(self) -> None:
        """Raise TimeoutError if the minutes are over."""
        if self.seconds > 60 * self._minutes:
            raise TimeoutError(f"not measured: {self._minutes:g} minutes were over")


def measure(
    found: Sequence[Case], about: dict[str, str], path: Path, seconds: float, clock: Clock, console: Console
) -> list[Row]:
    """Measure all cases, write the rows of each to the file as soon as it is measured, and return all rows."""
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
            file.flush()  # keep the rows even if a later case crashes
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
    help="cpu is for a trial of the script.  [default: cuda]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).with_name("results"),
    help="Folder for gpu-DEVICE.csv.  [default: results, beside this script]",
)
@click.option(
    "--only", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS, help="Parts to measure instead of all."
)
@click.option("--seconds", default=0.1, show_default=True, help="Time to measure every case for, without preparation.")
@click.option("--minutes", default=4.2, show_default=True, help="Measurements that haven't begun by then fail.")
@click.option("--floors", "floors_only", is_flag=True, help="Only print an H200's floors, which needs no GPU.")
def main(kind: str, out: Path, parts: tuple[str, ...], seconds: float, minutes: float, floors_only: bool) -> None:
    """Measure polywhiten on a GPU against its bars."""
    if floors_only:
        for line in floors.table(floors.H200):
            click.echo(line)
        return
    device = torch.device(kind)
    if kind == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no CUDA device, which only --device cpu and --floors do without")
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
        tell(f"compiling in advance, in {processes} processes")
        for reason in compile_ahead(device, parts, found, processes):
            tell(f"not compiled: {reason}")
        tell(f"compiled in advance: {clock.seconds:.0f} s")
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
            f"{failed} of {len(rows)} measurements failed; the column failure of {path} has the reasons"
        )


if __name__ == "__main__":
    main()
