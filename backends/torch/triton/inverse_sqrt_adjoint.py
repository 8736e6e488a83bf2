"""The adjoint of W = (cov + eps I)^(-1/2) for every block, with all of Newton's steps in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.newton_in_memory import (
    ADJOINT_MATRICES,
    allocate_workspace,
    newton_adjoint,
    newton_constants,
)


def inverse_sqrt_adjoint(cov: Tensor, grad: Tensor, eps: float, iterations: int, samples: int = 2) -> Tensor:
    """Return (dS + dS') / samples, where dS is the gradient of cov (..., d, d), and `grad` that of W.

    With the default number of samples this is dS, which is symmetric.
    """
    cov, grad = cov.contiguous(), grad.contiguous()
    d = cov.shape[-1]
    count = cov.numel() // (d * d)
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
