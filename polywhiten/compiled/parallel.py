"""Compiled kernels in parallel: a kernel is compiled once, and a loop over its workers calls it by its address.

Numba compiles what is inside of its own parallel loops several times over, which would take a minute for all kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.extending import intrinsic

_INT = ir.IntType(64)
_NUMBERS = types.CPointer(types.int64)


def run(kernel: Callable[..., None], workers: int, scratch: np.ndarray[Any, Any], *numbers: int | float) -> None:
    """Call kernel(numbers, scratch, worker) for every worker; numbers and its own scratch memory are pointers."""
    integers = np.array([0 if isinstance(n, float) else n for n in numbers], np.int64)
    for i, n in enumerate(numbers):
        if isinstance(n, float):
            integers.view(np.float64)[i] = n
    address = _compiled(kernel, str(scratch.dtype))
    before = numba.get_num_threads()
    numba.set_num_threads(workers)
    try:
        _in_parallel(address, integers.ctypes.data, scratch.ctypes.data, scratch.strides[0], workers)
    finally:
        numba.set_num_threads(before)


@cache
def _compiled(kernel: Callable[..., None], dtype: str) -> int:
    """Its address, for scratch memory and arrays of that dtype."""
    signature = types.void(_NUMBERS, types.CPointer(getattr(types, dtype)), types.int64)
    return int(cfunc(signature, cache=True, error_model="numpy")(kernel).address)


@njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _in_parallel(function: int, numbers: int, scratch: int, distance: int, workers: int) -> None:
    for worker in prange(workers):
        _call(function, numbers, scratch + worker * distance, worker)


@intrinsic  # type: ignore[untyped-decorator]
def _call(typingctx: Any, function: Any, numbers: Any, scratch: Any, worker: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT] * 3)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic  # type: ignore[untyped-decorator]
def real(typingctx: Any, numbers: Any, index: Any) -> Any:
    """One of a kernel's numbers that is no integer."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        place = builder.gep(args[0], [args[1]])
        return builder.load(builder.bitcast(place, ir.DoubleType().as_pointer()))

    return types.float64(numbers, types.int64), generate
