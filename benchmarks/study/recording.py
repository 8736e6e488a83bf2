"""Keeps what runs report: a row after each epoch, and the progress on the terminal."""

from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from study import checkpoints
from study.experiments import BY_NAME
from study.jobs import Job, Update
from study.runs import Place, Rows, about

SHOWN = ("network", "norm", "group_size", "iterations", "num_groups", "where", "data", "layer", "batch_size", "seed")


class Recorder:
    """Writes the rows of the runs of some jobs, and shows a bar for all of them and one for each that is being made."""

    def __init__(self, rows: dict[str, Rows], jobs: list[Job], place: Place, console: Console) -> None:
        self._rows, self._place, self._console = rows, place, console
        self._about = about(place.device)
        self._left = sum(len(job.settings) for job in jobs)
        self._finished, self._errors = 0, 0
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console)
        self._total = self._progress.add_task("runs", total=self._left)
        self._tasks: dict[Any, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, update: Update) -> None:
        """Write and show what became of a run."""
        self._show(update)
        if update.results is not None:
            self._write(update)
        if update.error is not None:
            self._errors += 1
            self._console.print(f"failed: {described(update)}\n{update.error}", markup=False, highlight=False)

    def summarize(self) -> None:
        """Print how many runs were made. Raise ClickException if some failed."""
        left = self._left - self._finished
        self._console.print(f"{self._finished} runs finished now, {left} left", markup=False, highlight=False)
        if self._errors:
            raise click.ClickException(
                f"{self._errors} runs failed, for the reasons above; the same command tries again"
            )

    def _write(self, update: Update) -> None:
        experiment, rows = BY_NAME[update.experiment], self._rows[update.experiment]
        common = {"device": self._place.device, "about": self._about}
        rows.add(experiment.row(**vars(update.settings), **update.results, **common))
        if rows.finished(update.settings):
            checkpoints.remove(self._place.checkpoint(update.settings))
            self._finished += 1
            self._progress.advance(self._total)

    def _show(self, update: Update) -> None:
        key = update.experiment, update.settings
        if update.ended:
            task = self._tasks.pop(key, None)
            if task is not None:
                self._progress.remove_task(task)
            return
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(described(update), total=100)
        self._progress.update(self._tasks[key], completed=round(100 * update.fraction))


def described(update: Update) -> str:
    values = ((name, getattr(update.settings, name, None)) for name in SHOWN)
    return f"{update.experiment}: " + ", ".join(f"{name} {value}" for name, value in values if value is not None)
