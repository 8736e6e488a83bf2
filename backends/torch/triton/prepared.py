"""Launches that don't go through all of Triton's dispatch each time, which takes longer than many a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

# Versions whose sources say: `kernel[grid](...)` returns the compiled kernel, whose own `[grid]` takes all arguments in
# their order, with addresses for tensors, and the stream.
_KNOWN = {(3, minor) for minor in range(3, 10)}
IS_KNOWN = tuple(map(int, triton.__version__.split(".")[:2])) in _KNOWN
_ALIGNMENT = 16  # bytes; Triton compiles other kernels for pointers that aren't so aligned

Pointer = Tensor | tuple[Tensor, int] | None  # a tensor's memory, or from an element on


class PreparedLaunch:
    """A launch of which all is known but the tensors, which have always the same dtypes and lie on the same device.

    The first launch is Triton's own; what it compiled is then launched without asking again what it is to be
    specialized for. Where a pointer isn't aligned, or Triton's version isn't one that this is known to work with, every
    launch is Triton's own.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: Sequence[float | None],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, tuple(numbers)
        self._constants, self._options = constants, options
        self._compiled: Callable[..., None] | None = None
        self._compiled_for: list[Any] = []

    def __call__(self, stream: int, *pointers: Pointer) -> None:
        """Launch on the current device, and this stream of it, with pointers in the order of the kernel's arguments."""
        if torch.compiler.is_compiling():
            self._launch_by_triton(pointers)
            return
        addresses: list[int | None] = []
        united = 0
        for pointer in pointers:
            if pointer is None:
                addresses.append(None)
                continue
            if isinstance(pointer, tuple):
                address = pointer[0].data_ptr() + pointer[0].itemsize * pointer[1]
            else:
                address = pointer.data_ptr()
            united |= address
            addresses.append(address)
        is_aligned = united % _ALIGNMENT == 0
        if is_aligned and self._compiled is not None:
            self._compiled(*addresses, *self._numbers, *self._compiled_for, stream=stream)
            return
        compiled = self._launch_by_triton(pointers)
        if is_aligned and IS_KNOWN and compiled is not None:  # Triton's interpreter compiles nothing
            # the kernel last: another thread may launch it as soon as it is there
            self._compiled_for = [self._constants[name] for name in self._kernel.arg_names if name in self._constants]
            self._compiled = compiled[self._grid]

    def _launch_by_triton(self, pointers: Sequence[Pointer]) -> Any:
        """The ordinary launch; returns the compiled kernel."""
        tensors = [_tensor(pointer) for pointer in pointers]
        return self._kernel[self._grid](*tensors, *self._numbers, **self._constants, **self._options)


def _tensor(pointer: Pointer) -> Tensor | None:
    return pointer[0][pointer[1] :] if isinstance(pointer, tuple) else pointer


def current_stream(device: torch.device) -> int:
    """The address of the device's current stream, as Triton asks PyTorch for it."""
    if device.type != "cuda":
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream
