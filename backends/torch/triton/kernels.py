"""The kernels in Triton, for tensors on CUDA devices with tensor cores for TF32; other kernels for all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polywhiten.kernels import Term
from polywhiten.solvers import Solver
from polywhiten.torch.kernels import TorchKernels, can_bypass_autograd
from polywhiten.torch.triton import affine_map, moments, newton
from polywhiten.torch.triton.tiles import LARGEST_GROUP, is_addressable

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedKernels(TorchKernels):
    """A launch or two for each kernel; the default kernels where PyTorch has to look into them.

    That is where it records operations for a derivative of theirs, and inside the transforms of `torch.func`.
    """

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in one pass over x."""
        if not self.serves(x):
            return super().moments(x, block_axis)
        with torch.cuda.device_of(x):
            return moments.moments(x, block_axis)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K, in one pass over both."""
        if not self.serves(dy, x, mean):
            return super().cross_moments(dy, x, mean, block_axis)
        with torch.cuda.device_of(x):
            return moments.cross_moments(dy, x, mean, block_axis)[:2]

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Tensor | None,
        block_axis: int,
        dtype: torch.dtype,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """The sum of the terms in one pass, centred in registers."""
        terms = self.scaled(terms, row_scale)
        tensors = [tensor for matrix, array, centre in terms for tensor in (array, matrix, centre)]
        if not self.serves(*tensors, bias):
            return super().affine_map(terms, bias, block_axis, dtype)
        with torch.cuda.device_of(tensors[0]):
            return affine_map.affine_map(terms, bias, block_axis, dtype)

    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """W, all iterations in one launch."""
        if not (solver.newton_steps(cov.element_size()) is not None and self.serves(cov)):
            return super().inverse_sqrt(solver, cov, eps)
        with torch.cuda.device_of(cov):
            return newton.inverse_sqrt(cov, eps, solver.iterations)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Gradient with respect to cov, all iterations in one launch."""
        if not (solver.newton_steps(cov.element_size()) is not None and self.serves(cov, grad)):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        with torch.cuda.device_of(cov):
            return newton.inverse_sqrt_adjoint(cov, grad, eps, solver.iterations)

    def serves(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether the fused kernels can read x (..., d, l) and whatever else there is.

        Not where there is nothing, nor where PyTorch has to look into what is done.
        """
        tensors = [x, *(tensor for tensor in others if tensor is not None)]
        return (
            self.is_on_device(x)
            and x.numel() > 0
            and x.shape[-2] <= LARGEST_GROUP
            and all(tensor.dtype in _DTYPES and is_addressable(tensor) for tensor in tensors)
            and can_bypass_autograd(tensors)
        )

    def is_on_device(self, x: Tensor) -> bool:
        return x.is_cuda and _has_tensor_cores(x.device.index)


@torch.compiler.assume_constant_result
def _has_tensor_cores(index: int) -> bool:
    """For TF32; Triton has no other fast products of float32."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)
