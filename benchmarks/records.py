"""What a measurement gave, as a row of results/speed-BACKEND-DEVICE.csv."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import get_args

SUBJECT = "polywhiten"  # the competitor that all others are compared with


@dataclass(frozen=True)
class Record:
    """One competitor on one layer and shape; None is what wasn't measured."""

    machine: str
    versions: str
    backend: str
    device: str
    what: str  # iter_norm or group_whiten
    group: int  # channels in a group, or groups
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
    gflops: float | None = None  # a second, of the product that the floor is of
    peak_bytes: int | None = None
    kept_bytes: int | None = None  # for backward, beside input, output and parameters
    ratio: float | None = None  # polywhiten's median, or peak, over this one's
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


FIELDS = [field.name for field in fields(Record)]


class Writer:
    """Rows as they come; an interrupted run keeps what it has."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, FIELDS)
        self._rows.writeheader()

    def add(self, records: list[Record]) -> None:
        self._rows.writerows(asdict(record) for record in records)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextmanager
def written(path: Path | None) -> Iterator[Writer | None]:
    """A writer that is closed in the end; None for no path."""
    writer = None if path is None else Writer(path)
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


def read(path: Path) -> list[Record]:
    """The rows of a file; ValueError where it isn't one of `Writer`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != FIELDS:
            raise ValueError(f"{path} has other columns than benchmarks/speed.py writes: measure again")
        return [
            Record(**{field.name: _parsed(field.type, row[field.name]) for field in fields(Record)}) for row in rows
        ]


def _parsed(kind: object, text: str) -> object:
    if kind is str:
        return text
    number = next((t for t in (int, float) if t is kind or t in get_args(kind)), str)
    return number(text) if text else None
