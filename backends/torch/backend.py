"""PyTorch's backend: its implementations, and how its tensors behave."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

import polywhiten.torch.namespace as xp
from polywhiten import checks
from polywhiten.backend import Backend, Implementation
from polywhiten.dispatch import framework_module
from polywhiten.gpu_launches import gpu_launches
from polywhiten.layer_entry import whiten_masked
from polywhiten.moments import Float64, Moments
from polywhiten.reference import Gradients
from polywhiten.rows import RowInput, RowMap
from polywhiten.solvers.minimax import minimax_steps, widest_interval
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics, WhiteningStats
from polywhiten.torch import shared_whitening
from polywhiten.torch._internals import as_non_view, assume_constant_result, can_bypass_autograd
from polywhiten.torch.autograd import Whiten, WhitenJoined
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.cpu import TorchCpuImplementation
from polywhiten.torch.kernels import TorchKernels, full_precision, is_tracing, on_device_of


class TorchBackend(Backend):
    """PyTorch's implementations, with gradients by autograd, for tensors on any device and in any memory format.

    Parameters
    ----------
    kernels, *faster
        As for `Backend`.
    joined : polywhiten.torch.triton.joined.JoinedKernels, optional
        Kernels that whiten an array with any groups and update running averages, in two launches.
    """

    def __init__(self, kernels: TorchKernels, *faster: Implementation, joined: Any = None) -> None:
        super().__init__(kernels, *faster)
        self.joined = joined

    def whiten(self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Whiten an array, by joined launches if they support it."""
        y = self.whiten_and_average(spec, x, weight, bias, None)
        return self._whiten_parts(spec, x, weight, bias)[0] if y is None else y

    def whiten_and_average(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        averages: RunningAverages | None,
    ) -> Tensor | None:
        """Whiten an array and update running averages in place, or return None if no joined launches support that."""
        y: Tensor
        joined = None if self.joined is None else self.joined.whitening(spec, x, weight, bias, averages)
        if joined is None:
            return None
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
            y = WhitenJoined.apply(x, weight, bias, spec, self, joined, averages)
            return y
        with on_device_of(x):
            y, _ = joined.forward(x, weight, bias, averages)
        return y

    def _whiten_parts(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, list[Statistics]]:
        """Whiten a channels-last tensor without a copy, as a permuted view; the result is channels-last too."""
        ordered, axis, restore = self.in_memory_order(x, spec.blocks.axis)
        if ordered is not x:
            spec = spec.at_axis(axis)
        if shared_whitening.is_shared(spec):
            y, shared = self.whiten_blocks(spec, ordered, weight, bias)
            return restore(y), [shared]
        y, stats = super()._whiten_parts(spec, ordered, weight, bias)
        return restore(y), stats

    @full_precision
    def whiten_masked(
        self, spec: WhiteningSpec, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, WhiteningStats, Tensor]:
        """Whiten all positions by the statistics of those where `mask` is true; return these and their number too.

        The mask has the shape of x without its channel axis. Autograd records the operations one by one.
        """
        x, axis, restore = self.in_memory_order(x, spec.blocks.axis)
        with on_device_of(x):
            y, stats, count = whiten_masked(self, spec.at_axis(axis), x, mask, weight, bias)
        return restore(y if torch.is_grad_enabled() or is_tracing() else as_non_view(y)), stats, count

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten an array of equal blocks; autograd can differentiate the result and the statistics."""
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
        if not torch.compiler.is_compiling() and can_bypass_autograd(inputs):
            y, stats = self.forward(spec, x, weight, bias)
            return as_non_view(y), stats
        if is_tracing():
            return self.forward(spec, x, weight, bias)
        y, *stats = Whiten.apply(x, weight, bias, spec, self)
        return y, Statistics(*stats)

    @full_precision
    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten an array of equal blocks, on its device and without autocast."""
        with on_device_of(x):
            if shared_whitening.is_shared(spec):
                return shared_whitening.forward(self, spec, x, weight, bias)
            return self.implementation(spec, x, weight, bias).forward(spec, x, weight, bias)

    @full_precision
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
        """Return the gradients of `forward`, on the device of x and without autocast."""
        with on_device_of(x):
            if shared_whitening.is_shared(spec):
                return shared_whitening.backward(self, spec, x, weight, bias, stats, dy, dstats)
            implementation = self.implementation(spec, x, weight, bias, dy, *stats, *dstats)
            return implementation.backward(spec, x, weight, bias, stats, dy, dstats)

    def statistics(self, spec: WhiteningSpec, x: Tensor) -> WhiteningStats:
        """Return the statistics of an array, or of the batch that it is a part of."""
        return (
            shared_whitening.statistics(self, spec, x)
            if shared_whitening.is_shared(spec)
            else super().statistics(spec, x)
        )

    def apply_frozen(
        self, axis: int, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return diag(weight) whitener (x - mean) + bias, in the memory order of x."""
        if self.joined is not None:
            y: Tensor | None = self.joined.apply_frozen(axis, x, mean, whitener, weight, bias)
            if y is not None:
                return y
        x, axis, restore = self.in_memory_order(x, axis)
        with on_device_of(x):
            return restore(super().apply_frozen(axis, x, mean, whitener, weight, bias))

    @full_precision
    @torch.no_grad()
    def moments(self, x: Tensor, weights: Float64 | None, read: RowInput, *, fourth: bool = False) -> Moments:
        """Return the moments of rows, computed on their device."""
        with on_device_of(x):
            return super().moments(x, weights, read, fourth=fourth)

    @full_precision
    @torch.no_grad()
    def map_rows(self, x: Tensor, row_map: RowMap, read: RowInput) -> Tensor:
        """Return the outputs of a map for rows, computed on their device."""
        with on_device_of(x):
            y: Tensor = super().map_rows(x, row_map, read)
            return y

    def to_numpy(self, x: Tensor) -> npt.NDArray[Any]:
        """Return an array of NumPy, from any device."""
        return x.detach().cpu().numpy()

    def in_memory_order(self, x: Tensor, axis: int) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
        """Return a channels-last tensor (N, C, ...) as (N, ..., C), its channel axis, and what restores a result.

        Likewise, a tensor (N, ..., C) that is a permuted view of a contiguous one (N, C, ...) is returned as that one.
        """
        last = x.ndim - 1
        to_last, to_first = (0, *range(2, x.ndim), 1), (0, last, *range(1, last))
        if axis == 1 and last > 1 and x.stride(1) == 1 != x.stride(last):
            return x.permute(to_last), last, lambda y: y.permute(to_first)
        if axis == last > 1 and x.stride(last) != 1 == x.stride(last - 1):
            return x.permute(to_first), 1, lambda y: y.permute(to_last)
        return x, axis, lambda y: y

    def snapshot(self, state: Tensor, *inputs: Tensor | None) -> Tensor:
        """Return a layer's state, or a copy if autograd records operations on the inputs.

        A trace needs no copy: no training step changes the state that it has recorded.
        """
        recorded = (
            torch.is_grad_enabled()
            and not is_tracing()
            and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        )
        return state.clone() if recorded else state

    def converted(self, values: Any, name: str, x: Tensor) -> Tensor:
        """Return a tensor on the device of x as it is; raise an error for anything else, as PyTorch's functions do."""
        if not isinstance(values, Tensor):
            raise checks.wrong_type(values, name, f"a tensor, as torch.as_tensor({name}, device=x.device)")
        if values.device != x.device:
            raise ValueError(f"{name} is on {values.device} and x on {x.device}: move it, as {name}.to(x.device)")
        return values


def _backend() -> TorchBackend:
    """Return the backend with all kernels that work here.

    Triton's kernels need CUDA, and Triton 3.3, because 3.2 crashes on half precision.
    """
    plain, cpu = TorchKernels(xp), TorchCpuImplementation()
    if torch.version.cuda is None or find_spec("triton") is None:
        return TorchBackend(plain, cpu)
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        return TorchBackend(plain, cpu)
    from polywhiten.torch.triton.joined import JoinedKernels
    from polywhiten.torch.triton.separate import SeparateImplementation

    return TorchBackend(plain, SeparateImplementation(), cpu, joined=JoinedKernels())


BACKEND = _backend()

# torch.compile takes the results of these as constants and doesn't trace how a backend is found, for example.
for _constant in (framework_module, gpu_launches, minimax_steps, widest_interval):
    assume_constant_result(_constant)
