"""Writes and reads CSV files whose rows are dataclasses of strings, numbers, tuples of numbers, and None."""

import csv
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

Row = TypeVar("Row")


class Writer:
    """Writes each row to the file immediately, so that an interrupted run loses none."""

    def __init__(self, path: Path, kind: type, *, append: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not append or not path.exists() or path.stat().st_size == 0
        self._file = path.open("a" if append else "w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, columns(kind))
        if new:
            self._rows.writeheader()
            self._file.flush()

    def add(self, rows: list[Any]) -> None:
        self._rows.writerows({name: _text(getattr(row, name)) for name in self._rows.fieldnames} for row in rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def replace(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Write a whole file anew, such that whoever reads it finds either the old or the new rows."""
    new = path.with_name(f"{path.name}.new")
    writer = Writer(new, kind)
    try:
        writer.add([*rows])
    finally:
        writer.close()
    os.replace(new, path)


def columns(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a file. Raise ValueError if its columns aren't those of `kind`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != columns(kind):
            raise ValueError(f"{path} has other columns than this version writes: measure again")
        return [kind(**{field.name: _parsed(field.type, row[field.name]) for field in fields(kind)}) for row in rows]


def _text(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _parsed(kind: object, text: str) -> object:
    if kind is str:
        return text
    if get_origin(kind) is tuple:
        return tuple(map(get_args(kind)[0], text.split()))
    number = next((t for t in (int, float) if t is kind or t in get_args(kind)), str)
    return number(text) if text else None
