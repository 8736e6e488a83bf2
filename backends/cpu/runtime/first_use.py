"""What users are told while the first use compiles kernels: once a process, and only if it takes long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, Timer

PATIENCE_SECONDS = 1.0  # small kernels take less

logger = logging.getLogger("polywhiten")
_lock = Lock()
_explained: list[bool] = []  # not empty once users know


@contextmanager
def explained(folder: str | None) -> Iterator[Callable[[], None]]:
    """Log what is happening if this `with` statement goes on for long after a call of the function that it returns.

    The folder is where compiled kernels are kept. It is a log record and not a warning, because nobody has to do
    anything: a program that turns warnings into errors should not fail. Without any configuration of `logging`, the
    record is a line on standard error.
    """
    timer = Timer(PATIENCE_SECONDS, _explain, [folder])
    timer.daemon = True
    try:
        yield timer.start
    finally:
        timer.cancel()


def _explain(folder: str | None) -> None:
    with _lock:
        if _explained:
            return
        _explained.append(True)
    if folder:
        then = f"It happens once: they are kept in {folder}. The command `polywhiten compile` does it ahead of time."
    else:
        then = "They can't be kept, so every process does it."
    logger.warning("polywhiten compiles its kernels for this processor, which takes about ten seconds. %s", then)
