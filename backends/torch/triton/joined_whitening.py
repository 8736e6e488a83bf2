"""Whitening by the joined kernels: two launches forward, or one for small samples, and two backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from polywhiten.reference import Gradients
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.triton.joined_plans import (
    Types,
    plan_channels_backward,
    plan_forward,
    plan_frozen,
    plan_samples_backward,
)
from polywhiten.torch.triton.joined_problem import JoinedProblem
from polywhiten.torch.triton.last_program import get_counters
from polywhiten.torch.triton.plan_cache import cached
from polywhiten.torch.triton.prepared_launch import Pointer, current_stream
from polywhiten.torch.triton.tiles import precision


class JoinedWhitening(NamedTuple):
    """Forward and backward for tensors that the joined kernels can read."""

    problem: JoinedProblem

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, averages: RunningAverages | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return y and the tensors that `backward` needs again, and update the averages in place."""
        y = torch.empty_like(x)
        averaging = None if averages is None else (averages.momentum, averages.of_covariance)
        types = _types(x, weight, bias, *(averages or ())[:3])
        plan = cached(plan_forward)(
            self.problem, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), averaging, types
        )
        saved = plan.saved.allocate(x, rank=0)
        cov, whitener, mean = plan.saved.pointers(saved)
        workspace, averaging_factors = plan.workspace.pointers(plan.workspace.allocate(x, rank=3))
        state = averaging_factors, *((None, None, None) if averages is None else averages[:3])
        row_affine, channel_affine = (weight, bias), (None, None)
        if self.problem.of_samples:
            row_affine, channel_affine = channel_affine, row_affine
        stream = current_stream(x.device)
        counters = get_counters(x.device, stream, plan.num_counters, rank=0)
        plan.statistics(stream, x, y, mean, cov, whitener, workspace, counters, *state, *channel_affine)
        if plan.map is not None:
            averaged = cov if averages is not None and averages.of_covariance else whitener
            factors, *running = state
            plan.map(stream, x, y, mean, whitener, factors, averaged, *running, *row_affine, *channel_affine)
        if averages is not None:
            _count_changes(averages)
        return y, saved

    def backward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, saved: list[Tensor], dy: Tensor
    ) -> Gradients:
        """Return the gradients of x, weight and bias from that of y and what `forward` has saved."""
        problem = self.problem
        if not cached(JoinedProblem.can_read)(problem, tuple(dy.shape), dy.stride()):
            dy = torch.empty_like(x).copy_(dy)
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias is None else torch.empty_like(bias)
        shape, strides = tuple(x.shape), (dy.stride(), x.stride(), dx.stride())
        plan_backward = plan_samples_backward if problem.of_samples else plan_channels_backward
        plan = cached(plan_backward)(problem, shape, *strides, precision(x.dtype), _types(x, weight, bias, dy))
        cov, whitener, mean = plan.saved.pointers(saved)
        workspace, *parts = plan.workspace.pointers(plan.workspace.allocate(x, rank=5))
        first_outputs: tuple[Pointer, ...] = (dweight, dbias)
        map_parameters: tuple[Pointer, ...] = (None, None, None, None, None)
        if problem.of_samples:  # the first launch stores parts of these gradients, and the map adds them up
            first_outputs = tuple(None if p is None else part for p, part in zip((weight, bias), parts, strict=True))
            map_parameters = (weight, *first_outputs, dweight, dbias)
        stream = current_stream(x.device)
        counters = get_counters(x.device, stream, plan.num_counters, rank=1)
        plan.cross_moments(stream, dy, x, mean, cov, whitener, weight, workspace, counters, *first_outputs)
        plan.map(stream, dx, dy, x, mean, workspace, *map_parameters)
        return dx, dweight, dbias

    def apply_frozen(
        self, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Whiten groups of channels by frozen statistics, mean (C,) and whitener (groups, d, d)."""
        y, types = torch.empty_like(x), _types(x, mean, whitener, weight, bias)
        launch = cached(plan_frozen)(self.problem, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), types)
        no_averages = None, None, None, None, None  # factors, matrices, and the three averages
        launch(current_stream(x.device), x, y, mean, whitener, *no_averages, weight, bias, None, None)
        return y


def _types(x: Tensor, *others: Tensor | None) -> Types:
    """Return the tensors' dtypes and the device: kernels are compiled for these, so plans are looked up by them."""
    return (*[None if tensor is None else tensor.dtype for tensor in (x, *others)], x.device)


def _count_changes(averages: RunningAverages) -> None:
    """Increment the version counters, as operations in place do, so that autograd notices the change."""
    if not torch.compiler.is_compiling():
        for average in averages[:3]:
            if average is not None:
                increment_version(average)
