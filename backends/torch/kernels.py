"""The kernels in PyTorch's operations: differentiable, and in full precision under autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

import polywhiten.torch.namespace as xp
from polywhiten.kernels import Kernels, Term, regularized
from polywhiten.solvers import Solver

_ACCELERATOR = getattr(torch.accelerator.current_accelerator(), "type", "cpu")

P = ParamSpec("P")
R = TypeVar("R")


class _InverseSqrt(torch.autograd.Function):
    """Compute W = S^(-1/2), with the solver's adjoint as its gradient."""

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
    """Compute a solver's adjoint, with the solver's second derivative as its gradient.

    PyTorch would differentiate the adjoint of "eigh" itself, but its result is NaN where eigenvalues are equal.
    """

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
    """Return the function with autocast off, which would compute its matrix products in half precision."""

    @wraps(kernel)
    def without_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(_ACCELERATOR)):
            return kernel(*args, **kwargs)  # the contexts below take as long as a small kernel
        with torch.autocast("cpu", enabled=False), torch.autocast(_ACCELERATOR, enabled=False):
            return kernel(*args, **kwargs)

    return without_autocast


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on the device of x; compiled code does that itself."""
    return torch.cuda.device_of(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()


class TorchKernels(Kernels):
    """Kernels in PyTorch's operations, which PyTorch can differentiate any number of times."""

    reads_any_order = True  # this is for the compiled kernels of subclasses

    moments = full_precision(Kernels.moments)
    cross_moments = full_precision(Kernels.cross_moments)

    def is_wide(self, x: Tensor) -> bool:
        """Return whether one product for each of (p, q) is efficient; an exported graph has it for all sizes.

        Otherwise `torch.export` would fix the answer for the example's sizes, and reject inputs with another answer.
        """
        is_symbol = torch.compiler.is_exporting() and type(x.shape[3]) is not int
        return is_symbol or super().is_wide(x)

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
        """Return the sum of the terms plus bias, without a centred copy of the arrays.

        The products are added to an offset, which contains the bias and the centres. If the mean is 1e4 standard
        deviations, this loses three digits of y in float32; the plain kernel loses two.
        """
        terms = self.scaled(terms, row_scale)
        offset = _offset(terms, bias)
        shape = terms[0].array.shape
        wide = self.is_wide(terms[0].array)

        def repeated(matrix: Tensor) -> Tensor:  # (blocks, d, n) once for each of the p q products
            return matrix.unsqueeze(1 - block_axis).expand(*shape[:2], -1, -1).reshape(-1, *matrix.shape[-2:])

        result = repeated(offset) if wide else offset.transpose(1, 2)
        for matrix, array, _ in terms:
            x = self.to_accumulation_dtype(array)
            if wide:
                result = torch.baddbmm(result, repeated(matrix), x.reshape(-1, *shape[2:]))
            else:
                result = torch.baddbmm(result, self._rows(x, block_axis), matrix.transpose(1, 2))
        result = result.reshape(shape) if wide else self._from_rows(result, shape, block_axis)
        return result.to(dtype)

    @full_precision
    def inverse_sqrt(self, solver: Solver, cov: Tensor, eps: float = 0.0) -> Tensor:
        """Return W = (cov + eps I)^(-1/2)."""
        cov = regularized(xp, cov, eps)
        tracing = is_tracing()
        if tracing or torch.onnx.is_in_onnx_export():
            # ONNX has no eigendecomposition, and its gradient in a saved trace is NaN where eigenvalues are equal
            solver = solver.without_eigh()
        # calling an autograd function takes as long as some of the solver's products: call it only for a gradient
        needs_gradient = torch.is_grad_enabled() and not tracing
        w: Tensor = _InverseSqrt.apply(cov, solver) if needs_gradient else solver.inverse_sqrt(xp, cov)
        return w

    @full_precision
    def inverse_sqrt_adjoint(self, solver: Solver, cov: Tensor, grad: Tensor, eps: float = 0.0) -> Tensor:
        """Return the gradient with respect to cov from the gradient with respect to W."""
        cov = regularized(xp, cov, eps)
        plain = solver.adjoint_vjp is None
        dcov: Tensor = solver.adjoint(xp, cov, grad) if plain else _Adjoint.apply(cov, grad, solver)
        return dcov


def is_tracing() -> bool:
    """Return whether `torch.jit.trace` or the older ONNX exporter is recording: it can't save autograd functions."""
    result: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return result


def _offset(terms: Sequence[Term], bias: Tensor | None) -> Tensor:
    """Return what the terms' centres and the bias (blocks, d) add to every sample, as (blocks, d, 1)."""
    offset: Tensor = -sum(matrix @ centre.unsqueeze(-1) for matrix, _, centre in terms)
    return offset if bias is None else offset + bias.unsqueeze(-1)
