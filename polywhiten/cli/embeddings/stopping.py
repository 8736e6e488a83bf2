"""Stop a command by SIGTERM or SIGHUP, as schedulers and lost terminals do, in the same way as by Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks one


@contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt for these signals inside this `with` statement, so that files are cleaned up.

    A signal that is ignored, as nohup does with SIGHUP, stays so.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone can handle signals
        yield
        return
    heeded = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, _interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
