"""The gradient of whitening in two launches: sums that end in the adjoint of the inverse square root, then a map."""

from __future__ import annotations

import triton
import triton.language as tl

from polywhiten.torch.triton.affine_map import map_samples
from polywhiten.torch.triton.counting import gathered
from polywhiten.torch.triton.group_whitening import crossed_channel_sums
from polywhiten.torch.triton.moments import crossed_sums
from polywhiten.torch.triton.newton import newton_adjoint
from polywhiten.torch.triton.newton_registers import adjoint_in_registers
from polywhiten.torch.triton.tiles import load_matrix, narrow

_SUMMANDS, _COLUMNS = tl.constexpr(128), tl.constexpr(16)  # of a sum of rows: that many of each are read together


@triton.jit
def _adjoint(
    cov,
    whitener,
    scale,
    total,
    moment,
    results,
    matrices,
    block,
    samples,
    d,
    size,
    eps,
    iterations,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MATRIX_PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    # from s = dY 1 and K = dY (X - mean)' of a block: A' with A = diag(scale) W, B, and s / M, to the block's results.
    # Returns the gradient of scale.
    rows = tl.arange(0, HEIGHT)
    cov += block * d * d
    a = load_matrix(whitener + block * d * d, rows, rows, size, d, 1)
    scale_gradient = tl.sum(moment * a, axis=1)
    if scale is not None:
        factor = tl.load(scale + block * d + rows, mask=rows < size, other=0.0).to(tl.float32)[:, None]
        a *= factor
        moment *= factor
    places = rows[:, None] * HEIGHT + rows[None, :]
    of_b = results + HEIGHT * HEIGHT
    tl.store(results + rows[None, :] * HEIGHT + rows[:, None], a)  # as A', which the map reads row by row
    tl.store(results + 2 * HEIGHT * HEIGHT + rows, total / samples)
    tl.store(of_b + places, moment)
    tl.debug_barrier()
    if IN_REGISTERS:
        ds = adjoint_in_registers(cov, d, of_b, matrices, size, eps, iterations, SMALLEST, HEIGHT, MATRIX_PRECISION)
        tl.debug_barrier()
        tl.store(of_b + places, 2.0 * ds / samples)
    else:
        newton_adjoint(
            cov,
            d,
            of_b,
            HEIGHT,
            of_b,
            HEIGHT,
            matrices,
            samples,
            size,
            eps,
            iterations,
            SMALLEST,
            HEIGHT,
            TILE,
            STEP,
            MATRIX_PRECISION,
        )
    return scale_gradient


@triton.jit(do_not_specialize=["variables", "cluster", "block_counters", "iterations"])
def channels_gradient_sums(
    dy,
    x,
    mean,
    cov,
    whitener,
    scale,
    scratch,
    counters,
    dscale,
    dshift,
    dy_stride_block,
    dy_stride_outer,
    dy_stride_row,
    dy_stride_inner,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    inner,
    samples,
    variables,
    d,
    chunk,
    cluster,
    region,
    block_counters,
    eps,
    iterations,
    LEVELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MATRIX_PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    MATRICES: tl.constexpr,
):
    # what the gradient's map takes, for every block, at the start of its scratch memory; gradients of scale and shift
    block, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    region = narrow(region)
    samples, d, chunk, eps = narrow(samples), narrow(d), narrow(chunk), tl.cast(eps, tl.float32)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    total, moment = crossed_sums(
        dy + block * dy_stride_block,
        x + block * stride_block,
        mean + block * d,
        dy_stride_outer,
        dy_stride_row,
        dy_stride_inner,
        stride_outer,
        stride_row,
        stride_inner,
        inner,
        size,
        part * chunk,
        tl.minimum(samples, (part + 1) * chunk),
        HEIGHT,
        WIDTH,
        PRECISION,
    )
    results = scratch + block * region
    slots = results + 2 * HEIGHT * HEIGHT + HEIGHT
    if LEVELS > 0:
        counters += block * block_counters
    total, moment, last = gathered(total, moment, slots, counters, part, parts, cluster, LEVELS, HEIGHT)
    if last:
        rows = tl.arange(0, HEIGHT)
        scale_gradient = _adjoint(
            cov,
            whitener,
            scale,
            total,
            moment,
            results,
            results + region - MATRICES * HEIGHT * HEIGHT,
            block,
            samples,
            d,
            size,
            eps,
            iterations,
            SMALLEST,
            HEIGHT,
            TILE,
            STEP,
            MATRIX_PRECISION,
            IN_REGISTERS,
        )
        place = block * d + rows
        if dscale is not None:
            tl.store(dscale + place, scale_gradient.to(dscale.dtype.element_ty), mask=rows < size)
        if dshift is not None:
            tl.store(dshift + place, total.to(dshift.dtype.element_ty), mask=rows < size)


@triton.jit(do_not_specialize=["cluster", "block_counters", "iterations"])
def samples_gradient_sums(
    dy,
    x,
    mean,
    cov,
    whitener,
    weight,
    scratch,
    counters,
    of_weight,
    of_bias,
    dy_stride_block,
    dy_stride_row,
    dy_stride_channel,
    dy_stride_position,
    stride_block,
    stride_row,
    stride_channel,
    stride_position,
    channels,
    positions,
    d,
    channel_chunk,
    position_chunk,
    cluster,
    region,
    block_counters,
    eps,
    iterations,
    LEVELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MATRIX_PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    MATRICES: tl.constexpr,
):
    # likewise of group whitening, with every program's part of the gradients of weight and bias
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    parts = tl.num_programs(1) * tl.num_programs(2)
    region = narrow(region)
    channels, positions, d, eps = narrow(channels), narrow(positions), narrow(d), tl.cast(eps, tl.float32)
    parameter_place = (block * tl.num_programs(2) + tl.program_id(2)) * d * channels
    total, moment = crossed_channel_sums(
        dy + block * dy_stride_block,
        dy_stride_row,
        dy_stride_channel,
        dy_stride_position,
        x + block * stride_block,
        stride_row,
        stride_channel,
        stride_position,
        mean + block * d,
        whitener + block * d * d,
        weight,
        None if of_weight is None else of_weight + parameter_place,
        None if of_bias is None else of_bias + parameter_place,
        channels,
        positions,
        d,
        tl.program_id(1),
        tl.program_id(2),
        channel_chunk,
        position_chunk,
        HEIGHT,
        CHANNELS,
        POSITIONS,
        PRECISION,
    )
    results = scratch + block * region
    slots = results + 2 * HEIGHT * HEIGHT + HEIGHT
    if LEVELS > 0:
        counters += block * block_counters
    total, moment, last = gathered(total, moment, slots, counters, part, parts, cluster, LEVELS, HEIGHT)
    if last:
        _adjoint(
            cov,
            whitener,
            None,
            total,
            moment,
            results,
            results + region - MATRICES * HEIGHT * HEIGHT,
            block,
            channels * positions,
            d,
            d,
            eps,
            iterations,
            SMALLEST,
            HEIGHT,
            TILE,
            STEP,
            MATRIX_PRECISION,
            IN_REGISTERS,
        )


@triton.jit
def _add_rows(rows, number, length, result):
    # the sum of `number` rows, by all programs of the launch together
    program = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    for start in range(program * _COLUMNS, length, programs * _COLUMNS):
        column = start + tl.arange(0, _COLUMNS)
        total = tl.zeros((_COLUMNS,), tl.float32)
        for first in range(0, number, _SUMMANDS):
            row = first + tl.arange(0, _SUMMANDS)
            valid = (row < number)[:, None] & (column < length)[None, :]
            offsets = row.to(tl.int64)[:, None] * length + column[None, :]
            total += tl.sum(tl.load(rows + offsets, mask=valid, other=0.0), axis=0)
        tl.store(result + column, total.to(result.dtype.element_ty), mask=column < length)


@triton.jit(do_not_specialize=["variables", "parameter_parts", "all_channels"])
def gradient_map(
    dx,
    dy,
    x,
    mean,
    scratch,
    weight,
    of_weight,
    of_bias,
    dweight,
    dbias,
    dx_stride_block,
    dx_stride_outer,
    dx_stride_row,
    dx_stride_inner,
    dy_stride_block,
    dy_stride_outer,
    dy_stride_row,
    dy_stride_inner,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    inner,
    samples,
    variables,
    d,
    chunk,
    region,
    channels,
    positions,
    parameter_parts,
    all_channels,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A' (weight dy - s / M) + B (x - mean) of every block; and the sums of the parts of weight's and bias' gradients
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    region = narrow(region)
    samples, d, chunk = narrow(samples), narrow(d), narrow(chunk)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    results = scratch + block * region
    if of_weight is not None:
        _add_rows(of_weight, parameter_parts, all_channels, dweight)
    if of_bias is not None:
        _add_rows(of_bias, parameter_parts, all_channels, dbias)
    map_samples(
        dx + block * dx_stride_block,
        dx_stride_outer,
        dx_stride_row,
        dx_stride_inner,
        results,
        HEIGHT,
        1,
        dy + block * dy_stride_block,
        results + 2 * HEIGHT * HEIGHT,
        dy_stride_outer,
        dy_stride_row,
        dy_stride_inner,
        results + HEIGHT * HEIGHT,
        HEIGHT,
        1,
        x + block * stride_block,
        mean + block * d,
        stride_outer,
        stride_row,
        stride_inner,
        None,
        None,
        weight,
        None,
        None,
        channels,
        positions,
        inner,
        size,
        part * chunk,
        tl.minimum(samples, (part + 1) * chunk),
        tl.program_id(2) * ROWS,
        True,
        HEIGHT,
        ROWS,
        WIDTH,
        PRECISION,
    )
