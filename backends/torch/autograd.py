"""Whitening as one differentiable operation that keeps the input, and what is small beside it, for its backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import polywhiten.torch.namespace as xp
from polywhiten import checks
from polywhiten.cpu import is_available
from polywhiten.dispatch import Backend, framework_module
from polywhiten.functional import group_whiten_vjp, iter_norm_vjp
from polywhiten.gpu_launches import gpu_launches
from polywhiten.solvers import Solver
from polywhiten.solvers.minimax import minimax_steps, widest_interval
from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.cpu import CPUKernels
from polywhiten.torch.kernels import TorchKernels, is_memory, is_tracing, is_unobserved
from polywhiten.whitening import NO_STATISTICS, Plan, Statistics


def _plain() -> TorchKernels:
    return CPUKernels(xp) if is_available() else TorchKernels(xp)


def _kernels() -> TorchKernels:
    """Those in Triton where PyTorch is built for CUDA and Triton is there; 3.2 ends the process on half precision."""
    if torch.version.cuda is None or find_spec("triton") is None:
        return _plain()
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        return _plain()
    from polywhiten.torch.triton.kernels import FusedKernels

    return FusedKernels(xp)


_SMALL = 0.01  # a share of the input


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
        y, stats = BACKEND.kernels.whiten(plan, x, weight, bias)
        return _own(y), *stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, ctx.plan = inputs
        _, *stats = output
        ctx.save_for_backward(x, weight, bias, *_kept(ctx.plan, x, stats))
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():  # which takes no second derivatives, but has gradients of 0 for all outputs
            ctx.mark_non_differentiable(*stats)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dstats: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, *kept = ctx.saved_tensors
        if dy is None:  # the loss depends on the statistics alone
            dy = x.new_zeros(()).expand_as(x)
        if len(kept) < 3 and torch.is_grad_enabled():
            _, *kept = _Whiten.apply(x, weight, bias, ctx.plan)
        if torch.compiler.is_compiling():
            dstats = NO_STATISTICS
        if len(kept) == 2 and kept[1].ndim == 2:
            kept[1] = _unfolded(kept[1])
        stats = Statistics(*kept, *[None] * (3 - len(kept)))
        gradients = BACKEND.kernels.whiten_adjoint(ctx.plan, x, weight, bias, stats, dy, Statistics(*dstats))
        return *gradients, None


def _own(y: Tensor) -> Tensor:
    """Y, which is nobody else's, as no view.

    One that a function returns beside others can't be changed in place, by ReLU say, nor can one of no_grad's with
    what has a gradient.
    """
    result: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
    return result


def _kept(plan: Plan, x: Tensor, stats: Sequence[Tensor]) -> Sequence[Tensor]:
    """The statistics that aren't computed again in backward: as many of them as are small beside x.

    Of the covariance half, where all of it isn't small. All statistics where it takes another exchange between workers
    to compute them again, and where others decide what is kept.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or plan.all_reduce is not None:
        return stats
    if BACKEND.kernels.keeps_statistics(plan.solver, x):
        return stats
    sizes = accumulate(each.numel() for each in stats)
    number = sum(size <= _SMALL * x.numel() for size in sizes)
    if number > 1:
        return stats[:number]
    mean, cov, _ = stats
    small = (cov.numel() + 3 * mean.numel()) / 2 <= _SMALL * x.numel()
    if small and is_unobserved([cov]):  # a tracer's tensors take no others as indices
        return mean, _folded(cov)
    return ()  # the mean alone saves no work


def _folded(cov: Tensor) -> Tensor:
    """Covariances (blocks, d, d) without what is below their diagonals, (blocks, d (d + 1) / 2)."""
    upper, _ = _triangle(cov.shape[-1])
    return cov.reshape(len(cov), -1).index_select(1, upper)


def _unfolded(folded: Tensor) -> Tensor:
    """These covariances again."""
    d = math.isqrt(2 * folded.shape[1])
    _, places = _triangle(d)
    return folded.index_select(1, places).reshape(-1, d, d)


@lru_cache(maxsize=8)
def _triangle(d: int) -> tuple[Tensor, Tensor]:
    """Where the numbers above a matrix's diagonal and on it are; and the place among them of each of the matrix."""
    given: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}  # whatever the default device is
    rows, columns = torch.triu_indices(d, d, **given)
    places = torch.empty(d, d, **given)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), **given)
    return rows * d + columns, places.reshape(-1)


# else PyTorch finds it out in every call, which takes as long as a small kernel
_Whiten.forward.__signature__ = signature(_Whiten.forward)  # type: ignore[attr-defined]


class _Joined(torch.autograd.Function):
    """Whitening by kernels that do all of it, with the statistics kept for backward and no outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, joined: Any, averages: RunningAverages | None
    ) -> Tensor:
        with BACKEND.kernels.on_its_device(x):
            y, stats = joined.forward(x, weight, bias, averages)
        ctx.save_for_backward(x, weight, bias, *stats)
        ctx.joined = joined
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *stats = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not is_memory((x, dy))):
            return *_observed_gradients(ctx.joined, x, weight, bias, dy), None, None
        with BACKEND.kernels.on_its_device(x):
            return *ctx.joined.backward(x, weight, bias, stats, dy), None, None


def _observed_gradients(
    joined: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor
) -> tuple[Tensor | None, ...]:
    """By operations that PyTorch looks into, for a second derivative or a batch of gradients say."""
    function, groups = (group_whiten_vjp, "num_groups") if joined.of_samples else (iter_norm_vjp, "group_size")
    options = {groups: joined.groups, "axis": joined.axis, "iterations": joined.iterations, "eps": joined.eps}
    _, pullback = function(x, weight=weight, bias=bias, **options)
    gradients: tuple[Tensor | None, ...] = pullback(dy)
    return gradients


class TorchBackend(Backend):
    """PyTorch's kernels, with whitening as an operation of its own."""

    kernels: TorchKernels

    def whiten_groups(
        self,
        of_samples: bool,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        axis: int,
        solver: Solver,
        eps: float,
        averages: RunningAverages | None = None,
    ) -> Tensor | None:
        """By kernels that do all of it, where there are some."""
        tensors = x, weight, bias, *(averages or ())[:3]
        joined = self.kernels.joined(of_samples, axis, groups, solver, eps, *tensors)
        if joined is None:
            return None
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors[:3]):
            result: Tensor = _Joined.apply(x, weight, bias, joined, averages)
            return result
        with self.kernels.on_its_device(x):
            y: Tensor = joined.forward(x, weight, bias, averages)[0]
            return y

    def apply_frozen(
        self, x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int
    ) -> Tensor | None:
        """By a kernel that does all of it, where there is one."""
        return self.kernels.frozen(axis, mean, whitener, x, weight, bias)

    def whiten(self, plan: Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """Y and the statistics, all differentiable."""
        given = [tensor for tensor in (x, weight, bias) if tensor is not None]
        if not torch.compiler.is_compiling() and is_unobserved(given):
            y, stats = self.kernels.whiten(plan, x, weight, bias)
            return _own(y), stats
        if is_tracing():
            return self.kernels.whiten(plan, x, weight, bias)
        y, *stats = _Whiten.apply(x, weight, bias, plan)
        return y, Statistics(*stats)

    def snapshot(self, state: Tensor, *given: Tensor | None) -> Tensor:
        """A copy where a graph of operations on what is given is recorded."""
        # a trace has the state as an input of its own, which no later step changes
        recorded = (
            torch.is_grad_enabled()
            and not is_tracing()
            and any(tensor is not None and tensor.requires_grad for tensor in given)
        )
        return state.clone() if recorded else state

    def converted(self, values: Any, name: str, x: Tensor) -> Tensor:
        """Tensors alone, and on the device of x: PyTorch's functions convert nothing."""
        if not isinstance(values, Tensor):
            raise checks.wrong_type(values, name, f"a tensor, as torch.as_tensor({name}, device=x.device)")
        if values.device != x.device:
            raise ValueError(f"{name} is on {values.device} and x on {x.device}: move it, as {name}.to(x.device)")
        return values

    def in_memory_order(self, x: Tensor, axis: int) -> tuple[Tensor, int, Callable[[Tensor], Tensor]]:
        """Channels-last tensors as they are in memory: they aren't copied, and the result is channels-last too."""
        if axis == 1 and x.ndim > 2 and x.stride(1) == 1 != x.stride(-1):
            last = x.ndim - 1
            return x.permute(0, *range(2, x.ndim), 1), last, lambda y: y.permute(0, last, *range(1, last))
        return x, axis, lambda y: y


BACKEND = TorchBackend(_kernels())

# torch.compile need trace neither how a backend is found nor how coefficients are computed: its constants
for _constant in (framework_module, gpu_launches, minimax_steps, widest_interval):
    torch.compiler.assume_constant_result(_constant)
