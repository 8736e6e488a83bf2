"""The kernels on PyTorch tensors: in full precision under autocast, and differentiable once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

import polywhiten.torch.namespace as xp
from polywhiten.kernels import Kernels, Term, regularized
from polywhiten.solvers import Solver

_ACCELERATOR = getattr(torch.accelerator.current_accelerator(), "type", "cpu")

_OLD_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")  # that of `torch.autograd.grad(is_grads_batched=True)`

P = ParamSpec("P")
R = TypeVar("R")


class _InverseSqrt(torch.autograd.Function):
    """W = S^(-1/2) with the solver's own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cov: Tensor, solver: Solver) -> Tensor:
        result: Tensor = solver.inverse_sqrt(xp, cov)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Solver], output: Tensor) -> None:
        cov, ctx.solver = inputs
        ctx.save_for_backward(cov)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (cov,) = ctx.saved_tensors
        return TorchKernels(xp).inverse_sqrt_adjoint(ctx.solver, cov, grad), None


class _Adjoint(torch.autograd.Function):
    """The adjoint of a solver with its own derivative: PyTorch's derivative of eigh is NaN for equal eigenvalues."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cov: Tensor, grad: Tensor, solver: Solver) -> Tensor:
        result: Tensor = solver.adjoint(xp, cov, grad)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Solver], output: Tensor) -> None:
        cov, grad, ctx.solver = inputs
        ctx.save_for_backward(cov, grad)

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.solver.adjoint_vjp(xp, *ctx.saved_tensors, direction), None


def full_precision(kernel: Callable[P, R]) -> Callable[P, R]:
    """Autocast would turn the kernels' products to half precision."""

    @wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(_ACCELERATOR)):
            return kernel(*args, **kwargs)  # entering and leaving costs as much as a small kernel
        with torch.autocast("cpu", enabled=False), torch.autocast(_ACCELERATOR, enabled=False):
            return kernel(*args, **kwargs)

    return run


class TorchKernels(Kernels):
    """Kernels whose every derivative PyTorch knows."""

    reads_any_order = True  # of the kernels that subclasses have

    moments = full_precision(Kernels.moments)
    cross_moments = full_precision(Kernels.cross_moments)

    @full_precision
    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Tensor | None,
        block_axis: int,
        dtype: torch.dtype,
        *,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Centres folded into the bias, which starts the sum of the products: no centred copy.

        A mean of 1e4 deviations costs float32 three digits of y here, the plain kernel two.
        """
        terms = self.scaled(terms, row_scale)
        offset = folded(terms, bias)
        shape = terms[0].array.shape
        wide = self.is_wide(terms[0].array)

        def for_every_product(matrix: Tensor) -> Tensor:
            return matrix.unsqueeze(1 - block_axis).expand(*shape[:2], -1, -1).reshape(-1, *matrix.shape[-2:])

        result = for_every_product(offset) if wide else offset.transpose(1, 2)
        for matrix, array, _ in terms:
            x = self.to_accumulation_dtype(array)
            if wide:
                result = torch.baddbmm(result, for_every_product(matrix), x.reshape(-1, *shape[2:]))
            else:
                result = torch.baddbmm(result, self._rows(x, block_axis), matrix.transpose(1, 2))
        result = result.reshape(shape) if wide else self._from_rows(result, shape, block_axis)
        return result.to(dtype)

    @full_precision
    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """W = (cov + eps I)^(-1/2)."""
        cov = regularized(xp, cov, eps)
        tracing = is_tracing()
        if tracing or torch.onnx.is_in_onnx_export():
            # ONNX has no eigendecomposition, and the derivative that a trace records is NaN for equal eigenvalues
            solver = solver.without_eigh()
        # an operation of its own costs as much as some of the solver's products: only where its derivative is asked for
        own = torch.is_grad_enabled() and not tracing
        result: Tensor = _InverseSqrt.apply(cov, solver) if own else solver.inverse_sqrt(xp, cov)
        return result

    @full_precision
    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Gradient with respect to cov."""
        cov = regularized(xp, cov, eps)
        plain = solver.adjoint_vjp is None
        result: Tensor = solver.adjoint(xp, cov, grad) if plain else _Adjoint.apply(cov, grad, solver)
        return result


def is_tracing() -> bool:
    """Whether a trace is recorded, by `torch.jit.trace` or for ONNX: none can be saved with an operation of our own."""
    result: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return result


def folded(terms: Sequence[Term], bias: Tensor | None) -> Tensor:
    """What the terms' centres and the bias (blocks, d) add to every sample, (blocks, d, 1)."""
    offset: Tensor = -sum(matrix @ centre.unsqueeze(-1) for matrix, _, centre in terms)
    return offset if bias is None else offset + bias.unsqueeze(-1)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on the device of x; compiled code sees to that itself."""
    return torch.cuda.device_of(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()


def can_bypass_autograd(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody but the caller sees how a result comes about.

    PyTorch does where it records operations for a derivative of theirs, where tensors may have tangents, in the
    transforms of `torch.func`, while it traces, and where tensors are of subclasses.
    """
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)) and is_readable_memory(
        tensors
    )


def is_readable_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are what a device's memory holds, so that kernels may read it; they may require a gradient.

    They are not in the transforms of `torch.func`, while PyTorch traces, with tangents, where they are of subclasses,
    and where memory has them with the other sign.
    """
    return not torch._C._are_functorch_transforms_active() and (
        torch.compiler.is_dynamo_compiling() or _have_memory(tensors)
    )


def _have_memory(tensors: Sequence[Tensor]) -> bool:
    """Not those of subclasses, nor those that a tracer follows: a kernel's launch is nothing that it would see.

    Nor those that PyTorch negates when it reads them, as the imaginary part of a conjugate.
    """
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_neg() for tensor in tensors)
    return (
        plain
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._dispatch_tls_is_dispatch_key_included(_OLD_VMAP)
    )
