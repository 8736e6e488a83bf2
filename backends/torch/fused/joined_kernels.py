"""Whitening in two launches, and its gradient in two: sums that end in the inverse square root, then a map.

A block's array is seen as rows of `d` variables, where the last of several groups may have fewer, and samples on two
axes. What lies outside of a smaller block is 0 in the work's memory, and as in the identity in results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polywhiten.torch.fused.affine_map import map_samples
from polywhiten.torch.fused.counting import gathered
from polywhiten.torch.fused.group_whitening import crossed_channel_sums
from polywhiten.torch.fused.moments import crossed_sums, shifted_sums
from polywhiten.torch.fused.newton import newton, newton_adjoint
from polywhiten.torch.fused.newton_registers import adjoint_in_registers, newton_in_registers
from polywhiten.torch.fused.tiles import load_matrix

_LANES = tl.constexpr(128)  # numbers that are read at a time where there are many


@triton.jit
def narrow(number):
    # torch.compile hands over 64 bits where shapes are dynamic; offsets in 32 bits take half of the registers
    return tl.cast(number, tl.int32)


# ---------------------------------------------------------------- running averages


@triton.jit
def _next_average(running, offsets, mask, batch, factor):
    # as torch.lerp has it, in the dtype of the average
    old = tl.load(running + offsets, mask=mask, other=0.0).to(tl.float32)
    near_old, near_batch = old + factor * (batch - old), batch - (batch - old) * (1.0 - factor)
    return tl.where(factor < 0.5, near_old, near_batch).to(running.dtype.element_ty)


@triton.jit
def _number_not_finite(values):
    values = values.to(tl.float32)
    return tl.sum((tl.abs(values) < float("inf")).to(tl.int32) ^ 1)


@triton.jit
def _verdict(
    running_mean,
    running_matrices,
    count,
    momentum,
    mean,
    cov,
    w,
    block,
    d,
    size,
    TRACKS_COVARIANCE: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    # the factor of the newest batch in the averages, or NaN where this block would make them infinite
    rows = tl.arange(0, HEIGHT)
    places = rows[:, None] * d + rows[None, :]
    of_block = (rows < d)[:, None] & (rows < d)[None, :]
    if momentum is None:
        factor = tl.full([], 0.0, tl.float32)
        if count is not None:
            factor = 1.0 / (tl.load(count) + 1).to(tl.float32)
    else:
        factor = tl.cast(momentum, tl.float32)
    bad = _number_not_finite(_next_average(running_mean + block * d, rows, rows < size, mean, factor))
    matrix = w
    if TRACKS_COVARIANCE:
        bad += _number_not_finite(w)
        matrix = cov
    newest = _next_average(running_matrices + block * d * d, places, of_block, matrix, factor)
    bad += _number_not_finite(tl.where(of_block, newest.to(tl.float32), 0.0))
    return tl.where(bad == 0, factor, float("nan"))


@triton.jit
def _average(
    running_mean,
    running_matrices,
    count,
    verdicts,
    mean,
    matrices,
    block,
    blocks,
    d,
    size,
    HEIGHT: tl.constexpr,
):
    # a step of one block's averages, if no block is against it
    bad = 0
    for start in range(0, blocks, _LANES):
        others = start + tl.arange(0, _LANES)
        factors = tl.load(verdicts + others, mask=others < blocks, other=0.0)
        bad += tl.sum((factors != factors).to(tl.int32))
    if bad == 0:
        factor = tl.load(verdicts + block)
        rows = tl.arange(0, HEIGHT)
        batch = tl.load(mean + block * d + rows, mask=rows < size, other=0.0)
        newest = _next_average(running_mean + block * d, rows, rows < size, batch, factor)
        tl.store(running_mean + block * d + rows, newest, mask=rows < size)
        places = rows[:, None] * d + rows[None, :]
        of_block = (rows < d)[:, None] & (rows < d)[None, :]
        batch = load_matrix(matrices + block * d * d, rows, rows, d, d, 1)
        newest = _next_average(running_matrices + block * d * d, places, of_block, batch, factor)
        tl.store(running_matrices + block * d * d + places, newest, mask=of_block)
        if count is not None:  # noqa: SIM102  # known when the kernel is compiled, unlike the other condition
            if block == 0:
                tl.store(count, tl.load(count) + 1)


# ---------------------------------------------------------------- forward


@triton.jit
def whiten_sums(
    x,
    mean,
    cov,
    whitener,
    scratch,
    counters,
    running_mean,
    running_matrices,
    count,
    y,
    weight,
    bias,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    y_stride_block,
    y_stride_outer,
    y_stride_row,
    y_stride_inner,
    inner,
    samples,
    variables,
    d,
    chunk,
    cluster,
    region,
    block_counters,
    channels,
    positions,
    eps,
    momentum,
    iterations,
    TRACKS_COVARIANCE: tl.constexpr,
    MAPS: tl.constexpr,
    LEVELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MATRIX_PRECISION: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    # statistics of every block, and a verdict on running averages; where MAPS, the whitened samples too
    block, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    inner, samples, d, chunk, eps = narrow(inner), narrow(samples), narrow(d), narrow(chunk), tl.cast(eps, tl.float32)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    begin, end = part * chunk, tl.minimum(samples, (part + 1) * chunk)
    verdicts = scratch
    scratch += (tl.num_programs(0) + 15) // 16 * 16 + block * region
    x += block * stride_block
    near, total, square = shifted_sums(
        x,
        narrow(stride_outer),
        narrow(stride_row),
        narrow(stride_inner),
        inner,
        samples,
        size,
        begin,
        end,
        HEIGHT,
        WIDTH,
        SPREAD,
        PRECISION,
    )
    if LEVELS > 0:
        counters += block * block_counters
    total, square, last = gathered(total, square, scratch, counters, part, parts, cluster, LEVELS, HEIGHT)
    if last:
        rows = tl.arange(0, HEIGHT)
        of_block = (rows < d)[:, None] & (rows < d)[None, :]
        of_group = (rows < size)[:, None] & (rows < size)[None, :]
        places = rows[:, None] * d + rows[None, :]
        beyond = tl.where((rows[:, None] == rows[None, :]) & (rows >= size)[:, None], 1.0, 0.0)
        off = total / samples
        centre = near + off
        s = tl.where(of_group, square / samples - off[:, None] * off[None, :], 0.0)
        tl.store(mean + block * d + rows, centre, mask=rows < size)
        tl.store(cov + block * d * d + places, s + beyond, mask=of_block)
        if IN_REGISTERS:
            w = newton_in_registers(s, size, eps, iterations, SMALLEST, HEIGHT, MATRIX_PRECISION)
        else:
            tl.debug_barrier()
            matrices = scratch + region - 5 * HEIGHT * HEIGHT
            w = newton(
                cov + block * d * d,
                d,
                matrices,
                size,
                eps,
                iterations,
                SMALLEST,
                HEIGHT,
                TILE,
                STEP,
                MATRIX_PRECISION,
            )
        tl.store(whitener + block * d * d + places, w + beyond, mask=of_block)
        if running_mean is not None:
            verdict = _verdict(
                running_mean,
                running_matrices,
                count,
                momentum,
                centre,
                s + beyond,
                w + beyond,
                block,
                d,
                size,
                TRACKS_COVARIANCE,
                HEIGHT,
            )
            tl.store(verdicts + block, verdict)
        if MAPS:
            tl.debug_barrier()
            map_samples(
                y + block * y_stride_block,
                narrow(y_stride_outer),
                narrow(y_stride_row),
                narrow(y_stride_inner),
                whitener + block * d * d,
                d,
                1,
                x,
                mean + block * d,
                narrow(stride_outer),
                narrow(stride_row),
                narrow(stride_inner),
                whitener,
                d,
                1,
                x,
                mean,
                0,
                0,
                0,
                None,
                None,
                None,
                weight,
                bias,
                channels,
                positions,
                inner,
                d,
                0,
                samples,
                0,
                False,
                HEIGHT,
                HEIGHT,
                WIDTH,
                PRECISION,
            )


@triton.jit
def whiten_map(
    y,
    x,
    mean,
    matrices,
    whitener,
    verdicts,
    running_mean,
    running_matrices,
    count,
    scale,
    shift,
    weight,
    bias,
    y_stride_block,
    y_stride_outer,
    y_stride_row,
    y_stride_inner,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    inner,
    samples,
    variables,
    d,
    chunk,
    channels,
    positions,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # whitener (x - mean) of every block, times scale plus shift of its rows, or weight and bias of its channels; and a
    # step of the running averages towards mean and matrices
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    inner, samples, d, chunk = narrow(inner), narrow(samples), narrow(d), narrow(chunk)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    if running_mean is not None:  # noqa: SIM102  # known when the kernel is compiled, unlike the other condition
        if (part == 0) & (tl.program_id(2) == 0):
            _average(
                running_mean,
                running_matrices,
                count,
                verdicts,
                mean,
                matrices,
                block,
                tl.num_programs(0),
                d,
                size,
                HEIGHT,
            )
    map_samples(
        y + block * y_stride_block,
        narrow(y_stride_outer),
        narrow(y_stride_row),
        narrow(y_stride_inner),
        whitener + block * d * d,
        d,
        1,
        x + block * stride_block,
        mean + block * d,
        narrow(stride_outer),
        narrow(stride_row),
        narrow(stride_inner),
        whitener,
        d,
        1,
        x,
        mean,
        0,
        0,
        0,
        None if scale is None else scale + block * d,
        None if shift is None else shift + block * d,
        None,
        weight,
        bias,
        channels,
        positions,
        inner,
        size,
        part * chunk,
        tl.minimum(samples, (part + 1) * chunk),
        tl.program_id(2) * ROWS,
        False,
        HEIGHT,
        ROWS,
        WIDTH,
        PRECISION,
    )


# ---------------------------------------------------------------- backward


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
    # from s = dY 1 and K = dY (X - mean)' of a block, to its place among the results: A = diag(scale) W, B, and s / M.
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
    tl.store(results + places, a)
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


@triton.jit
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
):
    # what the gradient's map takes, for every block, at the start of its scratch memory; gradients of scale and shift
    block, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    inner, samples, d, chunk, eps = narrow(inner), narrow(samples), narrow(d), narrow(chunk), tl.cast(eps, tl.float32)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    total, moment = crossed_sums(
        dy + block * dy_stride_block,
        x + block * stride_block,
        mean + block * d,
        narrow(dy_stride_outer),
        narrow(dy_stride_row),
        narrow(dy_stride_inner),
        narrow(stride_outer),
        narrow(stride_row),
        narrow(stride_inner),
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
            results + region - (2 if IN_REGISTERS else 12) * HEIGHT * HEIGHT,
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


@triton.jit
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
):
    # likewise of group whitening, with every program's part of the gradients of weight and bias
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    parts = tl.num_programs(1) * tl.num_programs(2)
    channels, positions, d, eps = narrow(channels), narrow(positions), narrow(d), tl.cast(eps, tl.float32)
    parameter_place = (block * tl.num_programs(2) + tl.program_id(2)) * d * channels
    total, moment = crossed_channel_sums(
        dy + block * dy_stride_block,
        narrow(dy_stride_row),
        narrow(dy_stride_channel),
        narrow(dy_stride_position),
        x + block * stride_block,
        narrow(stride_row),
        narrow(stride_channel),
        narrow(stride_position),
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
        narrow(channel_chunk),
        narrow(position_chunk),
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
            results + region - (2 if IN_REGISTERS else 12) * HEIGHT * HEIGHT,
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
    for start in range(program * _LANES, length, programs * _LANES):
        column = start + tl.arange(0, _LANES)
        total = tl.zeros((_LANES,), tl.float32)
        for row in range(0, number):
            total += tl.load(rows + tl.cast(row, tl.int64) * length + column, mask=column < length, other=0.0)
        tl.store(result + column, total.to(result.dtype.element_ty), mask=column < length)


@triton.jit
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
    inner, samples, d, chunk = narrow(inner), narrow(samples), narrow(d), narrow(chunk)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    results = scratch + block * region
    if of_weight is not None:
        _add_rows(of_weight, parameter_parts, all_channels, dweight)
    if of_bias is not None:
        _add_rows(of_bias, parameter_parts, all_channels, dbias)
    map_samples(
        dx + block * dx_stride_block,
        narrow(dx_stride_outer),
        narrow(dx_stride_row),
        narrow(dx_stride_inner),
        results,
        1,
        HEIGHT,
        dy + block * dy_stride_block,
        results + 2 * HEIGHT * HEIGHT,
        narrow(dy_stride_outer),
        narrow(dy_stride_row),
        narrow(dy_stride_inner),
        results + HEIGHT * HEIGHT,
        HEIGHT,
        1,
        x + block * stride_block,
        mean + block * d,
        narrow(stride_outer),
        narrow(stride_row),
        narrow(stride_inner),
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
