"""IterNorm and group whitening with joined launches: two forward, or one for small samples, and two backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.triton.counting import counters
from polywhiten.torch.triton.plans import (
    Types,
    Whitening,
    plan_channels_backward,
    plan_forward,
    plan_frozen,
    plan_samples_backward,
)
from polywhiten.torch.triton.prepared import Pointer, current_stream
from polywhiten.torch.triton.tiles import precision

_KEPT_PLANS = 1024


class Joined(Whitening):
    """Whitening of tensors that `polywhiten.torch.triton.kernels.FusedKernels.joined` has looked at."""

    __slots__ = ()

    def serves(self, x: Tensor) -> bool:
        """Whether the kernels can read x as it lies in memory, and write a result for it."""
        serves: bool = _kept(_serves)(self, tuple(x.shape), x.stride())
        return serves

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, averages: RunningAverages | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return y and the tensors that hold the statistics, and update `averages` in place."""
        y = torch.empty_like(x)
        with_averages = None if averages is None else (averages.momentum, averages.of_covariance)
        types = _types(x, weight, bias, *(averages or ())[:3])
        plan = _kept(plan_forward)(
            self, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), with_averages, types
        )
        stats = plan.stats.allocate(x, rank=0)
        cov, whitener, mean = plan.stats.pointers(stats)
        scratch, verdicts = plan.scratch.pointers(plan.scratch.allocate(x, rank=3))
        running = (None, None, None) if averages is None else averages[:3]
        of_rows, of_channels = ((None, None), (weight, bias)) if self.of_samples else ((weight, bias), (None, None))
        stream = current_stream(x.device)
        counted = counters(x.device, stream, plan.counters, rank=0)
        plan.sums(stream, x, mean, cov, whitener, scratch, verdicts, counted, *running, y, *of_channels)
        if plan.map is not None:
            averaged = cov if averages is not None and averages.of_covariance else whitener
            plan.map(stream, y, x, mean, averaged, whitener, verdicts, *running, *of_rows, *of_channels)
        if averages is not None:
            _count_changes(averages)
        return y, stats

    def backward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: list[Tensor], dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias."""
        if not _kept(Whitening.reads)(self, tuple(dy.shape), dy.stride()):
            dy = torch.empty_like(x).copy_(dy)
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        shape, types = tuple(x.shape), _types(x, weight, bias, dy)
        plan = _kept(plan_samples_backward if self.of_samples else plan_channels_backward)(
            self, shape, dy.stride(), x.stride(), dx.stride(), precision(x.dtype), types
        )
        cov, whitener, mean = plan.stats.pointers(stats)
        scratch, *parts = plan.scratch.pointers(plan.scratch.allocate(x, rank=5))
        stream = current_stream(x.device)
        counted = counters(x.device, stream, plan.counters, rank=1)
        of_sums = (dweight, dbias)
        of_map: tuple[Pointer, ...] = (None, None, None, None, None)
        if self.of_samples:
            of_weight, of_bias = None if weight is None else parts[0], None if bias is None else parts[1]
            of_sums, of_map = (of_weight, of_bias), (weight, of_weight, of_bias, dweight, dbias)
        plan.sums(stream, dy, x, mean, cov, whitener, weight, scratch, counted, *of_sums)
        plan.map(stream, dx, dy, x, mean, scratch, *of_map)
        return dx, dweight, dbias

    def frozen(self, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Groups of channels whitened by given statistics (C,) and (groups, d, d)."""
        y = torch.empty_like(x)
        types = _types(x, mean, whitener, weight, bias)
        launch = _kept(plan_frozen)(self, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), types)
        none = None, None, None
        launch(current_stream(x.device), y, x, mean, None, whitener, None, *none, weight, bias, None, None)
        return y


def _serves(whitening: Whitening, shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    result = torch.empty_like(torch.empty_strided(shape, stride, device="meta"))  # in another order than x with gaps
    return whitening.reads(shape, stride) and whitening.reads(shape, result.stride())


def _kept(plan: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a cache of its results; as it is while PyTorch compiles, which can't follow a cache."""
    return plan if torch.compiler.is_compiling() else _PLANS[plan]


def _types(x: Tensor, *others: Tensor | None) -> Types:
    """Return the tensors' dtypes and the device: kernels are compiled for these, so plans are kept by them."""
    return (*[None if each is None else each.dtype for each in (x, *others)], x.device)


def _count_changes(averages: RunningAverages) -> None:
    """Increment the version counters, as operations in place do, so that autograd notices the change."""
    if not torch.compiler.is_compiling():
        for each in averages[:3]:
            if each is not None:
                increment_version(each)


_PLANS: dict[Callable[..., Any], Callable[..., Any]] = {
    plan: lru_cache(_KEPT_PLANS)(plan)
    for plan in (_serves, Whitening.reads, plan_forward, plan_frozen, plan_channels_backward, plan_samples_backward)
}
