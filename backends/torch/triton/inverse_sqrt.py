"""W = (cov + eps I)^(-1/2) of every block by Newton's iteration, with all steps in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import store_matrix
from polywhiten.torch.triton.newton_in_memory import (
    MAX_PROGRAMS,
    NEWTON_MATRICES,
    allocate_workspace,
    newton,
    newton_constants,
)
from polywhiten.torch.triton.newton_in_registers import load_square, newton_in_registers
from polywhiten.torch.triton.register_iteration import iterates_in_registers, register_constants


def inverse_sqrt(cov: Tensor, eps: float, iterations: int) -> Tensor:
    """Return W of matrices (..., d, d)."""
    cov = cov.contiguous()
    d = cov.shape[-1]
    count = cov.numel() // (d * d)
    if iterates_in_registers(d, cov.device):
        return _launch_in_registers(cov, count, eps, iterations)
    w, workspace = torch.empty_like(cov), allocate_workspace(cov, count, d, NEWTON_MATRICES)
    _inverse_sqrt[(workspace.shape[0],)](
        cov,
        w,
        workspace,
        count=count,
        d=d,
        eps=eps,
        iterations=iterations,
        MATRICES=NEWTON_MATRICES,
        **newton_constants(d),
    )
    return w


def _launch_in_registers(cov: Tensor, count: int, eps: float, iterations: int) -> Tensor:
    w = torch.empty_like(cov)
    d = cov.shape[-1]
    _inverse_sqrt_in_registers[(min(count, MAX_PROGRAMS),)](
        cov, w, count=count, d=d, eps=eps, iterations=iterations, **register_constants(d)
    )
    return w


@triton.jit
def _inverse_sqrt_in_registers(cov, w, count, d, eps, iterations, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr):
    eps = tl.cast(eps, tl.float32)  # torch.compile passes a float64
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        offset = tl.cast(matrix, tl.int64) * d * d
        s = load_square(cov + offset, d, d, HEIGHT)
        result = newton_in_registers(s, d, eps, iterations, SMALLEST, HEIGHT)
        store_matrix(w + offset, result, tl.arange(0, HEIGHT), d)


@triton.jit
def _inverse_sqrt(
    cov, w, workspace, count, d, eps, iterations, MATRICES: tl.constexpr,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    workspace += tl.program_id(0) * MATRICES * HEIGHT * HEIGHT
    for matrix in range(tl.program_id(0), count, tl.num_programs(0)):
        offset = tl.cast(matrix, tl.int64) * d * d
        result = newton(cov + offset, d, workspace, d, eps, iterations, SMALLEST, HEIGHT, TILE, STEP, PRECISION)
        store_matrix(w + offset, result, tl.arange(0, HEIGHT), d)
        tl.debug_barrier()
