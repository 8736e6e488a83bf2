"""The first joined kernel forward: the statistics of every block, and for small samples their whitened values too.

A block has d rows, but the last group of channels may have fewer. Its matrices are then stored with the identity
outside of its own rows and columns, and workspaces with 0.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import narrow, narrow_multiple, rows_of_block
from polywhiten.torch.triton.affine_map import map_samples
from polywhiten.torch.triton.joined_sums import sum_shifted_moments
from polywhiten.torch.triton.last_program import combine_parts
from polywhiten.torch.triton.newton_in_memory import newton
from polywhiten.torch.triton.newton_in_registers import newton_in_registers
from polywhiten.torch.triton.running_averages import averaging_factor


@triton.jit
def _finish_statistics(
    shift, total, square, mean, cov, whitener, matrices,
    averaging_factors, running_mean, running_matrices, num_batches, momentum,
    block, samples, d, block_d, eps, iterations,
    TRACKS_COVARIANCE: tl.constexpr, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr, MATRIX_PRECISION: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    # Store the statistics of a block, and its averaging factor, from the sums over all of its samples.
    rows = tl.arange(0, HEIGHT)
    in_matrix = (rows < d)[:, None] & (rows < d)[None, :]
    in_block = (rows < block_d)[:, None] & (rows < block_d)[None, :]
    offsets = rows[:, None] * d + rows[None, :]
    identity_outside = tl.where((rows[:, None] == rows[None, :]) & (rows >= block_d)[:, None], 1.0, 0.0)
    mean_shifted = total / samples  # the mean of x - shift
    centre = shift + mean_shifted
    s = tl.where(in_block, square / samples - mean_shifted[:, None] * mean_shifted[None, :], 0.0)
    tl.store(mean + block * d + rows, centre, mask=rows < block_d)
    tl.store(cov + block * d * d + offsets, s + identity_outside, mask=in_matrix)
    if IN_REGISTERS:
        w = newton_in_registers(s, block_d, eps, iterations, SMALLEST, HEIGHT)
    else:
        tl.debug_barrier()
        w = newton(
            cov + block * d * d, d, matrices, block_d, eps, iterations, SMALLEST, HEIGHT, TILE, STEP, MATRIX_PRECISION
        )
    tl.store(whitener + block * d * d + offsets, w + identity_outside, mask=in_matrix)
    if running_mean is not None:
        factor = averaging_factor(
            running_mean, running_matrices, num_batches, momentum, centre, s + identity_outside, w + identity_outside,
            block, d, block_d, TRACKS_COVARIANCE, HEIGHT,
        )  # fmt: skip
        tl.store(averaging_factors + block, factor)


@triton.jit(do_not_specialize=["total_rows", "cluster_size", "counters_per_block", "iterations"])
def joined_statistics(
    x, y, mean, cov, whitener, workspace, counters,
    averaging_factors, running_mean, running_matrices, num_batches, weight, bias,
    x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    y_stride_block, y_stride_outer, y_stride_row, y_stride_inner,
    channels, positions, inner, samples, total_rows, d, part_size,
    cluster_size, workspace_per_block, matrices_offset, counters_per_block, eps, momentum, iterations,
    TRACKS_COVARIANCE: tl.constexpr, MAPS_SAMPLES: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, HAS_SMALLER_BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, CHANNELS: tl.constexpr,
    SHIFT_SAMPLES: tl.constexpr, PRECISION: tl.constexpr, SMALLEST: tl.constexpr, HEIGHT: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, MATRIX_PRECISION: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    block, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    workspace_per_block, matrices_offset = narrow(workspace_per_block), narrow(matrices_offset)
    samples, d, part_size, eps = narrow(samples), narrow(d), narrow(part_size), tl.cast(eps, tl.float32)
    block_d = rows_of_block(block, d, total_rows, HAS_SMALLER_BLOCK)
    begin, end = part * part_size, tl.minimum(samples, (part + 1) * part_size)
    workspace += block * workspace_per_block
    inner = narrow_multiple(inner, ALIGNMENT)
    x_stride_row = narrow_multiple(x_stride_row, ALIGNMENT)
    block_x = (x + block * x_stride_block, x_stride_outer, x_stride_row, x_stride_inner)
    shift, total, square = sum_shifted_moments(
        block_x, inner, samples, block_d, begin, end, HEIGHT, WIDTH, STAGES, SHIFT_SAMPLES, PRECISION
    )
    if LEVELS > 0:
        counters += block * counters_per_block
    total, square, is_last = combine_parts(
        total, square, workspace, counters, part, num_parts, cluster_size, LEVELS, 0, HEIGHT
    )
    if is_last:
        _finish_statistics(
            shift, total, square, mean, cov, whitener,
            workspace + matrices_offset,
            averaging_factors, running_mean, running_matrices, num_batches, momentum,
            block, samples, d, block_d, eps, iterations,
            TRACKS_COVARIANCE, SMALLEST, HEIGHT, TILE, STEP, MATRIX_PRECISION, IN_REGISTERS,
        )  # fmt: skip
        if MAPS_SAMPLES:
            tl.debug_barrier()
            map_samples(
                (y + block * y_stride_block, y_stride_outer, narrow_multiple(y_stride_row, ALIGNMENT), y_stride_inner),
                ((whitener + block * d * d, d, 1), block_x, mean + block * d),
                None,
                None, None, None, weight, bias, channels, positions,
                inner, d, 0, samples, 0, HEIGHT, HEIGHT, WIDTH, PRECISION, CHANNELS,
            )  # fmt: skip
