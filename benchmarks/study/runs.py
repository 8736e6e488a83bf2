"""Makes the runs of an experiment. Every finished run is a row of a CSV file, and is not made again."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import machine
import torch
from csv_rows import Writer, read
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(frozen=True, kw_only=True)
class Run:
    """The fields of every row in addition to its settings and results."""

    seconds: float
    device: str
    about: str


@dataclass(frozen=True)
class Experiment:
    """An experiment: `plan` makes the settings for a size and a number of seeds, `perform` the results of a run.

    `settings` and `row` are dataclasses; a row has the fields of `settings`, those of `Run`, and the results.
    """

    name: str
    title: str
    settings: type
    row: type
    plan: Callable[[str, int], list[Any]]
    perform: Callable[..., dict[str, Any]]
    needs_pictures: bool = True

    def path(self, folder: Path, size: str) -> Path:
        return folder / f"{self.name}-{size}.csv"

    def settings_of(self, row: Any) -> Any:
        return self.settings(**{field.name: getattr(row, field.name) for field in fields(self.settings)})


def about(device: str) -> str:
    """Describe the machine, what computes on it, and PyTorch's version."""
    name = f"; {torch.cuda.get_device_name()}" if device == "cuda" else f"; {torch.get_num_threads()} in use"
    return f"{machine.description()}{name}; torch {torch.__version__}"


def rows_of(experiment: Experiment, path: Path) -> list[Any]:
    """Return the rows of a file, or none if there is no file. Remove a row that was being written from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return read(path, experiment.row) if end else []


def resume(
    experiment: Experiment,
    wanted: list[Any],
    path: Path,
    perform: Callable[[Any, Callable[[float], None]], dict[str, Any]],
    device: str,
    console: Console,
) -> int:
    """Make the runs that are missing in the file, and return their number."""
    done = {experiment.settings_of(row) for row in rows_of(experiment, path)}
    left = [settings for settings in wanted if settings not in done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    varied = [field.name for field in fields(experiment.settings) if len({getattr(s, field.name) for s in wanted}) > 1]
    writer = Writer(path, experiment.row, append=True)
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            total = progress.add_task(experiment.name, total=len(wanted), completed=len(wanted) - len(left))
            current = progress.add_task("", total=1)
            for settings in left:
                progress.reset(
                    current, total=1, description=", ".join(f"{name} {getattr(settings, name)}" for name in varied)
                )
                start = _now(device)
                results = perform(settings, lambda fraction: progress.update(current, completed=fraction))
                common = {"seconds": round(_now(device) - start, 3), "device": device, "about": about(device)}
                wanted_fields = {field.name: getattr(settings, field.name) for field in fields(experiment.settings)}
                writer.add([experiment.row(**wanted_fields, **results, **common)])
                progress.advance(total)
    finally:
        writer.close()
    return len(left)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
