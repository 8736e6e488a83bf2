"""The kernels for tensors on the CPU: compiled ones where Numba is installed, else the default ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import polywhiten.torch.namespace as xp
from polywhiten.cpu import is_available
from polywhiten.cpu.runtime.large_pages import ask_for_large_pages
from polywhiten.kernels import Term
from polywhiten.reference import Gradients, Reference
from polywhiten.solvers import Solver
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.torch._internals import can_bypass_autograd
from polywhiten.torch.kernels import TorchKernels, full_precision

if TYPE_CHECKING:
    from polywhiten.cpu.launches import Calls


class CPUKernels(TorchKernels):
    """Compiled kernels; the default ones where PyTorch has to look into them."""

    @full_precision
    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in one pass over x."""
        if not _serves([x]):
            return super().moments(x, block_axis)
        return _calls().moments(self.to_accumulation_dtype(x), block_axis)

    @full_precision
    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K, in one pass over both."""
        if not _serves([dy, x], mean):
            return super().cross_moments(dy, x, mean, block_axis)
        return _calls().cross_moments(self.to_accumulation_dtype(dy), self.to_accumulation_dtype(x), mean, block_axis)

    @full_precision
    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Tensor | None,
        block_axis: int,
        dtype: torch.dtype,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """The sum of the terms, in one pass."""
        others = [tensor for term in terms for tensor in (term.matrix, term.centre)]
        if not _serves([term.array for term in terms], *others, bias, row_scale):
            return super().affine_map(terms, bias, block_axis, dtype, row_scale=row_scale)
        terms = [term._replace(array=self.to_accumulation_dtype(term.array)) for term in terms]
        y: Tensor = _calls().affine_map(terms, bias, block_axis, row_scale)
        return y.to(dtype)

    @full_precision
    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """W, every matrix in the cache."""
        if not (solver.newton_steps(cov.element_size()) is not None and _serves([cov])):
            return super().inverse_sqrt(solver, cov, eps)
        w: Tensor = _calls().inverse_sqrt(solver, cov, eps)
        return w

    @full_precision
    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Gradient with respect to cov, every matrix in the cache."""
        if not (solver.newton_steps(cov.element_size()) is not None and _serves([cov, grad])):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        result: Tensor = _calls().inverse_sqrt_adjoint(solver, cov, grad, eps)
        return result


class TorchCpuImplementation(Reference):
    """Compiled kernels for tensors in the CPU's memory."""

    name = "Numba"

    def __init__(self) -> None:
        super().__init__(CPUKernels(xp))

    def supports(self, spec: WhiteningSpec | None, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether tensors are in the CPU's memory, and nobody records what is done with them."""
        parameters, rest = (others[:2], others[2:]) if spec is not None else ((), others)
        tensors = [tensor for tensor in (*parameters, *rest) if tensor is not None]
        return _serves([x]) and _are_readable(tensors)

    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten, by one schedule for all steps if that serves the arrays."""
        if spec.all_reduce is not None or x.element_size() < 4:
            return super().forward(spec, x, weight, bias)
        from polywhiten.cpu.implementation import WholeWhitening

        y, stats = WholeWhitening(self.kernels, _calls(), spec, x).forward(weight, bias)
        return y.reshape(x.shape), stats

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
        """Return the gradients, by one schedule for all steps if that serves the arrays."""
        observed = spec.all_reduce is not None or any(each is not None for each in dstats)
        if observed or x.element_size() < 4 or not _serves([x], dy, *stats):
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        from polywhiten.cpu.implementation import WholeWhitening

        dy = self.kernels.split(spec.blocks, dy)
        dx, dweight, dbias = WholeWhitening(self.kernels, _calls(), spec, x).backward(weight, bias, stats, dy)
        return dx.reshape(x.shape), dweight, dbias


def recomputes_cheaply(spec: WhiteningSpec, x: Tensor) -> bool:
    """Return whether backward computes missing statistics in a tenth of a step, as compiled kernels do."""
    return x.is_cpu and is_available() and spec.solver.newton_steps(x.element_size()) is not None


def update_averages(
    averages: Sequence[Tensor],
    statistics: Sequence[Tensor],
    judged: Sequence[Tensor],
    count: Tensor | None,
    momentum: float | None,
) -> bool | None:
    """Update running averages in one call, and return whether that was done; None if the kernel can't serve them."""
    fit = all(
        running.is_contiguous() and running.shape == batch.shape
        for running, batch in zip(averages, statistics, strict=True)
    )
    if (
        not (fit and averages and _serves(statistics, *judged, *averages))
        or count is None
        or count.dtype != torch.int64
        or not _are_readable([count])
    ):
        return None
    before = count.item()
    _calls().average(averages, statistics, judged, count, momentum)
    for each in (*averages, count):  # as operations in place do, for those who need the former values
        increment_version(each)
    return count.item() > before


class _Torch:
    """What compiled kernels need to know of PyTorch's tensors."""

    def address(self, array: Tensor) -> int:
        return array.data_ptr()

    def strides(self, array: Tensor) -> tuple[int, ...]:
        return array.stride()

    def dtype(self, array: Tensor) -> str:
        return "float32" if array.dtype == torch.float32 else "float64"

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def converted(self, array: np.ndarray[Any, Any], like: Tensor) -> Tensor:
        return torch.from_numpy(array).to(like.dtype)

    def empty_like(self, array: Tensor) -> Tensor:
        result = torch.empty_like(array)
        ask_for_large_pages(result.data_ptr(), result.nbytes)
        return result

    def in_order_of(self, array: Tensor, other: Tensor) -> Tensor:
        return self.empty_like(other).copy_(array)

    def contiguous(self, array: Tensor) -> Tensor:
        return array.contiguous()

    def threads(self) -> int:
        return torch.get_num_threads()


@cache
def _calls() -> Calls:
    from polywhiten.cpu.launches import Calls

    return Calls(_Torch())


def _serves(arrays: Sequence[Tensor], *others: Tensor | None) -> bool:
    """Whether arrays are a CPU's and not empty, and PyTorch need not look into what is done; others are statistics."""
    x, *_ = arrays
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = [tensor for tensor in others if tensor is not None]
    tensors = [*arrays, *statistics]
    return (
        not torch.compiler.is_compiling()  # which follows no addresses
        and x.numel() > 0
        and _are_readable(tensors)
        and all(tensor.dtype in (x.dtype, wanted) for tensor in arrays)
        and all(tensor.dtype == wanted for tensor in statistics)
        and is_available()
    )


def _are_readable(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are what a CPU's memory holds, and PyTorch need not look into what is done with them."""
    return all(tensor.is_cpu for tensor in tensors) and can_bypass_autograd(tensors)
