"""Whitening as autograd functions, which save the input and little beside it for backward."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from polywhiten.backend import Backend
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.torch._internals import as_non_view, is_readable_memory
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.kernels import on_device_of
from polywhiten.torch.saved_statistics import restored_statistics, saved_statistics


class Whiten(torch.autograd.Function):
    """Forward and backward of a backend, for an array of equal blocks.

    The statistics are outputs too, because backward uses them. A second derivative therefore calls backward again, with
    gradients of the statistics.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: WhiteningSpec, backend: Backend
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, stats = backend.forward(spec, x, weight, bias)
        return as_non_view(y), *stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.spec, ctx.backend = inputs
        _, *stats = output
        ctx.save_for_backward(x, weight, bias, *saved_statistics(ctx.spec, x, stats))
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():  # it takes no second derivatives, but makes gradients of 0 for all outputs
            ctx.mark_non_differentiable(*stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dstats: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, *saved = ctx.saved_tensors
        if dy is None:  # the loss depends on the statistics alone
            dy = x.new_zeros(()).expand_as(x)
        if len(saved) < 3 and torch.is_grad_enabled():
            _, *saved = Whiten.apply(x, weight, bias, ctx.spec, ctx.backend)
        if torch.compiler.is_compiling():
            dstats = NO_STATISTICS
        stats = restored_statistics(saved)
        return *ctx.backend.backward(ctx.spec, x, weight, bias, stats, dy, Statistics(*dstats)), None, None


# Otherwise PyTorch finds the signature in every call, which takes as long as a small kernel.
Whiten.forward.__signature__ = signature(Whiten.forward)  # type: ignore[attr-defined]


class WhitenJoined(torch.autograd.Function):
    """Forward and backward of joined launches; the statistics are saved for backward and aren't outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: WhiteningSpec,
        backend: Backend,
        joined: Any,
        averages: RunningAverages | None,
    ) -> Tensor:
        y: Tensor
        with on_device_of(x):
            y, stats = joined.forward(x, weight, bias, averages)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.spec, ctx.backend, ctx.joined = spec, backend, joined
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *stats = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not is_readable_memory((x, dy))):
            # other kernels, which PyTorch can record or transform, for example for a second derivative
            _, pullback = ctx.backend.vjp(ctx.spec, x, weight, bias)
            return *pullback(dy), None, None, None, None
        with on_device_of(x):
            return *ctx.joined.backward(x, weight, bias, stats, dy), None, None, None, None
