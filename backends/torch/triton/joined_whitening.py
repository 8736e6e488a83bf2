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
        y, of_samples = torch.empty_like(x), self.problem.of_samples
        averaging = None if averages is None else (averages.momentum, averages.of_covariance)
        types = _types(x, weight, bias, *(averages or ())[:3])
        plan = cached(plan_forward)(
            self.problem, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), averaging, types
        )
        saved = plan.saved.allocate(x, rank=0)
        cov, whitener, mean = plan.saved.pointers(saved)
        workspace, averaging_factors = plan.workspace.pointers(plan.workspace.allocate(x, rank=3))
        pointers: dict[str, Pointer] = {
            "x": x,
            "y": y,
            "mean": mean,
            "whitener": whitener,
            "weight": weight if of_samples else None,
            "bias": bias if of_samples else None,
            "averaging_factors": averaging_factors,
            **_average_pointers(averages),
        }
        stream = current_stream(x.device)
        counters = get_counters(x.device, stream, plan.num_counters, rank=0)
        plan.statistics(stream, cov=cov, workspace=workspace, counters=counters, **pointers)
        if plan.map is not None:
            plan.map(
                stream,
                averaged_matrices=cov if averages is not None and averages.of_covariance else whitener,
                row_scale=None if of_samples else weight,
                row_bias=None if of_samples else bias,
                **pointers,
            )
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
        shared: dict[str, Pointer] = {"dy": dy, "x": x, "mean": mean, "workspace": workspace}
        of_first: dict[str, Pointer] = {"dweight": dweight, "dbias": dbias}
        of_map: dict[str, Pointer] = {"dweight": None, "dbias": None, "dweight_parts": None, "dbias_parts": None}
        if problem.of_samples:  # the first launch stores parts of these gradients, and the map adds them up
            dweight_parts, dbias_parts = (
                None if parameter is None else part for parameter, part in zip((weight, bias), parts, strict=True)
            )
            of_map = {**of_first, "dweight_parts": dweight_parts, "dbias_parts": dbias_parts}
            of_first = {"dweight_parts": dweight_parts, "dbias_parts": dbias_parts}
        stream = current_stream(x.device)
        counters = get_counters(x.device, stream, plan.num_counters, rank=1)
        plan.cross_moments(stream, cov=cov, whitener=whitener, weight=weight, counters=counters, **of_first, **shared)
        plan.map(stream, dx=dx, weight=weight if problem.of_samples else None, **of_map, **shared)
        return dx, dweight, dbias

    def apply_frozen(
        self, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Whiten groups of channels by frozen statistics, mean (C,) and whitener (groups, d, d)."""
        y, types = torch.empty_like(x), _types(x, mean, whitener, weight, bias)
        launch = cached(plan_frozen)(self.problem, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), types)
        launch(
            current_stream(x.device),
            x=x,
            y=y,
            mean=mean,
            whitener=whitener,
            averaged_matrices=None,
            averaging_factors=None,
            row_scale=weight,
            row_bias=bias,
            weight=None,
            bias=None,
            **_average_pointers(None),
        )
        return y


def _average_pointers(averages: RunningAverages | None) -> dict[str, Pointer]:
    mean, matrices, num_batches = (None, None, None) if averages is None else averages[:3]
    return {"running_mean": mean, "running_matrices": matrices, "num_batches": num_batches}


def _types(x: Tensor, *others: Tensor | None) -> Types:
    """Return the tensors' dtypes and the device: kernels are compiled for these, so plans are looked up by them."""
    return (*[None if tensor is None else tensor.dtype for tensor in (x, *others)], x.device)


def _count_changes(averages: RunningAverages) -> None:
    """Increment the version counters, as operations in place do, so that autograd notices the change."""
    if not torch.compiler.is_compiling():
        for average in averages[:3]:
            if average is not None:
                increment_version(average)
