"""The adjoint of W = (cov + eps I)^(-1/2) for every block, with all of Newton's steps in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import store_matrix
from polywhiten.torch.triton.newton_in_memory import (
    ADJOINT_MATRICES,
    allocate_workspace,
    newton_adjoint,
    newton_constants,
)
from polywhiten.torch.triton.newton_in_registers import (
    adjoint_from_iterates,
    load_square,
    num_iterates,
    store_iterates,
)
from polywhiten.torch.triton.register_iteration import iterates_in_registers, register_constants


def inverse_sqrt_adjoint(cov: Tensor, grad: Tensor, eps: float, iterations: int, samples: int = 2) -> Tensor:
    """Return (dS + dS') / samples, where dS is the gradient of cov (..., d, d), and `grad` that of W.

    With the default number of samples this is dS, which is symmetric.
    """
    cov, grad = cov.contiguous(), grad.contiguous()
    d = cov.shape[-1]
    count = cov.numel() // (d * d)
    if iterates_in_registers(d, cov.device):
        return _launch_in_registers(cov, grad, count, eps, iterations, samples)
    result, workspace = torch.empty_like(cov), allocate_workspace(cov, count, d, ADJOINT_MATRICES)
    _inverse_sqrt_adjoint[(workspace.shape[0],)](
        cov,
        grad,
        result,
        workspace,
        samples=samples,
        count=count,
        d=d,
        eps=eps,
        iterations=iterations,
        MATRICES=ADJOINT_MATRICES,
        **newton_constants(d),
    )
    return result


def _launch_in_registers(cov: Tensor, grad: Tensor, count: int, eps: float, iterations: int, samples: int) -> Tensor:
    d = cov.shape[-1]
    matrices = 1 + num_iterates(iterations)  # the gradient's tile and the iterates
    result, workspace = torch.empty_like(cov), allocate_workspace(cov, count, d, matrices)
    _inverse_sqrt_adjoint_in_registers[(workspace.shape[0],)](
        cov,
        grad,
        result,
        workspace,
        workspace_per_program=workspace[0].numel(),
        samples=samples,
        count=count,
        d=d,
        eps=eps,
        iterations=iterations,
        **register_constants(d),
    )
    return result


@triton.jit
def _inverse_sqrt_adjoint_in_registers(
    cov, grad, result, workspace, workspace_per_program, samples, count, d, eps, iterations,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    eps = tl.cast(eps, tl.float32)  # torch.compile passes a float64
    rows = tl.arange(0, HEIGHT)
    workspace += tl.program_id(0) * workspace_per_program
    iterates = workspace + HEIGHT * HEIGHT
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        offset = tl.cast(matrix, tl.int64) * d * d
        tile = load_square(grad + offset, d, d, HEIGHT)
        tl.store(workspace + rows[:, None] * HEIGHT + rows[None, :], tile)
        store_iterates(cov + offset, d, iterates, d, eps, iterations, SMALLEST, HEIGHT)
        tl.debug_barrier()
        ds = adjoint_from_iterates(cov + offset, d, workspace, iterates, d, eps, iterations, SMALLEST, HEIGHT)
        store_matrix(result + offset, 2.0 * ds / samples, rows, d)
        tl.debug_barrier()


@triton.jit
def _inverse_sqrt_adjoint(
    cov, grad, result, workspace, samples, count, d, eps, iterations, MATRICES: tl.constexpr,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    workspace += tl.program_id(0) * MATRICES * HEIGHT * HEIGHT
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        offset = tl.cast(matrix, tl.int64) * d * d
        newton_adjoint(
            cov + offset, d, grad + offset, d, result + offset, d, workspace, samples, d, eps, iterations,
            SMALLEST, HEIGHT, TILE, STEP, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
