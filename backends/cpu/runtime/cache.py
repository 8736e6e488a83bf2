"""Compiled code, kept on disk for later processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import cfunc, types
from numba.core.caching import FunctionCache

_WORKERS = Path(__file__).with_name("workers.py")


@cache
def kernel_address(kernel: Callable[..., None], dtype: str) -> int:
    """Return the address of the kernel, compiled for arrays and a workspace of that dtype."""
    pointers = types.CPointer(types.int64), types.CPointer(numba.from_dtype(np.dtype(dtype)))
    signature = types.void(*pointers, types.int64, types.int64)  # args, workspace, part, num_parts
    return int(compiled(kernel, dtype, cfunc, signature, error_model="numpy").address)


def compiled(
    function: Callable[..., None], dtype: str, compiler: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """Return the function compiled by `compiler(*args, **options)`, from the cache if it is there.

    Numba finds the folder of the cache. The cache key includes the dtype and a hash of these sources, because Numba
    checks only the function's own file for changes.
    """
    keyed = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    keyed.__qualname__ = f"{function.__name__}_{dtype}_{_sources_hash()}"
    cached_compiler = compiler(*args, cache=True, **options)
    try:
        try:
            return cached_compiler(keyed)
        except OSError:
            raise
        except Exception as error:  # no folder to write to; or a damaged file, whose reading raises anything
            if not (isinstance(error, RuntimeError) and "cannot cache" in str(error)):
                return _recompiled(keyed, cached_compiler, error)
    except OSError as error:  # for instance, the disk is full
        _warn_that_nothing_is_cached(error.strerror or type(error).__name__)
    return compiler(*args, **options)(keyed)


def _recompiled(keyed: FunctionType, cached_compiler: Callable[[FunctionType], Any], error: Exception) -> Any:
    """Return the function compiled anew, and replace its files in the cache, which can't be read."""
    function_cache = FunctionCache(keyed)
    damaged = sorted(map(str, Path(function_cache.cache_path).glob(f"*{keyed.__qualname__}*")))
    function_cache.flush()
    result = cached_compiler(keyed)  # raises again if the function is at fault, and not a file
    warnings.warn(
        f"polywhiten: a compiled kernel could not be read ({error!r}), and has been compiled and written again: "
        f"{', '.join(damaged)}",
        RuntimeWarning,
        stacklevel=2,
    )
    return result


@cache  # as Python's own filter for repeated warnings is reset when Numba changes filters in between
def _warn_that_nothing_is_cached(reason: str) -> None:
    """Warn once, not for every kernel."""
    warnings.warn(
        f"polywhiten: compiled kernels can't be kept ({reason}), and every process will compile them again: make "
        "room, or set NUMBA_CACHE_DIR to a folder that can be written to",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _sources_hash() -> str:
    """Return a hash of all files that compiled code comes from."""
    backend = Path(__file__).parents[1]
    files = [*sorted(backend.glob("device/*.py")), backend / "arguments.py", backend / "tuning.py", _WORKERS]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
