"""Write to standard output and error, which may be closed, full, or unable to encode a character."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

# The exit codes of commands: for arguments and files that don't fit, and after Ctrl-C, as shells report it.
WRONG_USE = 2
STOPPED = 130


@contextlib.contextmanager
def usable_streams() -> Iterator[None]:
    """Make standard output and error usable inside this `with` statement.

    The next file that is opened would get the descriptor of a closed stream. So closed streams are opened: writing to
    standard output then raises OSError, as on a full disk, and messages on standard error are dropped. A character that
    the terminal's encoding lacks is written as its escape sequence. Output that can't be flushed at the end is dropped
    too, because Python would add messages and end with exit code 120.
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
    """Write one line to standard error, or nothing if that can't be written to; the exit code then has to suffice."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(message.split()))
    with contextlib.suppress(OSError):
        print(f"polywhiten: {line}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # another library's class may fail to make its message
        lines = []
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _null(number: int, flags: int) -> TextIO:
    _redirect(number, flags)
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _redirect(number: int, flags: int) -> None:
    """Let a file descriptor refer to the null device."""
    null = os.open(os.devnull, flags)
    if null != number:
        os.dup2(null, number)
        os.close(null)
