"""Kernels compiled for a dtype, from the files of an earlier process if there are any."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.core.ccallback import CFunc

from polywhiten.cpu.runtime.first_use import explained
from polywhiten.cpu.runtime.kernel_files import NotKeptError, kernel_files, without_compiling

_WORKERS = Path(__file__).with_name("workers.py")


@cache
def kernel_address(kernel: Callable[..., None], dtype: str) -> int:
    """Return the address of the kernel, compiled for arrays and a workspace of that dtype."""
    pointers = types.CPointer(types.int64), types.CPointer(numba.from_dtype(np.dtype(dtype)))
    signature = types.void(*pointers, types.int64, types.int64)  # args, workspace, part, num_parts
    return int(compiled_callback(kernel, dtype, signature, error_model="numpy").address)


def kernel_folder(kernel: Callable[..., None], dtype: str) -> str | None:
    """Return the folder that keeps the kernel, or None if it isn't kept and no folder can be written to."""
    try:
        with without_compiling():
            files = kernel_files(_keyed(kernel, dtype))
    except NotKeptError:
        return None
    return files and str(files.cache_path)


def compiled_callback(function: Callable[..., None], dtype: str, signature: Any, **options: Any) -> Any:
    """Return the function compiled as a C function, which has an address."""
    function = _keyed(function, dtype)
    callback = CFunc(function, (signature.args, signature.return_type), locals={}, options=options)
    return _compiled(callback, function, callback.compile)


def compiled_function(function: Callable[..., None], dtype: str, signature: Any, **options: Any) -> Any:
    """Return the function compiled for calls from Python."""
    function = _keyed(function, dtype)
    dispatcher = njit(**options)(function)
    return _compiled(dispatcher, function, lambda: dispatcher.compile(signature))


def _compiled(kernel: Any, function: Callable[..., None], compile_now: Callable[[], object]) -> Any:
    """Compile the kernel, or load its files; Numba's own classes for these stop at files that can't be written."""
    files = kernel_files(function)
    with explained(files and files.cache_path) as begins:
        if files is None:
            begins()
        else:
            files.compiling_begins, kernel._cache = begins, files
        compile_now()
    return kernel


def _keyed(function: Callable[..., None], dtype: str) -> Callable[..., None]:
    """Return the function under a name of its own for each dtype and each version of these sources.

    The cache key includes the dtype and a hash of these sources, because Numba checks only the function's own file for
    changes.
    """
    keyed = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    keyed.__qualname__ = f"{function.__name__}_{dtype}_{_sources_hash()}"
    return keyed


@cache
def _sources_hash() -> str:
    """Return a hash of all files that compiled code comes from."""
    backend = Path(__file__).parents[1]
    files = [*sorted(backend.glob("device/*.py")), backend / "arguments.py", backend / "tuning.py", _WORKERS]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
