"""Measures each transform on each task. Every finished one is kept as rows of a CSV file, and isn't measured again."""

import os
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from csv_rows import Writer, read
from rich.console import Console

from embeddings.scores import Score
from embeddings.task import Task
from polywhiten.embeddings.recipe import RankWarning


@dataclass(frozen=True)
class Row:
    """One score of a transform on a task.

    Attributes
    ----------
    task, vectors, fitted_on, setting, metric : str
    rows, dimensions : int
        The shape of the vectors that the transform was fitted on.
    value, low, high : float
        The score and its range: 95 % of the bootstrap's resamples, or from the least to the largest of the splits.
    gain, gain_low, gain_high : float
        The same for the score minus that of the vectors as they are, on the same resamples or splits.
    samples : int
        Queries, pairs or splits.
    seconds : float
        Time for fitting, transforming and scoring.
    """

    task: str
    vectors: str
    fitted_on: str
    rows: int
    dimensions: int
    setting: str
    metric: str
    value: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    samples: int
    seconds: float

    @property
    def case(self) -> tuple[str, str, str, int, str]:
        return self.task, self.vectors, self.fitted_on, self.rows, self.setting


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, or none if there is no file. Remove a row that was being written from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    return read(path, Row) if end else []


def measure(tasks: Iterable[Task], path: Path, console: Console) -> None:
    """Measure what the file lacks."""
    done = {row.case for row in read_rows(path)}
    warnings.simplefilter("ignore", RankWarning)  # fits on few rows are measured on purpose
    writer = Writer(path, Row, append=True)
    try:
        for task in tasks:
            left = [
                s for s in task.settings if (task.name, task.vectors, task.fitted_on, task.rows, s.name) not in done
            ]
            if not left:
                continue
            start = time.perf_counter()
            raw = task.score(task.settings[0])
            for setting in left:
                scores = raw if setting is task.settings[0] else task.score(setting)
                seconds = round(time.perf_counter() - start, 2)
                rows = [row(task, setting.name, name, score, raw[name], seconds) for name, score in scores.items()]
                writer.add(rows)
                console.print(task.name, task.vectors, task.rows, setting.name, round(rows[0].value, 4), f"{seconds} s")
                start = time.perf_counter()
    finally:
        writer.close()


def row(task: Task, setting: str, metric: str, score: Score, raw: Score, seconds: float) -> Row:
    gains = Score(score.value - raw.value, score.replicates - raw.replicates, score.interval, score.samples)
    values = (round(number, 5) for found in (score, gains) for number in (found.value, *_range(found)))
    return Row(
        task.name,
        task.vectors,
        task.fitted_on,
        task.rows,
        task.dimensions,
        setting,
        metric,
        *values,
        samples=score.samples,
        seconds=seconds,
    )


def _range(score: Score) -> tuple[float, float]:
    low, high = np.quantile(score.replicates, score.interval)
    return float(low), float(high)
