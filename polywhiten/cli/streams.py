"""Standard output and error of the command line, which may be closed, full, or unable to hold a character."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Standard output and error as a program needs them.

    A descriptor that is closed would be given to the next file that is opened, so it is opened here: output that
    can't arrive raises OSError, as on a full disk, and messages that nobody can see are dropped. A character that the
    terminal's encoding lacks is written as its escape. What can't be written in the end is dropped too: Python would
    add lines of its own and end with exit code 120.
    """
    if sys.stdout is None:
        sys.stdout = _null(1, os.O_RDONLY)
    if sys.stderr is None:
        sys.stderr = _null(2, os.O_WRONLY)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error is from the start
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                _redirect(stream.fileno(), os.O_WRONLY)


def complain(message: str) -> None:
    """One line on standard error; where that can't be written to, the exit code has to do."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(message.split()))
    with contextlib.suppress(OSError):
        print(f"polywhiten: {line}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message, whatever was raised."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # a class of someone else's, whose message can't be made
        lines = []
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _null(number: int, flags: int) -> TextIO:
    _redirect(number, flags)
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _redirect(number: int, flags: int) -> None:
    """Make a file descriptor one of the null device."""
    null = os.open(os.devnull, flags)
    if null != number:
        os.dup2(null, number)
        os.close(null)
