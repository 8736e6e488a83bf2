"""The first joined kernel of group whitening's backward: the operands of the gradient's map.

Programs store their parts of the gradients of weight and bias too, which the gradient's map adds up.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import narrow, narrow_multiple
from polywhiten.torch.triton.joined_adjoint import gradient_operands, store_gradient_operands
from polywhiten.torch.triton.joined_sample_sums import (
    grouped_samples,
    sum_adjacent_channels,
    sum_channel_by_channel,
)
from polywhiten.torch.triton.last_program import combine_parts


@triton.jit(do_not_specialize=["cluster_size", "counters_per_block", "iterations"])
def joined_sample_cross_moments(
    dy, x, mean, cov, whitener, weight, workspace, counters, dweight_parts, dbias_parts,
    dy_stride_block, dy_stride_row, dy_stride_channel, dy_stride_position,
    x_stride_block, x_stride_row, x_stride_channel, x_stride_position,
    channels, positions, d, part_channels, part_positions,
    cluster_size, workspace_per_block, matrices_offset, counters_per_block, eps, iterations,
    LEVELS: tl.constexpr, HEIGHT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr, SMALLEST: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    MATRIX_PRECISION: tl.constexpr, IN_REGISTERS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE_TILES: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    block, channel_part, position_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    part, num_parts = channel_part * tl.num_programs(2) + position_part, tl.num_programs(1) * tl.num_programs(2)
    workspace_per_block, matrices_offset = narrow(workspace_per_block), narrow(matrices_offset)
    channels, positions, d, eps = narrow(channels), narrow(positions), narrow(d), tl.cast(eps, tl.float32)
    parameter_offset = (block * tl.num_programs(2) + position_part) * d * channels
    dy = grouped_samples(
        dy + block * dy_stride_block, dy_stride_row, dy_stride_channel, dy_stride_position, CHANNELS, ALIGNMENT
    )
    x = grouped_samples(
        x + block * x_stride_block, x_stride_row, x_stride_channel, x_stride_position, CHANNELS, ALIGNMENT
    )
    mean += block * d
    variances = (cov + block * d * d, d + 1)
    block_whitener = whitener + block * d * d
    if dweight_parts is not None:
        dweight_parts += parameter_offset
    if dbias_parts is not None:
        dbias_parts += parameter_offset
    part_channels, part_positions = narrow_multiple(part_channels, CHANNELS), narrow_multiple(part_positions, POSITIONS)
    first_channel, first_position = channel_part * part_channels, position_part * part_positions
    end_channel = tl.minimum(channels, first_channel + part_channels)
    end_position = tl.minimum(positions, first_position + part_positions)
    if CHANNELS == 1:
        end_position = narrow_multiple(end_position, ALIGNMENT)
        total, moment = sum_channel_by_channel(
            dy, x, mean, variances, block_whitener, weight, dweight_parts, dbias_parts, channels, d,
            first_channel, end_channel, first_position, end_position, HEIGHT, POSITIONS, STAGES, PRECISION,
        )  # fmt: skip
    else:
        total, moment = sum_adjacent_channels(
            dy, x, mean, variances, block_whitener, weight, dweight_parts, dbias_parts, channels, d,
            first_channel, end_channel, first_position, end_position, HEIGHT, CHANNELS, POSITIONS, STAGES, WHOLE_TILES,
            PRECISION,
        )  # fmt: skip
    workspace += block * workspace_per_block
    _, _, _, slots = gradient_operands(workspace, HEIGHT)
    if LEVELS > 0:
        counters += block * counters_per_block
    total, moment, is_last = combine_parts(
        total, moment, slots, counters, part, num_parts, cluster_size, LEVELS, 0, HEIGHT
    )
    if is_last:
        store_gradient_operands(
            cov, whitener, None, total, moment,
            workspace, workspace + matrices_offset, block, channels * positions, d, d, eps, iterations,
            SMALLEST, HEIGHT, TILE, STEP, MATRIX_PRECISION, IN_REGISTERS, 0,
        )  # fmt: skip
