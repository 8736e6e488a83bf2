"""A lock that one process at a time holds, and that the system releases when the process ends, however it does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

_NAME = "polywhiten.lock"
_POLL_SECONDS = 0.1


@contextmanager
def folder_lock(folder: str, patience: float) -> Iterator[bool]:
    """Hold the lock of a folder in this `with` statement, and yield whether that is possible.

    It isn't if the folder can't be written to, or other processes hold the lock for more seconds than `patience`.
    """
    try:
        file = (Path(folder) / _NAME).open("ab")
    except OSError:
        yield False
        return
    with file:  # closing it releases the lock
        end = time.monotonic() + patience
        while not (locked := _try(file)) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        yield locked


def _try(file: IO[bytes]) -> bool:
    try:
        if fcntl is None:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds it, or the file system has no locks
        return False
    return True
