"""The first joined kernel of IterNorm's backward: the operands of the gradient's map, and parameter gradients."""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import narrow, narrow_multiple, rows_of_block
from polywhiten.torch.triton.joined_adjoint import gradient_operands, store_gradient_operands
from polywhiten.torch.triton.joined_sums import sum_shifted_cross_moments
from polywhiten.torch.triton.last_program import combine_parts
from polywhiten.torch.triton.newton_in_registers import store_iterates


@triton.jit(do_not_specialize=["total_rows", "cluster_size", "counters_per_block", "iterations"])
def joined_cross_moments(
    dy, x, mean, cov, whitener, weight, workspace, counters, dweight, dbias,
    dy_stride_block, dy_stride_outer, dy_stride_row, dy_stride_inner,
    x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    inner, samples, total_rows, d, part_size,
    cluster_size, workspace_per_block, matrices_offset, counters_per_block, eps, iterations,
    LEVELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, MATRIX_PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr, HAS_ITERATES: tl.constexpr, STAGES: tl.constexpr,
    HAS_SMALLER_BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    # With HAS_ITERATES, the first program of a block computes Newton's iterates while the others sum.
    block = tl.program_id(0).to(tl.int64)
    part, num_parts = tl.program_id(1) - HAS_ITERATES, tl.num_programs(1) - HAS_ITERATES
    workspace_per_block, matrices_offset = narrow(workspace_per_block), narrow(matrices_offset)
    samples, d, part_size, eps = narrow(samples), narrow(d), narrow(part_size), tl.cast(eps, tl.float32)
    block_d = rows_of_block(block, d, total_rows, HAS_SMALLER_BLOCK)
    workspace += block * workspace_per_block
    matrices = workspace + matrices_offset
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    if part < 0:
        if HAS_ITERATES:  # known when the kernel is compiled
            store_iterates(cov + block * d * d, d, matrices, block_d, eps, iterations, SMALLEST, HEIGHT)
    else:
        total, moment = sum_shifted_cross_moments(
            (dy + block * dy_stride_block, dy_stride_outer, narrow_multiple(dy_stride_row, ALIGNMENT), dy_stride_inner),
            (x + block * x_stride_block, x_stride_outer, narrow_multiple(x_stride_row, ALIGNMENT), x_stride_inner),
            mean + block * d,
            (cov + block * d * d, d + 1),
            narrow_multiple(inner, ALIGNMENT),
            block_d,
            begin=part * part_size,
            end=tl.minimum(samples, (part + 1) * part_size),
            HEIGHT=HEIGHT,
            WIDTH=WIDTH,
            STAGES=STAGES,
            PRECISION=PRECISION,
        )
    _, _, _, slots = gradient_operands(workspace, HEIGHT)
    if LEVELS > 0:
        counters += block * counters_per_block
    total, moment, is_last = combine_parts(
        total, moment, slots, counters, part, num_parts, cluster_size, LEVELS, HAS_ITERATES, HEIGHT
    )
    if is_last:
        weight_gradient = store_gradient_operands(
            cov, whitener, weight, total, moment,
            workspace, matrices, block, samples, d, block_d, eps, iterations,
            SMALLEST, HEIGHT, TILE, STEP, MATRIX_PRECISION, IN_REGISTERS, HAS_ITERATES,
        )  # fmt: skip
        rows = tl.arange(0, HEIGHT)
        if dweight is not None:
            tl.store(dweight + block * d + rows, weight_gradient.to(dweight.dtype.element_ty), mask=rows < block_d)
        if dbias is not None:
            tl.store(dbias + block * d + rows, total.to(dbias.dtype.element_ty), mask=rows < block_d)
