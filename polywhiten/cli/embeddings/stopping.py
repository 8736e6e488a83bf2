"""Stop a command by SIGTERM, as schedulers and containers do, in the same way as by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM inside this `with` statement, so that files are cleaned up."""
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield
        return
    earlier = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
