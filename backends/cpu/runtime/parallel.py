"""Launches of compiled kernels in parallel, in OpenMP's threads or in Numba's."""

from __future__ import annotations

import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

from polywhiten.cpu.arguments import pack
from polywhiten.cpu.runtime import workers
from polywhiten.cpu.runtime.cache import kernel_address
from polywhiten.cpu.runtime.fork import FORKED
from polywhiten.cpu.runtime.openmp import loaded_openmp


class Launch(NamedTuple):
    """A kernel, its args, and the arrays whose addresses are among these, which stay alive until the kernel has run."""

    kernel: Callable[..., None]
    args: Any  # a `NamedTuple` of `polywhiten.cpu.arguments`
    arrays: Sequence[Any] = ()


def launch(
    launches: Sequence[Launch], num_workers: int, workspace: np.ndarray[Any, Any], num_parts: int | None = None
) -> None:
    """Call the kernel of each launch for every part of the work, as kernel(args, workspace, part, num_parts).

    Args and workspace are pointers; each worker has a row of the workspace. With `num_parts`, a worker takes adjacent
    parts, and runs all launches on one part before it goes on to the next. Without, every worker has one part, and all
    workers end a launch before any begins the next.
    """
    openmp = None if FORKED or num_workers == 1 else loaded_openmp()
    waits = num_parts is None
    if waits and num_workers > 1 and openmp is None:
        for each in launches:
            launch([each], num_workers, workspace, num_workers)
        return
    job = workers.Job(
        workspace=address(workspace),
        workspace_stride=workspace.strides[0],
        num_workers=1 if FORKED else num_workers,
        num_parts=num_workers if num_parts is None else num_parts,
        thread_num=openmp.thread_num if openmp else 0,
        team_size=openmp.team_size if openmp else 0,
        barrier=openmp.barrier if openmp and waits else 0,
        num_launches=len(launches),
    )
    dtype = workspace.dtype.char
    data = workers.packed(job, [(kernel_address(each.kernel, dtype), pack(each.args)) for each in launches])
    if job.num_workers == 1:
        workers.in_one_thread()(data.buffer_info()[0])
    elif openmp:
        openmp.parallel(workers.openmp_region(), data.buffer_info()[0], num_workers, 0)
    else:
        _run_in_numba_threads(data, num_workers)


def num_threads() -> int:
    """Return how many threads whiten NumPy's arrays: as many as Numba has, or PyTorch if it is loaded and has fewer.

    PyTorch has one in the worker processes of a `DataLoader`, which share the cores.
    """
    if FORKED:
        return 1
    num_torch_threads = _num_torch_threads()
    if num_torch_threads == 1:
        return 1
    _start_numba_threads()
    num_numba_threads = int(numba.get_num_threads())
    return num_numba_threads if num_torch_threads is None else min(num_numba_threads, num_torch_threads)


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
