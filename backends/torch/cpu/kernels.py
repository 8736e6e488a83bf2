"""The kernels for tensors on the CPU; the default ones for all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polywhiten.blocks import SampleGroups
from polywhiten.kernels import Term
from polywhiten.torch.cpu import channel_groups
from polywhiten.torch.cpu.sample_groups import WholeGroupWhitening
from polywhiten.torch.kernels import TorchKernels, Whole, full_precision, is_unobserved
from polywhiten.whitening import Plan


class CPUKernels(TorchKernels):
    """In pieces that stay in the cache; the default kernels where PyTorch has to look into them."""

    @full_precision
    def moments(self, x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in one pass over x."""
        if block_axis != 1 or not _serves(x):
            return super().moments(x, block_axis)
        return channel_groups.moments(x, self.statistics_dtype(x.dtype))

    @full_precision
    def cross_moments(self, dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
        """S and K, in one pass over both."""
        if block_axis != 1 or not _serves(dy, x, mean):
            return super().cross_moments(dy, x, mean, block_axis)
        return channel_groups.cross_moments(dy, x, mean)

    @full_precision
    def affine_map(self, terms: Sequence[Term], bias: Tensor | None, block_axis: int, dtype: torch.dtype) -> Tensor:
        """The sum of the terms, centres folded into the bias."""
        tensors = [tensor for matrix, array, centre in terms for tensor in (array, matrix, centre)]
        if block_axis != 1 or not _serves(*tensors, bias):
            return super().affine_map(terms, bias, block_axis, dtype)
        return channel_groups.affine_map(terms, bias, dtype)

    def whole(self, plan: Plan, x: Tensor, *others: Tensor | None) -> Whole | None:
        """Of group whitening."""
        if not isinstance(plan.blocks, SampleGroups) or not _serves(x, *others):
            return None
        return WholeGroupWhitening.of(self, plan, plan.blocks, x)


def _serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether x is a CPU's and not empty, and PyTorch need not look into what is done."""
    tensors = [x, *(tensor for tensor in others if tensor is not None)]
    return (
        all(tensor.device.type == "cpu" for tensor in tensors)
        and x.numel() > 0
        and not torch.compiler.is_compiling()  # which would follow every piece
        and is_unobserved(tensors)
    )
