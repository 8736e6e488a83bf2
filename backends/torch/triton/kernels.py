"""The kernels in Triton, for tensors on CUDA devices with tensor cores for TF32; other kernels for all others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from polywhiten.blocks import ChannelGroups
from polywhiten.gpu_launches import JOINED, gpu_launches
from polywhiten.kernels import Term
from polywhiten.solvers import Solver
from polywhiten.solvers.newton import is_iterated_in
from polywhiten.torch.cpu import CPUKernels
from polywhiten.torch.kernels import is_memory, is_unobserved
from polywhiten.torch.triton import affine_map, moments, newton
from polywhiten.torch.triton.group_whitening import WholeGroupWhitening
from polywhiten.torch.triton.iter_norm import WholeIterNorm
from polywhiten.torch.triton.joined import Joined
from polywhiten.torch.triton.tiles import LARGEST_GROUP, have_values, is_addressable
from polywhiten.whitening import Plan, Whole

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STATE_DTYPES = (*_DTYPES, torch.int64)  # of parameters, averages and their count


class FusedKernels(CPUKernels):
    """A launch or two for each kernel; the default kernels where PyTorch has to look into them.

    That is where it records operations for a derivative of theirs, and inside the transforms of `torch.func`.
    """

    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in one pass over x."""
        if not self._serves(x):
            return super().moments(x, block_axis)
        with self.on_its_device(x):
            return moments.moments(x, block_axis)

    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K, in one pass over both."""
        if not self._serves(dy, x, mean):
            return super().cross_moments(dy, x, mean, block_axis)
        with self.on_its_device(x):
            return moments.cross_moments(dy, x, mean, block_axis)[:2]

    def affine_map(self, terms: Sequence[Term], bias: Tensor | None, block_axis: int, dtype: torch.dtype) -> Tensor:
        """The sum of the terms in one pass, centred in registers."""
        tensors = [tensor for matrix, array, centre in terms for tensor in (array, matrix, centre)]
        if not self._serves(*tensors, bias):
            return super().affine_map(terms, bias, block_axis, dtype)
        with self.on_its_device(tensors[0]):
            return affine_map.affine_map(terms, bias, block_axis, dtype)

    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """W, all iterations in one launch."""
        if not (is_iterated_in(solver, cov.element_size()) and self._serves(cov)):
            return super().inverse_sqrt(solver, cov, eps)
        with self.on_its_device(cov):
            return newton.inverse_sqrt(cov, eps, solver.iterations)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Gradient with respect to cov, all iterations in one launch."""
        if not (is_iterated_in(solver, cov.element_size()) and self._serves(cov, grad)):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        with self.on_its_device(cov):
            return newton.inverse_sqrt_adjoint(cov, grad, eps, solver.iterations)

    def keeps_statistics(self, solver: Solver, x: Tensor) -> bool:
        """On its device."""
        return self._is_on_device(x) or super().keeps_statistics(solver, x)

    def whole(self, plan: Plan, x: Tensor, *others: Tensor | None) -> Whole | None:
        """Of Newton's solver."""
        if not self._is_on_device(x):
            return super().whole(plan, x, *others)
        if not is_iterated_in(plan.solver, x.element_size()):
            return None
        x4 = self.split(plan.blocks, x)
        if not self._serves(x4, *others) or not have_values(others[:2], x.shape[plan.blocks.axis]):
            return None
        if isinstance(plan.blocks, ChannelGroups):
            return WholeIterNorm(x4, plan.eps, plan.solver.iterations)
        return WholeGroupWhitening.of(x4, plan.eps, plan.solver.iterations, channels=x.shape[plan.blocks.axis])

    def joined(
        self, of_samples: bool, axis: int, groups: int, solver: Solver, eps: float, *tensors: Any
    ) -> Joined | None:
        """Of Newton's solver, where joined launches are wanted."""
        if gpu_launches() != JOINED or not is_iterated_in(solver, 4) or not self._can_join(*tensors):
            return None
        joined = Joined(of_samples, axis, groups, eps, solver.iterations)
        x, weight, bias, *averages = tensors
        mean, matrices = averages[:2] or (None, None)
        serves = joined.serves(x) and joined.fits(x.shape, (weight, bias, mean), matrices)
        return joined if serves else None

    def frozen(self, axis: int, mean: Tensor, whitener: Tensor, x: Tensor, *affine: Tensor | None) -> Tensor | None:
        """In one launch, where joined launches are wanted."""
        given = x, mean, whitener, *affine
        if (
            gpu_launches() != JOINED
            or (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given))
            or not self._can_join(x, mean, whitener, *affine)
        ):
            return None
        joined = Joined(False, axis, whitener.shape[-1])
        if not (joined.serves(x) and joined.fits(x.shape, (mean, *affine), whitener)):
            return None
        with self.on_its_device(x):
            return joined.frozen(x, mean, whitener, *affine)

    def _can_join(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether joined kernels can read x, in its layout perhaps, and parameters or averages beside it."""
        if not self._is_on_device(x) or x.dtype not in _DTYPES:
            return False
        tensors = [x]
        for each in others:
            if each is not None:
                if each.dtype not in _STATE_DTYPES or not each.is_contiguous() or each.device != x.device:
                    return False
                tensors.append(each)
        return is_memory(tensors)

    def on_its_device(self, x: Tensor) -> AbstractContextManager[object]:
        """Triton launches on the current device; compiled code sees to that itself."""
        return torch.cuda.device_of(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()

    def _serves(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether the fused kernels can read x (..., d, l) and whatever else there is.

        Not where there is nothing, nor where PyTorch has to look into what is done.
        """
        tensors = [x, *(tensor for tensor in others if tensor is not None)]
        return (
            self._is_on_device(x)
            and x.numel() > 0
            and x.shape[-2] <= LARGEST_GROUP
            and all(tensor.dtype in _DTYPES and is_addressable(tensor) for tensor in tensors)
            and is_unobserved(tensors)
        )

    def _is_on_device(self, x: Tensor) -> bool:
        return x.is_cuda and _has_tensor_cores(x.device.index)


@torch.compiler.assume_constant_result
def _has_tensor_cores(index: int) -> bool:
    """For TF32; Triton has no other fast products of float32."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)
