"""Kernels for arrays in the memory of the CPU, compiled by Numba for the processor at hand: NumPy's and PyTorch's."""

import os
from functools import cache
from pathlib import Path


def _is_forked() -> bool:
    """Whether the process was forked and has not started a program since, as far as Linux tells: false elsewhere."""
    try:
        status = Path("/proc/self/stat").read_bytes()
    except OSError:
        return False
    flags = int(status.rpartition(b")")[2].split()[6])  # behind the program's name, which may hold spaces
    return bool(flags & _FORKED_WITHOUT_EXEC)


_FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of Linux
# Not empty in a forked process. That can't use the threads that its parent may have had, of OpenMP say: it would wait
# for them forever.
FORKED: list[bool] = [True] if _is_forked() else []
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
