"""The rows of results/speed-BACKEND-DEVICE.csv."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import csv_rows
from csv_rows import Writer

SUBJECT = "polywhiten"  # the competitor that all others are compared with


@dataclass(frozen=True)
class Record:
    """The measurement of one competitor on one layer and shape; None stands for what wasn't measured."""

    machine: str
    versions: str
    backend: str
    device: str
    what: str  # iter_norm or group_whiten
    group: int  # channels per group of iter_norm, number of groups of group_whiten
    mode: str  # eager, graph, XLA, jit
    measure: str  # training, evaluation, memory
    shape: str  # NxCxHxW, whatever the layout
    layout: str
    dtype: str
    competitor: str
    median_ms: float | None = None
    lower_quartile_ms: float | None = None
    upper_quartile_ms: float | None = None
    rounds: int | None = None
    gflops: float | None = None  # per second, of the product that the floor is computed with
    peak_bytes: int | None = None
    kept_bytes: int | None = None  # saved for backward in addition to input, output and parameters
    ratio: float | None = None  # polywhiten's median (or peak) divided by this competitor's
    failure: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(int, self.shape.split("x")))

    @property
    def elements(self) -> int:
        return prod(self.sizes)

    @property
    def case(self) -> str:
        return f"{self.shape} {self.layout} {self.group}"


@contextmanager
def written(path: Path | None) -> Iterator[Writer | None]:
    """Open a writer of records and close it at the end, or give None if there is no path."""
    writer = None if path is None else Writer(path, Record)
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


def read(path: Path) -> list[Record]:
    """Return the records of a file. Raise ValueError if it wasn't written by `written`."""
    return csv_rows.read(path, Record)
