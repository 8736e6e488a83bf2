"""How the joined kernels that sum cross moments end: the last program of a block computes the gradient's matrices."""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import load_matrix, load_vector
from polywhiten.torch.triton.newton_in_memory import newton_adjoint
from polywhiten.torch.triton.newton_in_registers import adjoint_from_iterates, store_iterates


@triton.jit
def gradient_operands(workspace, HEIGHT: tl.constexpr):
    # Return pointers to A', B and s / M in the workspace of a block, and to the slots behind them.
    SIZE: tl.constexpr = HEIGHT * HEIGHT
    return workspace, workspace + SIZE, workspace + 2 * SIZE, workspace + 2 * SIZE + HEIGHT


@triton.jit
def store_gradient_operands(
    cov, whitener, row_scale, total, moment, workspace, matrices, block, samples, d, block_d, eps, iterations,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MATRIX_PRECISION: tl.constexpr, IN_REGISTERS: tl.constexpr, HAS_ITERATES: tl.constexpr,
):  # fmt: skip
    # Store A' with A = diag(row_scale) W, B and s / M, from s and K of a block. Return the gradient of the row scale.
    # HAS_ITERATES says that another program has stored the iterates of Newton's iteration in `matrices`.
    rows = tl.arange(0, HEIGHT)
    cov += block * d * d
    a = load_matrix((whitener + block * d * d, d, 1), rows, rows, block_d)
    row_scale_gradient = tl.sum(moment * a, axis=1)
    if row_scale is not None:
        scale = load_vector(row_scale + block * d, rows, block_d)[:, None]
        a *= scale
        moment *= scale
    offsets = rows[:, None] * HEIGHT + rows[None, :]
    a_transposed, b, mean_s, _ = gradient_operands(workspace, HEIGHT)
    tl.store(a_transposed + rows[None, :] * HEIGHT + rows[:, None], a)
    tl.store(mean_s + rows, total / samples)
    tl.store(b + offsets, moment)
    tl.debug_barrier()
    if IN_REGISTERS:
        if not HAS_ITERATES:
            store_iterates(cov, d, matrices, block_d, eps, iterations, SMALLEST, HEIGHT)
            tl.debug_barrier()
        ds = adjoint_from_iterates(cov, d, b, matrices, block_d, eps, iterations, SMALLEST, HEIGHT)
        tl.debug_barrier()
        tl.store(b + offsets, 2.0 * ds / samples)
    else:
        newton_adjoint(
            cov, d, b, HEIGHT, b, HEIGHT, matrices, samples, block_d, eps, iterations,
            SMALLEST, HEIGHT, TILE, STEP, MATRIX_PRECISION,
        )  # fmt: skip
    return row_scale_gradient
