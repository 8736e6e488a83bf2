"""PyTorch's tensors in the CPU's memory: compiled kernels where Numba is installed, and nobody records operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import polywhiten.torch.namespace as xp
from polywhiten._types import Shape
from polywhiten.cpu import is_available
from polywhiten.cpu.library import ArrayKey, Strided, check_shape
from polywhiten.cpu.runtime.large_pages import ask_for_large_pages
from polywhiten.kernels import Kernels
from polywhiten.reference import Gradients, Reference
from polywhiten.solvers import Solver
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.torch._internals import can_bypass_autograd
from polywhiten.torch.kernels import TorchKernels

if TYPE_CHECKING:
    from polywhiten.cpu.implementation import CpuImplementation


class TorchCpuImplementation(Reference):
    """`CpuImplementation`, which is imported with Numba when the first tensor on the CPU arrives."""

    name = "Numba"

    def __init__(self) -> None:
        """Unlike the reference, this has no kernels yet."""

    @property
    def kernels(self) -> Kernels:
        """Return the compiled kernels."""
        return _compiled().kernels

    def supports(self, spec: WhiteningSpec | None, *tensors: Tensor | None) -> bool:
        """Return whether all tensors are in the CPU's memory, and PyTorch needn't see what is done with them."""
        # the compiler of torch.compile follows no addresses
        if torch.compiler.is_compiling() or tensors[0] is None or not tensors[0].is_cpu or not is_available():
            return False
        return _compiled().supports(spec, *tensors)

    def statistics(self, spec: WhiteningSpec, x: Tensor) -> Statistics:
        return _compiled().statistics(spec, x)

    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        return _compiled().forward(spec, x, weight, bias)

    def backward(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Statistics,
        dy: Tensor,
        dstats: Statistics = NO_STATISTICS,
    ) -> Gradients:
        return _compiled().backward(spec, x, weight, bias, stats, dy, dstats)

    def apply_frozen(
        self, axis: int, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        y: Tensor = _compiled().apply_frozen(axis, x, mean, whitener, weight, bias)
        return y

    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        w: Tensor = _compiled().inverse_sqrt(solver, cov, eps)
        return w


@cache
def _compiled() -> CpuImplementation:
    from polywhiten.cpu.implementation import CpuImplementation

    return CpuImplementation.over(_LIBRARY, TorchKernels(xp))


def recomputes_cheaply(spec: WhiteningSpec, x: Tensor) -> bool:
    """Return whether backward computes missing statistics in a tenth of a step, as compiled kernels do."""
    return x.is_cpu and is_available() and spec.solver.newton_steps(x.element_size()) is not None


def update_averages(
    averages: Sequence[Tensor],
    statistics: Sequence[Tensor],
    checked: Sequence[Tensor],
    count: Tensor | None,
    momentum: float | None,
) -> bool | None:
    """Update running averages in one call, and return whether that was done; None if the kernel can't serve them."""
    if not averages or count is None or count.dtype != torch.int64:
        return None
    if torch.compiler.is_compiling() or not statistics[0].is_cpu or not is_available():
        return None
    from polywhiten.cpu import averages as compiled

    are_contiguous = all(
        running.is_contiguous() and running.shape == batch.shape
        for running, batch in zip(averages, statistics, strict=True)
    )
    are_few = len(averages) <= compiled.MAX_AVERAGES and len(checked) <= compiled.MAX_CHECKED
    is_wide = statistics[0].dtype in (torch.float32, torch.float64)
    if not (are_contiguous and are_few and is_wide and _LIBRARY.can_read(*statistics, *checked, *averages)):
        return None
    if not _LIBRARY.can_convert(count):
        return None
    before = count.item()
    compiled.update_averages(_LIBRARY, averages, statistics, checked, count, momentum)
    for tensor in (*averages, count):  # as operations in place do, for those who need the former values
        increment_version(tensor)
    return count.item() > before


class TorchLibrary:
    """What the compiled kernels need to know of PyTorch's tensors, see `polywhiten.cpu.library.Library`.

    Kernels have tensors of half precision converted to float32, so these are readable beside float32.
    """

    def can_read(self, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether tensors are in the CPU's memory, and PyTorch needn't see what is done with them."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensors = [x, *(tensor for tensor in others if tensor is not None)]
        return (
            not torch.compiler.is_compiling()
            and x.numel() > 0
            and all(tensor.is_cpu and tensor.dtype in (x.dtype, wide) for tensor in tensors)
            and can_bypass_autograd(tensors)
        )

    def can_convert(self, *arrays: Tensor | None) -> bool:
        """Return whether tensors are in the CPU's memory, of any dtype."""
        tensors = [tensor for tensor in arrays if tensor is not None]
        return all(tensor.is_cpu for tensor in tensors) and can_bypass_autograd(tensors)

    def key(self, array: Tensor) -> ArrayKey:
        return ArrayKey(array.shape, array.stride(), array.dtype)

    def strided(self, key: ArrayKey) -> Strided:
        return Strided(key.shape, key.strides)

    def dtype_name(self, dtype: torch.dtype) -> str:
        return "float32" if dtype == torch.float32 else "float64"

    def dense(self, array: Strided, shape: Shape) -> tuple[Strided, Strided]:
        # in memory that nothing touches; for the meta device, PyTorch would import SymPy, which takes a second
        result = torch.empty_like(torch.empty_strided(array.shape, array.strides, dtype=torch.bool))
        reshaped = result.reshape(shape)
        if reshaped.data_ptr() != result.data_ptr():  # can't be reshaped in this order without a copy
            result = result.contiguous()
            reshaped = result.reshape(shape)
        return Strided(array.shape, result.stride()), Strided(shape, reshaped.stride())

    def address(self, array: Tensor) -> int:
        return array.data_ptr()

    def empty(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def empty_strided(self, array: Strided, like: Tensor) -> Tensor:
        result = like.new_empty_strided(array.shape, array.strides)
        ask_for_large_pages(result.data_ptr(), result.nbytes)
        return result

    def copied(self, array: Tensor, to: Tensor) -> Tensor:
        return to.copy_(array)

    def converted(self, array: Tensor, shape: Shape, like: Tensor) -> Tensor:
        check_shape(array, shape)
        return array.to(like.dtype).contiguous()

    def contiguous(self, array: Tensor) -> Tensor:
        return array.contiguous()

    def from_numpy(self, array: npt.NDArray[np.float64], like: Tensor) -> Tensor:
        return torch.from_numpy(array).to(like.dtype)

    def num_threads(self) -> int:
        return torch.get_num_threads()


_LIBRARY = TorchLibrary()
