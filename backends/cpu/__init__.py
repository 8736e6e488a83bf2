"""Kernels for arrays in the memory of the CPU, compiled by Numba for the processor at hand: NumPy's and PyTorch's."""

import os
import sys
import threading
from functools import cache
from pathlib import Path

_STAT = Path("/proc/self/stat")  # what Linux says of this process
_FORKED_WITHOUT_EXEC = 0x40  # the kernel's PF_FORKNOEXEC


def _is_forked() -> bool:
    """Whether this process was forked, as far as can be found out afterwards; in doubt it was, which costs only speed.

    Processes that start Python anew, as multiprocessing's spawned ones do, weren't.
    """
    if not hasattr(os, "fork"):
        return False
    try:
        flags = int(_STAT.read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, IndexError, ValueError):
        flags = 0
    if flags:
        return bool(flags & _FORKED_WITHOUT_EXEC)
    if sys.platform == "linux" and threading.main_thread().native_id != os.getpid():  # it is still the parent's
        return True
    processes = sys.modules.get("multiprocessing.process")  # where multiprocessing started this one, it is there
    return (
        processes is not None
        and processes.parent_process() is not None
        and "--multiprocessing-fork" not in sys.orig_argv  # which, in spite of its name, is for those that are spawned
    )


# Not empty in a forked process: it can't use the threads that its parent may have had, and waits for them forever.
FORKED: list[bool] = [True] * _is_forked()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: FORKED.append(True))


@cache
def is_available() -> bool:
    """Whether Numba is there, for this version of NumPy."""
    try:
        import numba  # noqa: F401
    except Exception:  # a broken one raises what it will, and plain kernels need none of it
        return False
    return True
