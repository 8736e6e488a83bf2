"""Launches of compiled kernels in parallel, in OpenMP's threads or in Numba's."""

from __future__ import annotations

import sys
import threading
from array import array
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numba
import numpy as np

from polywhiten.cpu.runtime import workers
from polywhiten.cpu.runtime.fork import FORKED
from polywhiten.cpu.runtime.openmp import loaded_openmp

_NUM_WORKERS, _THREAD_NUM, _TEAM_SIZE, _BARRIER, _FIRST_LAUNCH, _END_LAUNCH = map(
    workers.Job._fields.index,
    ("num_workers", "thread_num", "team_size", "barrier", "first_launch", "end_launch"),
)


def run(data: array[int], num_workers: int, waits: bool) -> None:
    """Run a job, see `workers.Job`, that is complete but for OpenMP's functions.

    If it waits, every worker has one part, and all workers end a launch before any begins the next. Otherwise a worker
    takes adjacent parts, and runs all launches on one part before it goes on to the next.
    """
    openmp = None if FORKED or num_workers == 1 else loaded_openmp()
    if openmp:
        data[_THREAD_NUM], data[_TEAM_SIZE] = openmp.thread_num, openmp.team_size
        data[_BARRIER] = openmp.barrier if waits else 0
        openmp.parallel(workers.openmp_region(), data.buffer_info()[0], num_workers, 0)
        return
    separately = waits and num_workers > 1
    if FORKED:
        num_workers = data[_NUM_WORKERS] = 1
    end = data[_END_LAUNCH]
    for first in range(end) if separately else [0]:
        data[_FIRST_LAUNCH], data[_END_LAUNCH] = first, first + 1 if separately else end
        if num_workers == 1:
            workers.in_one_thread()(data.buffer_info()[0])
        else:
            _run_in_numba_threads(data, num_workers)


def num_threads() -> int:
    """Return how many threads whiten NumPy's arrays: as many as Numba has, or PyTorch if it is loaded and has fewer.

    PyTorch has one in the worker processes of a `DataLoader`, which share the cores.
    """
    most = max_threads()
    if most == 1:
        return 1
    _start_numba_threads()
    return min(most, int(numba.get_num_threads()))


def max_threads() -> int:
    """Return how many threads `num_threads` may return, without starting any."""
    if FORKED:
        return 1
    num_torch_threads, most = _num_torch_threads(), int(numba.config.NUMBA_NUM_THREADS)
    return most if num_torch_threads is None else min(most, num_torch_threads)


def address(array: np.ndarray[Any, Any]) -> int:
    """Return the address of the array's first element."""
    return int(array.__array_interface__["data"][0])


def _run_in_numba_threads(data: array[int], num_workers: int) -> None:
    _start_numba_threads()
    before = numba.get_num_threads()
    if before != num_workers:
        numba.set_num_threads(num_workers)
    try:
        with _numba_threads_lock():
            workers.in_numba_threads()(np.frombuffer(data, np.int64), num_workers)
    finally:
        if before != num_workers:
            numba.set_num_threads(before)


@cache
def _numba_threads_lock() -> AbstractContextManager[object]:
    """Return a lock if Numba's threads serve one caller at a time, as its own do without OpenMP and TBB."""
    return _LOCK if numba.threading_layer() == "workqueue" else nullcontext()


_LOCK = threading.Lock()


@cache
def _start_numba_threads() -> None:
    """Start Numba's threads, and leave PyTorch as many as it had: both may be OpenMP's, which has one number."""
    before = _num_torch_threads()
    numba.set_num_threads(numba.get_num_threads())
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


def _num_torch_threads() -> int | None:
    """Return how many threads PyTorch has, or None if it isn't loaded, or not yet completely."""
    get_num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return None if get_num_threads is None else int(get_num_threads())
