"""The OpenMP library that the process has already loaded, as PyTorch does on Linux.

Its idle threads spin, so a second pool such as Numba's would compete for the same cores.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, NamedTuple

_PROCESS: Any = ctypes.CDLL(None) if sys.platform == "linux" else None  # has all symbols that are loaded globally


class OpenMP(NamedTuple):
    """Entry points of GNU's OpenMP library, or of one that is compatible with it."""

    parallel: Any  # calls a function in threads: (function, address of its data, number of threads, flags)
    thread_num: int  # address of the function that returns the number of the calling thread
    team_size: int  # address of the function that returns the number of threads in the team
    barrier: int  # address of the function that waits until all threads of the team call it


def loaded_openmp() -> OpenMP | None:
    """Return the entry points if the library is loaded. It may be loaded later, so only success is remembered."""
    try:
        return _entry_points()
    except AttributeError:  # not loaded, or not on Linux
        return None


@cache
def _entry_points() -> OpenMP:
    parallel = _PROCESS.GOMP_parallel
    parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    functions = _PROCESS.omp_get_thread_num, _PROCESS.omp_get_num_threads, _PROCESS.GOMP_barrier
    return OpenMP(parallel, *(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))
