"""Compiled kernels in parallel: a kernel is compiled once, and a loop over its workers calls it by its address.

Numba compiles what is inside of its own parallel loops several times over, which would take a minute for all kernels.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from polywhiten.cpu import FORKED
from polywhiten.cpu.arguments import pack

_INT = ir.IntType(64)
_NUMBERS = types.CPointer(types.int64)
_LOOP = types.void(types.int64[::1], types.int64)  # named here, for the loop to be compiled at once


class Step(NamedTuple):
    """A kernel, the numbers that it is called with, and the arrays whose addresses are among them."""

    kernel: Callable[..., None]
    args: Any  # a `NamedTuple` of `polywhiten.cpu.arguments`
    arrays: Sequence[Any] = ()


def run(steps: Sequence[Step], workers: int, scratch: np.ndarray[Any, Any], shares: int | None = None) -> None:
    """Call the steps' kernels for every share of the work: kernel(args, scratch, part, num_parts).

    A worker takes adjacent shares, and all steps of a share follow each other. Without their number every worker has
    one, and a step begins when all workers have ended the one before. Workers have scratch memory of their own.
    Args and memory are pointers.
    """
    openmp = None if FORKED else _openmp()
    if shares is None and workers > 1 and openmp is None:
        for step in steps:
            run([step], workers, scratch, workers)
        return
    functions = (openmp.thread, openmp.threads, openmp.barrier if shares is None else 0) if openmp else (0, 0, 0)
    shares = workers if shares is None else shares
    if FORKED:
        workers = 1
    data = array("q", (address(scratch), scratch.strides[0], workers, shares, *functions, len(steps)))
    numbers = [array("q", pack(step.args)) for step in steps]
    for step, given in zip(steps, numbers, strict=True):
        data.extend((_compiled(step.kernel, scratch.dtype.char), given.buffer_info()[0]))
    if workers == 1:
        _in_one_thread()(data.buffer_info()[0])
        return
    if openmp is not None:
        openmp.parallel(_region(), data.buffer_info()[0], workers, 0)
        return
    _start_threads()
    before = numba.get_num_threads()
    if before != workers:
        numba.set_num_threads(workers)
    try:
        with _alone():
            _in_parallel()(np.frombuffer(data, np.int64), workers)
    finally:
        if before != workers:
            numba.set_num_threads(before)


def threads() -> int:
    """How many NumPy's arrays are whitened by: Numba's number, or PyTorch's where it is loaded and has fewer.

    PyTorch has one in the processes of its `DataLoader`, which share the cores.
    """
    if FORKED:
        return 1
    most = _torch_threads()
    if most == 1:
        return 1
    _start_threads()
    number = int(numba.get_num_threads())
    return number if most is None else min(number, most)


def address(numbers: np.ndarray[Any, Any]) -> int:
    """Of its first number."""
    return int(numbers.__array_interface__["data"][0])


class _OpenMP(NamedTuple):
    parallel: Any  # of a function, the address of its data, a number of threads, and flags
    thread: int  # address of the function that says which thread is calling
    threads: int  # and of how many
    barrier: int  # of that which waits for all of them


def _openmp() -> _OpenMP | None:
    """The OpenMP that is there for all of the process, as PyTorch's is on Linux.

    Its threads wait actively for their next work, in the way of any others, as those that Numba brings along.
    """
    if not _FOUND and _PROCESS is not None:
        with suppress(AttributeError):
            functions = _PROCESS.omp_get_thread_num, _PROCESS.omp_get_num_threads, _PROCESS.GOMP_barrier
            parallel = _PROCESS.GOMP_parallel
            parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
            parallel.restype = None
            _FOUND.append(_OpenMP(parallel, *(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)))
    return _FOUND[0] if _FOUND else None


_PROCESS = ctypes.CDLL(None) if sys.platform == "linux" else None  # what is there for all of it
_FOUND: list[_OpenMP] = []
_LOCK = threading.Lock()


@cache
def _alone() -> AbstractContextManager[object]:
    """Numba's own threads, which it has where there is neither OpenMP nor TBB, serve one caller at a time."""
    return _LOCK if numba.threading_layer() == "workqueue" else nullcontext()


@cache
def _start_threads() -> None:
    """Leave PyTorch as many threads as it had: Numba's may be OpenMP's, whose number PyTorch shares."""
    before = _torch_threads()
    numba.set_num_threads(numba.get_num_threads())  # which starts them
    if before is not None:
        sys.modules["torch"].set_num_threads(before)


def _torch_threads() -> int | None:
    """How many PyTorch has; None where it isn't loaded, or not yet to where it can tell."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)
    return None if count is None else int(count())


@cache
def _compiled(kernel: Callable[..., None], dtype: str) -> int:
    """Its address, for scratch memory and arrays of that dtype."""
    signature = types.void(_NUMBERS, types.CPointer(numba.from_dtype(np.dtype(dtype))), types.int64, types.int64)
    return int(_kept(kernel, dtype, cfunc, signature, error_model="numpy").address)


def _kept(function: Callable[..., None], dtype: str, compiler: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Compiled, for later processes too where Numba finds a folder that it may write to.

    By a name of its own for each dtype and each version of these files: Numba tells by a function's own file alone
    whether what it kept is out of date.
    """
    named = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    named.__qualname__ = f"{function.__name__}_{dtype}_{_version()}"
    keep = compiler(*args, cache=True, **options)
    try:
        try:
            return keep(named)
        except OSError:
            raise
        except (
            Exception
        ) as error:  # no folder to write to; or a damaged file, which raises what it will when it is read
            if not (isinstance(error, RuntimeError) and "cannot cache" in str(error)):
                return _replaced(named, keep, error)
    except OSError as error:  # the disk is full, say
        _warn_of_nothing_kept(error.strerror or type(error).__name__)
    return compiler(*args, **options)(named)


def _replaced(named: FunctionType, keep: Callable[[FunctionType], Any], error: Exception) -> Any:
    """A function compiled anew, in place of files that can't be read."""
    kept = FunctionCache(named)
    damaged = sorted(map(str, Path(kept.cache_path).glob(f"*{named.__qualname__}*")))
    kept.flush()
    compiled = keep(named)  # what is wrong with the function itself, and not with a file, is raised here again
    warnings.warn(
        f"polywhiten: a compiled kernel could not be read ({error!r}), and has been compiled and written again: "
        f"{', '.join(damaged)}",
        RuntimeWarning,
        stacklevel=2,
    )
    return compiled


@cache  # Numba changes Python's filters meanwhile, which then show a warning again
def _warn_of_nothing_kept(reason: str) -> None:
    """Once for all kernels."""
    warnings.warn(
        f"polywhiten: compiled kernels can't be kept ({reason}), and every process will compile them again: make "
        "room, or set NUMBA_CACHE_DIR to a folder that can be written to",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _version() -> str:
    """Of the compiled functions' files."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@njit
def _work(data, worker):
    """All steps of one worker's shares of what `run` describes."""
    for share in range(worker * data[3] // data[2], (worker + 1) * data[3] // data[2]):
        for step in range(data[7]):
            _take(data, step, worker, share)


@njit
def _take(data, step, worker, share):
    _call(data[8 + 2 * step], data[9 + 2 * step], data[0] + worker * data[1], share, data[3])


@cache
def _in_one_thread() -> Callable[[int], None]:
    """Of the address of what `run` describes."""

    def alone(data: Any) -> None:
        _work(data, 0)

    compiled = _kept(alone, "", cfunc, types.void(_NUMBERS))
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


@cache
def _in_parallel() -> Callable[..., None]:
    """Of what `run` describes, and the number of workers."""

    def loop(data: Any, workers: int) -> None:
        for worker in prange(workers):
            _work(data, worker)

    compiled: Callable[..., None] = _kept(loop, "", njit, _LOOP, parallel=True, nogil=True)
    return compiled


@cache
def _region() -> int:
    """Address of what each of OpenMP's threads calls."""

    def region(data: Any) -> None:
        first, threads, workers, barrier = _ask(data[4]), _ask(data[5]), data[2], data[6]
        if barrier == 0:
            for worker in range(first, workers, threads):  # OpenMP may give fewer threads
                _work(data, worker)
            return
        for step in range(data[7]):
            for worker in range(first, workers, threads):
                _take(data, step, worker, worker)
            _wait(barrier)

    return int(_kept(region, "", cfunc, types.void(_NUMBERS)).address)


@intrinsic
def _call(typingctx: Any, function: Any, args: Any, scratch: Any, part: Any, num_parts: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _ask(typingctx: Any, function: Any) -> Any:
    """What a function of C without arguments gives."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), _INT)

    return types.int64(types.int64), generate


@intrinsic
def _wait(typingctx: Any, function: Any) -> Any:
    """Until every thread does so."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate
