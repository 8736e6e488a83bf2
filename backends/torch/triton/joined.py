"""Which arrays the joined kernels whiten."""

from __future__ import annotations

import torch
from torch import Tensor

from polywhiten.gpu_launches import JOINED, gpu_launches
from polywhiten.spec import WhiteningSpec
from polywhiten.torch._internals import is_readable_memory
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.kernels import on_device_of
from polywhiten.torch.triton.joined_problem import JoinedProblem
from polywhiten.torch.triton.joined_whitening import JoinedWhitening
from polywhiten.torch.triton.plan_cache import cached
from polywhiten.torch.triton.support import DTYPES, is_on_supported_device

_STATE_DTYPES = (*DTYPES, torch.int64)  # of parameters, running averages and the number of batches


class JoinedKernels:
    """Kernels for all of IterNorm and group whitening, where few launches are wanted.

    Unlike an implementation, they take a smaller last group along, and update running averages.
    """

    def is_on_device(self, x: Tensor) -> bool:
        """Return whether x is on a device that the kernels are for."""
        return is_on_supported_device(x)

    def whitening(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        averages: RunningAverages | None,
    ) -> JoinedWhitening | None:
        """Return what whitens x and updates the averages; None if the kernels can't, or aren't wanted."""
        if gpu_launches() != JOINED or spec.all_reduce is not None:
            return None
        steps = spec.solver.newton_steps(4)  # bytes of the statistics' float32
        mean, matrices, num_batches = (None, None, None) if averages is None else averages[:3]
        if steps is None or not self._can_read(x, weight, bias, mean, matrices, num_batches):
            return None
        return _whitening_of(JoinedProblem.of(spec, steps), x, (weight, bias, mean), matrices)

    def apply_frozen(
        self, axis: int, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        """Apply frozen statistics in one launch; return None if the kernels can't, or aren't wanted."""
        tensors = x, mean, whitener, weight, bias
        if (
            gpu_launches() != JOINED
            or (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors))
            or not self._can_read(*tensors)
        ):
            return None
        problem = JoinedProblem(of_samples=False, axis=axis, d=whitener.shape[-1])
        whitening = _whitening_of(problem, x, (mean, weight, bias), whitener)
        if whitening is None:
            return None
        with on_device_of(x):
            return whitening.apply_frozen(x, mean, whitener, weight, bias)

    def _can_read(self, x: Tensor, *others: Tensor | None) -> bool:
        """Return whether kernels can read x, if its strides allow that, and the parameters and averages beside it."""
        if not self.is_on_device(x) or x.dtype not in DTYPES:
            return False
        tensors = [x]
        for tensor in others:
            if tensor is not None:
                if tensor.dtype not in _STATE_DTYPES or not tensor.is_contiguous() or tensor.device != x.device:
                    return False
                tensors.append(tensor)
        return is_readable_memory(tensors)


def _whitening_of(
    problem: JoinedProblem, x: Tensor, channel_tensors: tuple[Tensor | None, ...], matrices: Tensor | None
) -> JoinedWhitening | None:
    """Return what whitens x, None if the kernels can't read it or other tensors have the wrong sizes."""
    can_whiten = cached(JoinedProblem.can_whiten)(problem, tuple(x.shape), x.stride())
    return JoinedWhitening(problem) if can_whiten and problem.fits(x.shape, channel_tensors, matrices) else None
