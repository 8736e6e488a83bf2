"""Compile the CUDA sources beside this file when they are first used, and launch their kernels."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from importlib import resources
from typing import Any

import cupy

from polywhiten._types import Array

OPTIONS = ("-std=c++17",)

_MIN_COUNTERS = 1024


def source(file: str) -> str:
    """Return a CUDA source with its includes as one text, because CuPy's cache on disk compares only this text."""
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: source(match[1]), text, flags=re.MULTILINE)


class _Counters(threading.local):
    """The counters of each device and stream. Each thread has its own because each may have its own default stream."""

    def __init__(self) -> None:
        self.of_streams: dict[tuple[int, int], Array] = {}


class CudaLauncher:
    """Launches kernels on the current device and stream."""

    def __init__(self) -> None:
        self._counters = _Counters()

    def __call__(
        self, file: str, name: str, thread_blocks: int, threads: int, args: tuple[Any, ...], shared: int = 0
    ) -> None:
        """Launch `thread_blocks` blocks of `threads` threads, with `shared` bytes of dynamic shared memory each."""
        device = cupy.cuda.runtime.getDevice()
        for arg in args:
            if isinstance(arg, cupy.ndarray) and arg.data.device_id != device:  # a kernel would crash on it
                raise ValueError(
                    f"an array is on device {arg.data.device_id}, but device {device} is the current one: "
                    f"use `with cupy.cuda.Device({arg.data.device_id}):`"
                )
        _compiled(file, name, shared, device)((thread_blocks,), (threads,), args, shared_mem=shared)

    def counters(self, count: int) -> Array:
        """Return at least `count` counters, all 0. Each launch leaves them 0 for the next one on the same stream.

        A CUDA graph gets new counters, which the graph itself sets to 0, because it may be launched on any stream.
        """
        stream = cupy.cuda.get_current_stream()
        if stream.ptr and stream.is_capturing():  # the default stream, 0, can't be captured
            return cupy.zeros(count, dtype=cupy.uint32)
        key = cupy.cuda.runtime.getDevice(), stream.ptr
        counters = self._counters.of_streams.get(key)
        if counters is None or counters.size < count:
            counters = cupy.zeros(max(count, _MIN_COUNTERS), dtype=cupy.uint32)
            self._counters.of_streams[key] = counters
        return counters

    @property
    def multiprocessors(self) -> int:
        """The number of multiprocessors of the current device."""
        return _attribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount)

    @property
    def max_shared_memory(self) -> int:
        """The bytes of shared memory that a thread block can have on the current device."""
        return _attribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin)


@lru_cache(None)
def _compiled(file: str, name: str, shared: int, device: int) -> Any:
    """Return a kernel that may be launched with this much dynamic shared memory."""
    kernel = _compiled_for_any_memory(file, name, device)
    if shared > kernel.max_dynamic_shared_size_bytes:  # more than 48 KiB in all has to be asked for
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


@lru_cache(None)
def _compiled_for_any_memory(file: str, name: str, device: int) -> Any:
    # A kernel belongs to one device. Each is compiled alone, as a process uses about ten of over a hundred variants.
    return cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,)).get_function(name)


def _attribute(which: int) -> int:
    return _attribute_of(which, cupy.cuda.runtime.getDevice())


@lru_cache(None)
def _attribute_of(which: int, device: int) -> int:
    value: int = cupy.cuda.runtime.deviceGetAttribute(which, device)
    return value
