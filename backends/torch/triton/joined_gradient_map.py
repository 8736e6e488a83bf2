"""The second joined kernel backward: the gradient of x, and for group whitening those of weight and bias."""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import narrow, narrow_multiple, rows_of_block
from polywhiten.torch.triton.affine_map import map_samples
from polywhiten.torch.triton.joined_adjoint import gradient_operands

_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = tl.constexpr(128), tl.constexpr(16)  # of the sum of parts of a parameter's gradient


@triton.jit
def _sum_rows(matrix, num_rows, num_columns, result):
    # Store the sum of the rows of a matrix; all programs of the launch share the columns.
    program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    num_programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for first_column in range(program * _COLUMNS_AT_ONCE, num_columns, num_programs * _COLUMNS_AT_ONCE):
        column = first_column + tl.arange(0, _COLUMNS_AT_ONCE)
        total = tl.zeros((_COLUMNS_AT_ONCE,), tl.float32)
        for first_row in range(0, num_rows, _ROWS_AT_ONCE):
            row = first_row + tl.arange(0, _ROWS_AT_ONCE)
            valid = (row < num_rows)[:, None] & (column < num_columns)[None, :]
            offsets = row.to(tl.int64)[:, None] * num_columns + column[None, :]
            total += tl.sum(tl.load(matrix + offsets, mask=valid, other=0.0), axis=0)
        tl.store(result + column, total.to(result.dtype.element_ty), mask=column < num_columns)


@triton.jit(do_not_specialize=["total_rows", "num_parameter_parts", "total_channels"])
def joined_gradient_map(
    dx, dy, x, mean, workspace, weight, dweight_parts, dbias_parts, dweight, dbias,
    dx_stride_block, dx_stride_outer, dx_stride_row, dx_stride_inner,
    dy_stride_block, dy_stride_outer, dy_stride_row, dy_stride_inner,
    x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    inner, samples, total_rows, d, part_size, workspace_per_block,
    channels, positions, num_parameter_parts, total_channels,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SMALLER_BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Store A' (weight dy - s / M) + B (x - mean) of every block; only group whitening has a weight here, and parts.
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    workspace_per_block = narrow(workspace_per_block)
    samples, d, part_size = narrow(samples), narrow(d), narrow(part_size)
    block_d = rows_of_block(block, d, total_rows, HAS_SMALLER_BLOCK)
    if dweight_parts is not None:
        _sum_rows(dweight_parts, num_parameter_parts, total_channels, dweight)
    if dbias_parts is not None:
        _sum_rows(dbias_parts, num_parameter_parts, total_channels, dbias)
    a_transposed, b, mean_s, _ = gradient_operands(workspace + block * workspace_per_block, HEIGHT)
    map_samples(
        (dx + block * dx_stride_block, dx_stride_outer, narrow_multiple(dx_stride_row, ALIGNMENT), dx_stride_inner),
        (
            (a_transposed, HEIGHT, 1),
            (dy + block * dy_stride_block, dy_stride_outer, narrow_multiple(dy_stride_row, ALIGNMENT), dy_stride_inner),
            mean_s,
        ),
        (
            (b, HEIGHT, 1),
            (x + block * x_stride_block, x_stride_outer, narrow_multiple(x_stride_row, ALIGNMENT), x_stride_inner),
            mean + block * d,
        ),
        None,
        None,
        weight,
        None,
        None,
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
