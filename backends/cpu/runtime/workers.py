"""The loops of workers over launches, compiled once: they call kernels by address.

Numba compiles the body of its own parallel loops several times over, which would take a minute for all kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.runtime.cache import compiled_callback, compiled_function

_INT = ir.IntType(64)
_JOB = types.CPointer(types.int64)


class Job(NamedTuple):
    """What all workers of a call have in common.

    In memory, the address of each launch's kernel and the index of its args come after it, and then all args.
    """

    workspace: int  # address of the first worker's
    workspace_stride: int  # bytes from one worker's workspace to the next one's
    num_workers: int
    num_parts: int
    thread_num: int  # addresses of OpenMP's functions
    team_size: int
    barrier: int  # or 0 if a worker needn't wait for the others after each launch
    first_launch: int
    end_launch: int  # after the last one


@device_function
def _job_at(data):
    return Job(data[0], data[1], data[2], data[3], data[4], data[5], data[6], data[7], data[8])


_FIRST_KERNEL = len(Job._fields)


@cache
def in_one_thread() -> Callable[[int], None]:
    """Return the function that runs the job at an address in the calling thread."""

    def alone(data: Any) -> None:
        _run_worker(data, 0)

    function = compiled_callback(alone, "", types.void(_JOB))
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)


@cache
def in_numba_threads() -> Callable[..., None]:
    """Return the function that runs a job in Numba's threads."""

    def loop(data: Any, num_workers: int) -> None:
        for worker in prange(num_workers):
            _run_worker(data, worker)

    signature = types.void(types.int64[::1], types.int64)  # given here, so that the loop is compiled at once
    function: Callable[..., None] = compiled_function(loop, "", signature, parallel=True, nogil=True)
    return function


@cache
def openmp_region() -> int:
    """Return the address of the function that each of OpenMP's threads calls with a job."""

    def region(data: Any) -> None:
        job = _job_at(data)
        first, team_size = _call_for_int(job.thread_num), _call_for_int(job.team_size)
        if job.barrier == 0:
            for worker in range(first, job.num_workers, team_size):  # OpenMP may start fewer threads
                _run_worker(data, worker)
            return
        for launch in range(job.first_launch, job.end_launch):
            for worker in range(first, job.num_workers, team_size):
                _run_part(data, launch, worker, worker)
            _call_barrier(job.barrier)

    return int(compiled_callback(region, "", types.void(_JOB)).address)


@device_function
def _run_worker(data, worker):
    """Run all launches for each of a worker's parts."""
    job = _job_at(data)
    for part in range(worker * job.num_parts // job.num_workers, (worker + 1) * job.num_parts // job.num_workers):
        for launch in range(job.first_launch, job.end_launch):
            _run_part(data, launch, worker, part)


@device_function
def _run_part(data, launch, worker, part):
    job, kernel = _job_at(data), _FIRST_KERNEL + 2 * launch
    workspace = job.workspace + worker * job.workspace_stride
    _call_kernel(data[kernel], _address_of(data, data[kernel + 1]), workspace, part, job.num_parts)


@intrinsic
def _address_of(typingctx: Any, data: Any, index: Any) -> Any:
    """Return the address of an element of a pointer or of a contiguous array."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        data, index = args
        if isinstance(signature.args[0], types.Array):
            data = context.make_array(signature.args[0])(context, builder, data).data
        return builder.ptrtoint(builder.gep(data, [index]), _INT)

    return types.int64(data, types.int64), generate


@intrinsic
def _call_kernel(typingctx: Any, kernel: Any, args: Any, workspace: Any, part: Any, num_parts: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _call(builder, ir.VoidType(), *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _call_for_int(typingctx: Any, function: Any) -> Any:
    """Call a C function without arguments that returns an int."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        return builder.sext(_call(builder, ir.IntType(32), *args), _INT)

    return types.int64(types.int64), generate


@intrinsic
def _call_barrier(typingctx: Any, barrier: Any) -> Any:
    """Wait until every thread of the team calls this."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> Any:
        _call(builder, ir.VoidType(), *args)
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _call(builder: ir.IRBuilder, result: ir.Type, address: ir.Value, *args: ir.Value) -> ir.Value:
    """Call a C function, all of whose arguments are 64 bits wide."""
    function = ir.FunctionType(result, [_INT] * len(args))
    return builder.call(builder.inttoptr(address, function.as_pointer()), args)
