"""The progress of a pass over rows: a bar on a terminal, else a line from time to time."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich import progress
from rich.console import Console

from polywhiten.cli.streams import complain

LINE_SECONDS = 10.0  # between lines where standard error is not a terminal


class RowProgress:
    """Show how many rows are done, how many a second, and how long the others take, on standard error.

    Parameters
    ----------
    action : str
        What is done, such as "fit".
    total : int
        Number of rows.
    done : int
        How many of them an earlier run has done.
    quiet : bool
        Whether nothing is shown.
    """

    def __init__(self, action: str, total: int, done: int = 0, *, quiet: bool = False) -> None:
        self._action, self._total, self._done, self._first = action, total, done, done
        self._shows_lines = not quiet and not sys.stderr.isatty()
        self._start = self._last_line = time.monotonic()
        hidden = quiet or self._shows_lines
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
            progress.TextColumn("{task.fields[rate]:,.0f} rows/s"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True, quiet=hidden),
            transient=True,
            disable=hidden,
        )
        self._task = self._bar.add_task(action, total=total, completed=done, rate=0.0)

    def __enter__(self) -> RowProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def rate(self) -> float:
        """Rows a second since the start."""
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)

    @property
    def summary(self) -> str:
        """The time since the start, with the rate."""
        return f"{time.monotonic() - self._start:.1f} s ({self.rate:,.0f} rows/s)"

    def advance(self, rows: int) -> None:
        """Count rows as done."""
        self._done += rows
        self._bar.update(self._task, completed=self._done, rate=self.rate)
        now = time.monotonic()
        if self._shows_lines and now - self._last_line >= LINE_SECONDS and self._done < self._total:
            self._last_line = now
            left = (self._total - self._done) / max(self.rate, 1e-9)
            complain(
                f"{self._action}: {self._done:,} of {self._total:,} rows, {self.rate:,.0f} rows/s, {left:,.0f} s left"
            )
