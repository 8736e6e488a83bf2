"""Repeated launches without Triton's dispatch, which takes longer than many kernels do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# In these versions `kernel[grid](...)` returns the compiled kernel, whose own `[grid]` takes the stream and all
# arguments in their order, with addresses in place of tensors.
_KNOWN_VERSIONS = {(3, minor) for minor in range(3, 10)}
IS_KNOWN_VERSION = tuple(map(int, triton.__version__.split(".")[:2])) in _KNOWN_VERSIONS
_ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are not so aligned

Pointer = Tensor | tuple[Tensor, int] | None  # the start of a tensor's memory, or an element of it


class _CompiledLaunch(NamedTuple):
    """What Triton has compiled for a grid, and the arguments that follow the pointers."""

    launch: Callable[..., None]
    arguments: list[Any]


class PreparedLaunch:
    """A launch whose arguments are fixed except for the tensors, which keep their dtypes and their device.

    Triton launches it the first time. The compiled kernel is then launched directly, without asking again what it has
    to be specialized for. If a pointer isn't aligned, or this version of Triton isn't known to work like that, Triton
    launches it every time. `constants` are what the kernel is compiled for, with Triton's options.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        scalars: Mapping[str, float | None],
        constants: Mapping[str, Any],
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._fixed = {**scalars, **constants}
        self._compiled: _CompiledLaunch | None = None

    def __call__(self, stream: int, *pointers: Pointer) -> None:
        """Launch on this stream of the current device. The pointers are the first arguments of the kernel."""
        if torch.compiler.is_compiling():
            self._launch_by_triton(pointers)
            return
        addresses: list[int | None] = []
        all_bits = 0
        for pointer in pointers:
            if pointer is None:
                addresses.append(None)
                continue
            if isinstance(pointer, tuple):
                address = pointer[0].data_ptr() + pointer[0].itemsize * pointer[1]
            else:
                address = pointer.data_ptr()
            all_bits |= address
            addresses.append(address)
        compiled = self._compiled  # read once, as another thread may set it
        if all_bits % _ALIGNMENT != 0:
            self._launch_by_triton(pointers)
        elif compiled is not None:
            compiled.launch(*addresses, *compiled.arguments, stream=stream)
        else:
            self._keep(self._launch_by_triton(pointers), len(pointers))

    def _launch_by_triton(self, pointers: Sequence[Pointer]) -> Any:
        """Launch in the ordinary way, and return the compiled kernel."""
        tensors = [_as_tensor(pointer) for pointer in pointers]
        return self._kernel[self._grid](*tensors, **self._fixed)

    def _keep(self, kernel: Any, num_pointers: int) -> None:
        """Keep a compiled kernel for the next launches; Triton's interpreter compiles none."""
        if kernel is not None and IS_KNOWN_VERSION:
            arguments = [self._fixed[name] for name in self._kernel.arg_names[num_pointers:]]
            self._compiled = _CompiledLaunch(kernel[self._grid], arguments)


def _as_tensor(pointer: Pointer) -> Tensor | None:
    return pointer[0][pointer[1] :] if isinstance(pointer, tuple) else pointer


def current_stream(device: torch.device) -> int:
    """Return the device's current stream, as Triton asks PyTorch for it."""
    if device.type != "cuda":
        return 0
    stream: int = triton.runtime.driver.active.get_current_stream(device.index)
    return stream
