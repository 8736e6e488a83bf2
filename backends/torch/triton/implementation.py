"""Whitening by Triton's kernels, for tensors on CUDA devices with tensor cores for TF32."""

from __future__ import annotations

import torch
from torch import Tensor

import polywhiten.torch.namespace as xp
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups
from polywhiten.gpu_launches import JOINED, gpu_launches
from polywhiten.reference import Gradients, Reference
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.kernels import is_readable_memory
from polywhiten.torch.triton.group_whitening import WholeGroupWhitening
from polywhiten.torch.triton.iter_norm import WholeIterNorm
from polywhiten.torch.triton.joined import Joined
from polywhiten.torch.triton.kernels import FusedKernels
from polywhiten.torch.triton.tiles import have_values

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_STATE_DTYPES = (*_DTYPES, torch.int64)  # of parameters, averages and their count


class TritonImplementation(Reference):
    """Separate launches for each step."""

    name = "Triton"

    kernels: FusedKernels

    def __init__(self, kernels: FusedKernels | None = None) -> None:
        super().__init__(FusedKernels(xp) if kernels is None else kernels)

    def supports(self, spec: WhiteningSpec | None, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether x is on a device that the kernels are for."""
        return self.kernels.is_on_device(x)

    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten, with weight and bias taken in by the kernels if these serve the arrays."""
        fused = self._fused(spec, x, weight, bias)
        if fused is None:
            return super().forward(spec, x, weight, bias)
        y, stats = fused.forward(weight, bias)
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
        """Return the gradients, with those of weight and bias taken by the kernels if these serve the arrays."""
        alone = all(each is None for each in dstats)
        fused = self._fused(spec, x, weight, bias, dy, *stats) if alone else None
        if fused is None:
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        dx, dweight, dbias = fused.backward(weight, bias, stats, self.kernels.split(spec.blocks, dy))
        return dx.reshape(x.shape), dweight, dbias

    def _fused(
        self, spec: WhiteningSpec, x: Tensor, *others: Tensor | None
    ) -> WholeIterNorm | WholeGroupWhitening | None:
        steps = spec.solver.newton_steps(x.element_size())
        if steps is None or spec.all_reduce is not None:
            return None
        x4 = self.kernels.split(spec.blocks, x)
        channels = x.shape[spec.blocks.axis]
        if not self.kernels.serves(x4, *others) or not have_values(others[:2], channels):
            return None
        if isinstance(spec.blocks, ChannelGroups):
            return WholeIterNorm(x4, spec.eps, steps)
        return WholeGroupWhitening.of(x4, spec.eps, steps, channels=channels)


class JoinedKernels:
    """Kernels with few launches, which whiten arrays with any groups and update running averages."""

    def __init__(self, kernels: FusedKernels | None = None) -> None:
        self._kernels = FusedKernels(xp) if kernels is None else kernels

    def whitening(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        averages: RunningAverages | None,
    ) -> Joined | None:
        """Return what whitens x, if joined launches are wanted and serve the arrays."""
        if gpu_launches() != JOINED or spec.all_reduce is not None:
            return None
        steps = spec.solver.newton_steps(4)
        state = (None, None, None) if averages is None else averages[:3]
        if steps is None or not self._can_read(x, weight, bias, *state):
            return None
        of_samples = isinstance(spec.blocks, SampleGroups)
        joined = Joined(of_samples, spec.blocks.axis, _group_number(spec.blocks), spec.eps, steps)
        mean, matrices, _ = state
        serves = joined.serves(x) and joined.fits(x.shape, (weight, bias, mean), matrices)
        return joined if serves else None

    def apply_frozen(
        self, axis: int, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Apply frozen statistics in one launch, if joined launches are wanted and serve the arrays."""
        tensors = x, mean, whitener, weight, bias
        if (
            gpu_launches() != JOINED
            or (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors))
            or not self._can_read(*tensors)
        ):
            return None
        joined = Joined(False, axis, whitener.shape[-1])
        if not (joined.serves(x) and joined.fits(x.shape, (mean, weight, bias), whitener)):
            return None
        with torch.cuda.device_of(x):
            return joined.frozen(x, mean, whitener, weight, bias)

    def _can_read(self, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether joined kernels can read x, in its layout perhaps, and parameters or averages beside it."""
        if not self._kernels.is_on_device(x) or x.dtype not in _DTYPES:
            return False
        tensors = [x]
        for each in others:
            if each is not None:
                if each.dtype not in _STATE_DTYPES or not each.is_contiguous() or each.device != x.device:
                    return False
                tensors.append(each)
        return is_readable_memory(tensors)


def _group_number(blocks: Blocks) -> int:
    return blocks.num_groups if isinstance(blocks, SampleGroups) else blocks.group_size
