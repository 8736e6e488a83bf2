"""The CUDA sources beside this file: compiled when first used, by CuPy, which keeps them on disk too."""

from __future__ import annotations

import re
import threading
from functools import lru_cache
from importlib import resources
from typing import Any

import cupy

from polywhiten._types import Array

OPTIONS = ("-std=c++17",)

_FEWEST_COUNTERS = 1024


def source(file: str) -> str:
    """A CUDA source with what it includes; as one text, which is what CuPy's cache goes by."""
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: source(match[1]), text, flags=re.MULTILINE)


class _Counters(threading.local):
    """By device and stream: of each thread, as the default stream can be its own."""

    def __init__(self) -> None:
        self.of_streams: dict[tuple[int, int], Array] = {}


class CudaLauncher:
    """Launches kernels on the current device and stream."""

    def __init__(self) -> None:
        self._counters = _Counters()

    def __call__(
        self, file: str, name: str, programs: int, threads: int, arguments: tuple[Any, ...], shared: int = 0
    ) -> None:
        """`programs` CUDA blocks of `threads` threads, with `shared` bytes of dynamic shared memory."""
        device = cupy.cuda.runtime.getDevice()
        for argument in arguments:
            if isinstance(argument, cupy.ndarray) and argument.data.device_id != device:  # a kernel would crash on it
                raise ValueError(
                    f"an array is on device {argument.data.device_id}, but device {device} is the current one: "
                    f"use `with cupy.cuda.Device({argument.data.device_id}):`"
                )
        _compiled(file, name, shared, device)((programs,), (threads,), arguments, shared_mem=shared)

    def counters(self, count: int) -> Array:
        """Those of the current stream, whose launches come one after the other: they leave them 0.

        A graph gets its own, which it sets to 0 itself: it may be launched on any stream.
        """
        stream = cupy.cuda.get_current_stream()
        if stream.ptr and stream.is_capturing():  # the default stream, 0, can't be captured
            return cupy.zeros(count, dtype=cupy.uint32)
        key = cupy.cuda.runtime.getDevice(), stream.ptr
        kept = self._counters.of_streams.get(key)
        if kept is None or kept.size < count:
            kept = cupy.zeros(max(count, _FEWEST_COUNTERS), dtype=cupy.uint32)
            self._counters.of_streams[key] = kept
        return kept

    @property
    def processors(self) -> int:
        """Multiprocessors of the current device."""
        return _attribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount)

    @property
    def shared_memory(self) -> int:
        """Bytes that a program can have on the current device."""
        return _attribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin)


@lru_cache(None)
def _compiled(file: str, name: str, shared: int, device: int) -> Any:
    """A kernel that may have so much dynamic shared memory."""
    kernel = _compiled_for_any_memory(file, name, device)
    if shared > kernel.max_dynamic_shared_size_bytes:  # it has to ask for more than 48 KiB in all
        kernel.max_dynamic_shared_size_bytes = shared
    return kernel


@lru_cache(None)
def _compiled_for_any_memory(file: str, name: str, device: int) -> Any:
    # for one device, as it belongs to it; and each by itself: of some hundred variants, a program needs ten
    return cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,)).get_function(name)


def _attribute(which: int) -> int:
    return _attribute_of(which, cupy.cuda.runtime.getDevice())


@lru_cache(None)
def _attribute_of(which: int, device: int) -> int:
    value: int = cupy.cuda.runtime.deviceGetAttribute(which, device)
    return value
