"""The CUDA sources beside this file: compiled when first used, by CuPy, which keeps them on disk too."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from typing import Any

import cupy

OPTIONS = ("-std=c++17",)


def source(file: str) -> str:
    """A CUDA source with what it includes; as one text, which is what CuPy's cache goes by."""
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"$', lambda match: source(match[1]), text, flags=re.MULTILINE)


class CudaLauncher:
    """Launches kernels on the current device and stream."""

    def __call__(
        self, file: str, name: str, programs: int, threads: int, arguments: tuple[Any, ...], shared: int = 0
    ) -> None:
        """`programs` CUDA blocks of `threads` threads, with `shared` bytes of dynamic shared memory."""
        device = cupy.cuda.runtime.getDevice()
        for argument in arguments:
            if isinstance(argument, cupy.ndarray) and argument.device.id != device:  # a kernel would crash on it
                raise ValueError(
                    f"an array is on device {argument.device.id}, but device {device} is the current one: "
                    f"use `with cupy.cuda.Device({argument.device.id}):`"
                )
        kernel = _compiled(file, name, device)
        if shared:  # a kernel has to ask for more than 48 KiB in all
            kernel.max_dynamic_shared_size_bytes = shared
        kernel((programs,), (threads,), arguments, shared_mem=shared)

    @property
    def processors(self) -> int:
        """Multiprocessors of the current device."""
        return _attribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount)

    @property
    def shared_memory(self) -> int:
        """Bytes that a program can have on the current device."""
        return _attribute(cupy.cuda.runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin)


@lru_cache(None)
def _compiled(file: str, name: str, device: int) -> Any:
    # for one device, as it belongs to it; and each by itself: of some hundred variants, a program needs ten
    return cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,)).get_function(name)


def _attribute(which: int) -> int:
    return _attribute_of(which, cupy.cuda.runtime.getDevice())


@lru_cache(None)
def _attribute_of(which: int, device: int) -> int:
    value: int = cupy.cuda.runtime.deviceGetAttribute(which, device)
    return value
