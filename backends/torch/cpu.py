"""The kernels for tensors on the CPU: compiled ones where Numba is installed, else the default ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from polywhiten.cpu import is_available
from polywhiten.cpu.runtime.large_pages import ask_for_large_pages
from polywhiten.kernels import Term
from polywhiten.solvers import Solver
from polywhiten.solvers.newton import is_iterated_in
from polywhiten.torch.kernels import TorchKernels, full_precision, is_unobserved
from polywhiten.whitening import Plan, Whole

if TYPE_CHECKING:
    from polywhiten.cpu.launches import Calls


class CPUKernels(TorchKernels):
    """Compiled kernels; the default ones where PyTorch has to look into them."""

    @full_precision
    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in one pass over x."""
        if not _serves([x]):
            return super().moments(x, block_axis)
        return _calls().moments(self.for_statistics(x), block_axis)

    @full_precision
    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K, in one pass over both."""
        if not _serves([dy, x], mean):
            return super().cross_moments(dy, x, mean, block_axis)
        return _calls().cross_moments(self.for_statistics(dy), self.for_statistics(x), mean, block_axis)

    @full_precision
    def affine_map(self, terms: Sequence[Term], bias: Tensor | None, block_axis: int, dtype: torch.dtype) -> Tensor:
        """The sum of the terms, in one pass."""
        others = [tensor for term in terms for tensor in (term.matrix, term.centre)]
        if not _serves([term.array for term in terms], *others, bias):
            return super().affine_map(terms, bias, block_axis, dtype)
        terms = [term._replace(array=self.for_statistics(term.array)) for term in terms]
        y: Tensor = _calls().affine_map(terms, bias, block_axis)
        return y.to(dtype)

    @full_precision
    def scaled_map(
        self, weight: Tensor | None, term: Term, bias: Tensor | None, block_axis: int, dtype: torch.dtype
    ) -> Tensor:
        """Likewise, with the weight taken in while matrices are arranged."""
        if weight is None or not _serves([term.array], term.matrix, term.centre, weight, bias):
            plain: Tensor = super().scaled_map(weight, term, bias, block_axis, dtype)
            return plain
        term = term._replace(array=self.for_statistics(term.array))
        y: Tensor = _calls().affine_map([term], bias, block_axis, weight)
        return y.to(dtype)

    @full_precision
    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """W, every matrix in the cache."""
        if not (is_iterated_in(solver, cov.element_size()) and _serves([cov])):
            return super().inverse_sqrt(solver, cov, eps)
        w: Tensor = _calls().inverse_sqrt(solver, cov, eps)
        return w

    @full_precision
    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Gradient with respect to cov, every matrix in the cache."""
        if not (is_iterated_in(solver, cov.element_size()) and _serves([cov, grad])):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        result: Tensor = _calls().inverse_sqrt_adjoint(solver, cov, grad, eps)
        return result

    def average(
        self,
        averages: Sequence[Tensor],
        statistics: Sequence[Tensor],
        judged: Sequence[Tensor],
        count: Tensor | None,
        momentum: float | None,
    ) -> Tensor | bool:
        """In one call."""
        given = averages, statistics, judged, count, momentum
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
            return super().average(*given)
        before = count.item()
        _calls().average(*given)
        for each in (*averages, count):  # as operations in place do, for those who need the former values
            increment_version(each)
        return count.item() > before

    def keeps_statistics(self, solver: Solver, x: Tensor) -> bool:
        """Not for compiled kernels, which take a tenth of a step for them."""
        return not is_iterated_in(solver, x.element_size()) or x.device.type != "cpu" or not is_available()

    def whole(self, plan: Plan, x: Tensor, *others: Tensor | None) -> Whole | None:
        """Of float32 and float64."""
        if x.element_size() < 4:
            return None
        parameters = [tensor for tensor in others[:2] if tensor is not None]  # of any dtype: they are converted
        if not _serves([x], *others[2:]) or not _are_readable(parameters):
            return None
        from polywhiten.cpu.implementation import WholeWhitening

        return WholeWhitening(self, _calls(), plan, x)


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
    return all(tensor.is_cpu for tensor in tensors) and is_unobserved(tensors)
