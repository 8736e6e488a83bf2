"""The files that keep compiled kernels for later processes, and what happens where they can't be read or written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import CompileResultCacheImpl, FunctionCache

_LOAD_ONLY = ContextVar("_LOAD_ONLY", default=False)


class NotKeptError(LookupError):
    """A kernel isn't kept; the message is its name."""


def _readable(locator: Any) -> Any:
    """Return a class that finds the same folder as one of Numba's, also if it can only be read and has the kernel.

    Numba passes over folders that can't be written to. In a container, `polywhiten compile` may have filled one when
    the image was built. Where the system knows no home of the user, Numba would make a folder called "~".
    """

    class Readable(locator):  # type: ignore[misc]
        def __init__(self, py_func: Any, py_file: str) -> None:
            super().__init__(py_func, py_file)
            self._name = py_func.__qualname__

        def ensure_cache_path(self) -> None:
            if str(self.get_cache_path()).startswith("~"):  # a folder of this name would be made where Python runs
                raise FileNotFoundError("the user has no home")
            try:
                super().ensure_cache_path()
            except OSError:
                if not any(Path(self.get_cache_path()).glob(f"*{self._name}*.nbi")):
                    raise

    return Readable


class _CompiledKernel(CompileResultCacheImpl):  # type: ignore[misc]
    """Numba's search for a folder, which ends at folders that can be read too."""

    _locator_classes = [_readable(locator) for locator in CompileResultCacheImpl._locator_classes]  # noqa: RUF012


class KernelFiles(FunctionCache):  # type: ignore[misc]
    """The files of one kernel, in the first of Numba's folders that can be written to or already has them.

    Compiling always succeeds: a file that can't be read is replaced, and a file that can't be written is left out, both
    with a warning.

    Attributes
    ----------
    compiling_begins : callable
        Is called if the files don't have the kernel, before it is compiled.

    Raises
    ------
    RuntimeError
        There is no such folder.
    """

    _impl_class = _CompiledKernel

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.compiling_begins: Callable[[], None] = lambda: None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled kernel, or None if the files don't have it for this processor."""
        kept = None
        try:
            kept = super().load_overload(sig, target_context)
        except Exception as error:  # reading a damaged file raises anything
            self._remove(error)
        if kept is None:
            if _LOAD_ONLY.get():
                raise NotKeptError(self._py_func.__qualname__)
            self.compiling_begins()
        return kept

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write the compiled kernel, or warn that this is not possible."""
        try:
            super().save_overload(sig, data)
        except OSError as error:  # for instance, the disk is full
            warn_that_nothing_is_kept(error.strerror or type(error).__name__)

    def _remove(self, error: Exception) -> None:
        """Forget the kernel's files, which can't be read."""
        damaged = sorted(map(str, Path(self.cache_path).glob(f"*{self._py_func.__qualname__}*")))
        try:
            self.flush()
        except OSError as full:
            warn_that_nothing_is_kept(full.strerror or type(full).__name__)
            return
        warnings.warn(
            f"polywhiten: a compiled kernel could not be read ({error!r}), and is compiled and written again: "
            f"{', '.join(damaged)}",
            RuntimeWarning,
            stacklevel=2,
        )


def kernel_files(function: Callable[..., Any]) -> KernelFiles | None:
    """Return the files of a kernel; warn and return None if there is no folder for them."""
    try:
        return KernelFiles(function)
    except RuntimeError as error:
        if _LOAD_ONLY.get():
            raise NotKeptError(function.__qualname__) from error
        warn_that_nothing_is_kept("no folder can be written to")
        return None


@contextmanager
def without_compiling() -> Iterator[None]:
    """Raise NotKeptError for a kernel that isn't kept, inside this `with` statement, instead of compiling it."""
    token = _LOAD_ONLY.set(True)
    try:
        yield
    finally:
        _LOAD_ONLY.reset(token)


@cache  # as Python's own filter for repeated warnings is reset when Numba changes filters in between
def warn_that_nothing_is_kept(reason: str) -> None:
    """Warn once, not for every kernel."""
    warnings.warn(
        f"polywhiten: compiled kernels can't be kept ({reason}), and every process will compile them again: make "
        "room, or set NUMBA_CACHE_DIR to a folder that can be written to",
        RuntimeWarning,
        stacklevel=2,
    )
