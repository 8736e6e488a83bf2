"""PyTorch's backend: whitening as differentiable operations that save the input and little beside it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

import polywhiten.torch.namespace as xp
from polywhiten import checks
from polywhiten.backend import Backend, Implementation
from polywhiten.blocks import SampleGroups
from polywhiten.dispatch import framework_module
from polywhiten.functional import group_whiten_vjp, iter_norm_vjp
from polywhiten.gpu_launches import gpu_launches
from polywhiten.reference import Gradients
from polywhiten.solvers.minimax import minimax_steps, widest_interval
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.cpu import TorchCpuImplementation
from polywhiten.torch.kernels import (
    TorchKernels,
    can_bypass_autograd,
    full_precision,
    is_readable_memory,
    is_tracing,
    on_device_of,
)
from polywhiten.torch.saved_statistics import restored_statistics, saved_statistics


class _Whiten(torch.autograd.Function):
    """Forward and backward of the backend.

    The statistics are outputs too, so that what backward computes from them has a derivative: a second derivative
    comes back here as gradients of the statistics.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: WhiteningSpec
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, stats = BACKEND.forward(spec, x, weight, bias)
        return _as_non_view(y), *stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.spec = inputs
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
            _, *saved = _Whiten.apply(x, weight, bias, ctx.spec)
        if torch.compiler.is_compiling():
            dstats = NO_STATISTICS
        stats = restored_statistics(saved)
        return *BACKEND.backward(ctx.spec, x, weight, bias, stats, dy, Statistics(*dstats)), None


# Otherwise PyTorch finds the signature in every call, which takes as long as a small kernel.
_Whiten.forward.__signature__ = signature(_Whiten.forward)  # type: ignore[attr-defined]


class _WhitenJoined(torch.autograd.Function):
    """Whitening by kernels that do all of it; the statistics are saved for backward, and are no outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: WhiteningSpec,
        joined: Any,
        averages: RunningAverages | None,
    ) -> Tensor:
        with on_device_of(x):
            y, stats = joined.forward(x, weight, bias, averages)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.spec, ctx.joined = spec, joined
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *stats = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not is_readable_memory((x, dy))):
            return *_observed_gradients(ctx.spec, x, weight, bias, dy), None, None, None
        with on_device_of(x):
            return *ctx.joined.backward(x, weight, bias, stats, dy), None, None, None


def _observed_gradients(
    spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor
) -> Gradients:
    """Compute the gradients by operations that PyTorch records or transforms, for a second derivative say."""
    options = {"axis": spec.blocks.axis, "iterations": spec.solver.newton_steps(4), "eps": spec.eps}
    if isinstance(spec.blocks, SampleGroups):
        _, pullback = group_whiten_vjp(x, weight=weight, bias=bias, num_groups=spec.blocks.num_groups, **options)
    else:
        _, pullback = iter_norm_vjp(x, weight=weight, bias=bias, group_size=spec.blocks.group_size, **options)
    return pullback(dy)


def _as_non_view(y: Tensor) -> Tensor:
    """Return y as a non-view tensor, so that in-place operations on it are allowed.

    A view that a function returns beside other tensors can't be changed in place, by ReLU for example.
    """
    result: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return result


class TorchBackend(Backend):
    """PyTorch's implementations, with whitening as a differentiable operation.

    Parameters
    ----------
    kernels : TorchKernels
        Those whose every derivative PyTorch knows.
    *faster : Implementation
        As for `Backend`.
    joined : polywhiten.torch.triton.joined.JoinedKernels, optional
        Kernels that whiten arrays with any groups, and update running averages, in two launches.
    """

    def __init__(self, kernels: TorchKernels, *faster: Implementation, joined: Any = None) -> None:
        super().__init__(kernels, *faster)
        self.joined = joined

    def whiten(self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Whiten an array, by one operation if kernels for all of it serve the array."""
        y = self.whiten_and_average(spec, x, weight, bias, None)
        return super().whiten(spec, x, weight, bias) if y is None else y

    def whiten_and_average(
        self,
        spec: WhiteningSpec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        averages: RunningAverages | None,
    ) -> Tensor | None:
        """Whiten an array and update running averages in place, or return None without kernels for all of that."""
        joined = None if self.joined is None else self.joined.whitening(spec, x, weight, bias, averages)
        if joined is None:
            return None
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
            result: Tensor = _WhitenJoined.apply(x, weight, bias, spec, joined, averages)
            return result
        with on_device_of(x):
            y: Tensor = joined.forward(x, weight, bias, averages)[0]
            return y

    def _whiten_parts(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, list[Statistics]]:
        """Whiten a channels-last tensor in its memory order: it isn't copied, and the result is channels-last too."""
        ordered, axis, restore = self.in_memory_order(x, spec.blocks.axis)
        if ordered is not x:
            spec = spec.at_axis(axis)
        y, stats = super()._whiten_parts(spec, ordered, weight, bias)
        return restore(y), stats

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten an array of equal blocks; the result and the statistics are differentiable."""
        inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
        if not torch.compiler.is_compiling() and can_bypass_autograd(inputs):
            y, stats = self.forward(spec, x, weight, bias)
            return _as_non_view(y), stats
        if is_tracing():
            return self.forward(spec, x, weight, bias)
        y, *stats = _Whiten.apply(x, weight, bias, spec)
        return y, Statistics(*stats)

    @full_precision
    def forward(
        self, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Statistics]:
        """Whiten an array of equal blocks, on its device and without autocast."""
        with on_device_of(x):
            return super().forward(spec, x, weight, bias)

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
            return super().backward(spec, x, weight, bias, stats, dy, dstats)

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

    def in_memory_order(self, x: Tensor, axis: int) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
        """Return channels-last tensors (N, C, ...) as (N, ..., C), the channel axis, and what restores a result."""
        if axis == 1 and x.ndim > 2 and x.stride(1) == 1 != x.stride(-1):
            last = x.ndim - 1
            return x.permute(0, *range(2, x.ndim), 1), last, lambda y: y.permute(0, last, *range(1, last))
        return x, axis, lambda y: y

    def snapshot(self, state: Tensor, *inputs: Tensor | None) -> Tensor:
        """Return a copy if a graph of operations on the inputs is recorded."""
        # a trace has the state as an input of its own, which no later step changes
        recorded = (
            torch.is_grad_enabled()
            and not is_tracing()
            and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        )
        return state.clone() if recorded else state

    def converted(self, values: Any, name: str, x: Tensor) -> Tensor:
        """Return tensors on the device of x as they are: PyTorch's functions convert nothing."""
        if not isinstance(values, Tensor):
            raise checks.wrong_type(values, name, f"a tensor, as torch.as_tensor({name}, device=x.device)")
        if values.device != x.device:
            raise ValueError(f"{name} is on {values.device} and x on {x.device}: move it, as {name}.to(x.device)")
        return values


def _backend() -> TorchBackend:
    """Return the backend with all kernels that work here: Triton's need CUDA, and 3.2 crashes on half precision."""
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

# Constants for torch.compile, which need not trace how a backend is found or how coefficients are computed.
for _constant in (framework_module, gpu_launches, minimax_steps, widest_interval):
    torch.compiler.assume_constant_result(_constant)
