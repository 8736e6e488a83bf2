"""Whitening in two launches: sums that end in the inverse square root of the covariance, then a map.

A block's array is seen as rows of `d` variables, where the last of several groups may have fewer, and samples on two
axes. What lies outside of a smaller block is 0 in the work's memory, and as in the identity in results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from polywhiten.torch.triton.affine_map import map_samples
from polywhiten.torch.triton.counting import gathered
from polywhiten.torch.triton.moments import shifted_sums
from polywhiten.torch.triton.newton import newton
from polywhiten.torch.triton.newton_registers import newton_in_registers
from polywhiten.torch.triton.tiles import load_matrix, narrow

_LANES = tl.constexpr(128)  # numbers that are read at a time where there are many


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


@triton.jit(do_not_specialize=["variables", "cluster", "block_counters", "iterations"])
def whiten_sums(
    x,
    mean,
    cov,
    whitener,
    scratch,
    verdicts,
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
    MATRICES: tl.constexpr,
):
    # statistics of every block, and a verdict on running averages; where MAPS, the whitened samples too
    block, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    region = narrow(region)
    samples, d, chunk, eps = narrow(samples), narrow(d), narrow(chunk), tl.cast(eps, tl.float32)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    begin, end = part * chunk, tl.minimum(samples, (part + 1) * chunk)
    scratch += block * region
    x += block * stride_block
    near, total, square = shifted_sums(
        x,
        stride_outer,
        stride_row,
        stride_inner,
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
            matrices = scratch + region - MATRICES * HEIGHT * HEIGHT
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
                y_stride_outer,
                y_stride_row,
                y_stride_inner,
                whitener + block * d * d,
                d,
                1,
                x,
                mean + block * d,
                stride_outer,
                stride_row,
                stride_inner,
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


@triton.jit(do_not_specialize=["variables"])
def whiten_map(
    y,
    x,
    mean,
    averaged,
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
    # step of the running averages towards mean and the matrices that are averaged
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    samples, d, chunk = narrow(samples), narrow(d), narrow(chunk)
    size = tl.minimum(d, variables - block * d).to(tl.int32)
    if running_mean is not None:  # noqa: SIM102  # known when the kernel is compiled, unlike the other condition
        if (part == 0) & (tl.program_id(2) == 0):
            _average(
                running_mean,
                running_matrices,
                count,
                verdicts,
                mean,
                averaged,
                block,
                tl.num_programs(0),
                d,
                size,
                HEIGHT,
            )
    map_samples(
        y + block * y_stride_block,
        y_stride_outer,
        y_stride_row,
        y_stride_inner,
        whitener + block * d * d,
        d,
        1,
        x + block * stride_block,
        mean + block * d,
        stride_outer,
        stride_row,
        stride_inner,
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
