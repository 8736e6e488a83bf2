"""What an experiment is, and its files of rows, one row for each run."""

import hashlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import csv_rows
import machine
import torch

from study.pictures import Source

Progress = tuple[float, dict[str, Any] | None]  # the part of a run that is done, and the results so far


@dataclass(frozen=True, kw_only=True)
class Run:
    """The fields of every row in addition to its settings and results."""

    seconds: float
    device: str
    about: str

    @property
    def finished(self) -> bool:
        """Whether the row has all results. A run that takes epochs has a row after the first one."""
        return True


@dataclass(frozen=True)
class Place:
    """Where runs are made: their pictures, their device, and the folder of their checkpoints, or None to keep none."""

    source: Source
    device: str
    checkpoints: Path | None = None

    def checkpoint(self, settings: Any, name: str = "run") -> Path | None:
        """Return the file that keeps a run with these settings while it isn't finished."""
        if self.checkpoints is None:
            return None
        return self.checkpoints / f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.pt"


@dataclass(frozen=True)
class Experiment:
    """An experiment, as the functions that plan its runs and make one.

    `plan` gets a size and a number of seeds, and returns lists of settings, the most important ones first. `perform`
    yields `Progress`, whose last results are those of the finished run. `settings` and `row` are dataclasses; a row
    has the fields of `settings`, those of `Run`, and the results. Runs with the same `together` are made by one process
    after each other. `seeds` has the default number of seeds by size, where it isn't 3.
    """

    name: str
    title: str
    settings: type
    row: type
    plan: Callable[[str, int], list[list[Any]]]
    perform: Callable[[Any, Place], Iterator[Progress]]
    sizes: tuple[str, ...]
    seeds: dict[str, int]
    together: Callable[[Any], Hashable] = lambda settings: settings
    needs_pictures: bool = True

    def path(self, folder: Path, size: str) -> Path:
        return folder / f"{self.name}-{size}.csv"

    def settings_of(self, row: Any) -> Any:
        return self.settings(**{field.name: getattr(row, field.name) for field in fields(self.settings)})

    def rounds(self, size: str, seeds: int | None) -> list[list[Any]]:
        """Return the plan with the default number of seeds if `seeds` is None, or nothing if there is no such size."""
        return self.plan(size, seeds or self.seeds.get(size, 3)) if size in self.sizes else []

    def wanted(self, size: str, seeds: int | None) -> list[Any]:
        return [settings for part in self.rounds(size, seeds) for settings in part]


class Rows:
    """The rows of an experiment in a folder. Those of all sizes are known, because settings don't name their size."""

    def __init__(self, experiment: Experiment, folder: Path, size: str) -> None:
        self._experiment, self._path = experiment, experiment.path(folder, size)
        self._others, self._own = {}, {}
        for path in sorted(folder.glob(f"{experiment.name}-*.csv")):
            found = {experiment.settings_of(row): row for row in csv_rows.read(path, experiment.row)}
            if path == self._path:
                self._own = found
            else:
                self._others |= found

    def get(self, settings: Any) -> Any | None:
        """Return the row of a run, or None if there is none."""
        return self._own.get(settings, self._others.get(settings))

    def finished(self, settings: Any) -> bool:
        return any(rows[settings].finished for rows in (self._own, self._others) if settings in rows)

    @property
    def seeds(self) -> int:
        """The number of seeds of the rows, 1 if there are none."""
        return 1 + max(
            (getattr(row, "seed", 0) for rows in (self._own, self._others) for row in rows.values()), default=0
        )

    def add(self, row: Any) -> None:
        """Add or replace the row of a run. The file is replaced as a whole, so it is complete at any time."""
        self._own[self._experiment.settings_of(row)] = row
        csv_rows.replace(self._path, self._experiment.row, self._own.values())


def about(device: str) -> str:
    """Describe the machine, what computes on it, and PyTorch's version."""
    name = f"; {torch.cuda.get_device_name()}" if device == "cuda" else f"; {torch.get_num_threads()} in use"
    return f"{machine.description()}{name}; torch {torch.__version__}"
