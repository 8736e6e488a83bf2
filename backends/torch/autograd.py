"""Whitening as one differentiable operation that keeps the input and O(d^2) for its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polywhiten import whitening
from polywhiten.dispatch import Backend, framework_module
from polywhiten.kernels import Kernels
from polywhiten.solvers.minimax import minimax_steps
from polywhiten.torch.kernels import KERNELS
from polywhiten.whitening import Plan, Statistics


class _Whiten(torch.autograd.Function):
    """The core's forward and backward.

    The statistics are outputs too, so that what backward computes from them has a derivative of its own: a second
    derivative comes back here as gradients of the statistics.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, stats = whitening.forward(KERNELS, plan, x, weight, bias)
        return y, *stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.plan = inputs
        _, *stats = output
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dstats: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, *stats = ctx.saved_tensors
        if dy is None:  # the loss depends on the statistics alone
            dy = x.new_zeros(()).expand_as(x)
        gradients = whitening.backward(KERNELS, ctx.plan, x, weight, bias, Statistics(*stats), dy, Statistics(*dstats))
        return *gradients, None


def _whiten(
    kernels: Kernels, plan: Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Statistics]:
    y, *stats = _Whiten.apply(x, weight, bias, plan)
    return y, Statistics(*stats)


def _in_memory_order(x: Tensor, axis: int) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
    """A channels-last tensor as what it is in memory, so that it isn't copied and the result is channels-last too."""
    if axis == 1 and x.ndim > 2 and x.stride(1) == 1 != x.stride(-1):
        return x.movedim(1, -1), x.ndim - 1, lambda y: y.movedim(-1, 1)
    return x, axis, lambda y: y


BACKEND = Backend(KERNELS, _whiten, _in_memory_order)

# torch.compile need trace neither how a backend is found nor how coefficients are computed: its constants
for _constant in (framework_module, minimax_steps):
    torch.compiler.assume_constant_result(_constant)
