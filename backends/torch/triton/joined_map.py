"""The second joined kernel forward: whitened samples, and a step of the running averages."""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import narrow, narrow_multiple, rows_of_block
from polywhiten.torch.triton.affine_map import map_samples
from polywhiten.torch.triton.running_averages import update_averages


@triton.jit(do_not_specialize=["total_rows"])
def joined_map(
    x, y, mean, whitener, averaging_factors, averaged_matrices, running_mean, running_matrices, num_batches,
    row_scale, row_bias, weight, bias,
    x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    y_stride_block, y_stride_outer, y_stride_row, y_stride_inner,
    channels, positions, inner, samples, total_rows, d, part_size,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SMALLER_BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # The parameters are (row_scale, row_bias) of IterNorm, or (weight, bias) of group whitening.
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    samples, d, part_size = narrow(samples), narrow(d), narrow(part_size)
    block_d = rows_of_block(block, d, total_rows, HAS_SMALLER_BLOCK)
    if running_mean is not None:  # noqa: SIM102  # known when the kernel is compiled, unlike the other condition
        if (part == 0) & (tl.program_id(2) == 0):
            update_averages(
                running_mean, running_matrices, num_batches, averaging_factors, mean, averaged_matrices,
                block, tl.num_programs(0), d, block_d, HEIGHT,
            )  # fmt: skip
    map_samples(
        (y + block * y_stride_block, y_stride_outer, narrow_multiple(y_stride_row, ALIGNMENT), y_stride_inner),
        (
            (whitener + block * d * d, d, 1),
            (x + block * x_stride_block, x_stride_outer, narrow_multiple(x_stride_row, ALIGNMENT), x_stride_inner),
            mean + block * d,
        ),
        None,
        None if row_scale is None else row_scale + block * d,
        None if row_bias is None else row_bias + block * d,
        None,
        weight,
        bias,
        channels,
        positions,
        narrow_multiple(inner, ALIGNMENT),
        block_d,
        begin=part * part_size,
        end=tl.minimum(samples, (part + 1) * part_size),
        first_row=tl.program_id(2) * ROWS,
        HEIGHT=HEIGHT,
        ROWS=ROWS,
        WIDTH=WIDTH,
        PRECISION=PRECISION,
        CHANNELS=CHANNELS,
    )
