"""Mean, covariance and cross moments without a centred copy: sums of parts of the samples, then sums of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.tiles import (
    Strides,
    Tiles,
    columns,
    narrow,
    precision,
    product,
    rounded,
    split,
    store_matrix,
    tile_height,
)

SPREAD = 16  # samples all over the block whose mean is near enough to the block's
_SUMMANDS = 32  # parts that are read together for the last sum


def moments(x: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
    """As `polywhiten.kernels.Kernels.moments`."""
    strides, tiles, inner, samples = _cut(x, block_axis)
    sums, products = _partial_sums(x, tiles, x.shape[2])
    shift = sums.new_empty((tiles.blocks, x.shape[2]))
    _sum_shifted[(tiles.blocks, tiles.parts)](
        x,
        shift,
        sums,
        products,
        *strides,
        inner,
        samples,
        x.shape[2],
        tiles.chunk,
        HEIGHT=tiles.height,
        WIDTH=tiles.width,
        SPREAD=SPREAD,
        PRECISION=precision(x.dtype),
        num_warps=tiles.warps,
    )
    mean, cov = torch.empty_like(shift), sums.new_empty((*shift.shape, x.shape[2]))
    _total_shifted[(tiles.blocks, x.shape[2])](
        sums,
        products,
        shift,
        mean,
        cov,
        tiles.parts,
        x.shape[2],
        samples,
        HEIGHT=tiles.height,
        SUMMANDS=_SUMMANDS,
    )
    return mean, cov


def cross_moments(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    block_axis: int,
    weight: Tensor | None = None,
    whitener: Tensor | None = None,
) -> Crossed:
    """As `polywhiten.kernels.Kernels.cross_moments`, with what `total_crossed` adds."""
    strides, tiles, inner, samples = _cut(x, block_axis)
    sums, products = _partial_sums(x, tiles, x.shape[2])
    _sum_crossed[(tiles.blocks, tiles.parts)](
        dy,
        x,
        mean.contiguous(),
        sums,
        products,
        *Strides.of(dy, block_axis),
        *strides,
        inner,
        samples,
        x.shape[2],
        tiles.chunk,
        HEIGHT=tiles.height,
        WIDTH=tiles.width,
        PRECISION=precision(x.dtype),
        num_warps=tiles.warps,
    )
    return total_crossed(sums, products, samples, weight, whitener)


class Crossed(NamedTuple):
    """S and K of every block, and what follows from them on the way."""

    s: Tensor
    k: Tensor  # diag(weight) K
    s_per_sample: Tensor
    matrix: Tensor | None  # diag(weight) W
    weight_gradient: Tensor | None  # of y = diag(weight) W x


def total_crossed(
    sums: Tensor, products: Tensor, samples: int, weight: Tensor | None = None, whitener: Tensor | None = None
) -> Crossed:
    """Cross moments from the parts' sums; weight is (blocks, d)."""
    blocks, parts, d = sums.shape
    s, s_per_sample, k = (sums.new_empty(shape) for shape in ((blocks, d), (blocks, d), (blocks, d, d)))
    matrix, gradient = (None, None) if weight is None else (torch.empty_like(k), torch.empty_like(s))
    _total_crossed[(blocks, d)](
        sums,
        products,
        weight,
        whitener,
        s,
        k,
        s_per_sample,
        matrix,
        gradient,
        parts,
        d,
        samples,
        HEIGHT=tile_height(d),
        SUMMANDS=_SUMMANDS,
    )
    return Crossed(s, k, s_per_sample, matrix, gradient)


def _cut(x: Tensor, block_axis: int) -> tuple[Strides, Tiles, int, int]:
    inner = x.shape[3]
    samples = x.shape[1 - block_axis] * inner
    return Strides.of(x, block_axis), Tiles.of(x.shape[block_axis], x.shape[2], samples), inner, samples


def _partial_sums(x: Tensor, tiles: Tiles, d: int) -> tuple[Tensor, Tensor]:
    sums = x.new_empty((tiles.blocks, tiles.parts, d), dtype=torch.float32)
    return sums, sums.new_empty((tiles.blocks, tiles.parts, d, d))


@triton.jit
def spread_mean(x, rows, inside, inner, samples, stride_outer, stride_row, stride_inner, SPREAD: tl.constexpr):
    # of samples all over the block: sums of what is left after it has been subtracted lose no digits
    m = tl.arange(0, SPREAD) * (samples // SPREAD | 1)  # odd, or they would be the same corner of all pictures
    offsets = rows[:, None] * stride_row + columns(m, inner, stride_outer, stride_inner)[None, :]
    values = tl.load(x + offsets, mask=inside[:, None] & (m < samples)[None, :], other=0.0).to(tl.float32)
    return tl.sum(values, axis=1) / tl.sum((m < samples).to(tl.float32), axis=0)


@triton.jit
def shifted_sums(
    x,
    stride_outer,
    stride_row,
    stride_inner,
    inner,
    samples,
    d,
    begin,
    end,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # a point near the mean; sums and products, over the samples from begin to end, of x without it
    stride_outer, stride_row, stride_inner = narrow(stride_outer), narrow(stride_row), narrow(stride_inner)
    inner, samples, d, begin, end = narrow(inner), narrow(samples), narrow(d), narrow(begin), narrow(end)
    rows = tl.arange(0, HEIGHT)
    near = spread_mean(x, rows, rows < d, inner, samples, stride_outer, stride_row, stride_inner, SPREAD)
    total = tl.zeros((HEIGHT,), tl.float32)
    square = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    mixed = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for start in range(begin, end, WIDTH):
        m = start + tl.arange(0, WIDTH)
        offsets = rows[:, None] * stride_row + columns(m, inner, stride_outer, stride_inner)[None, :]
        valid = (rows < d)[:, None] & (m < end)[None, :]
        shifted = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32) - near[:, None]
        shifted = tl.where(valid, shifted, 0.0)
        total += tl.sum(shifted, axis=1)
        if PRECISION == "tf32x3":  # the products of high and low digits are each other's transposes
            shifted, low = split(shifted)
            mixed = tl.dot(shifted, tl.trans(low), mixed, input_precision="tf32")
        else:
            shifted = rounded(shifted)
        square = tl.dot(shifted, tl.trans(shifted), square, input_precision="tf32")
    return near, total, square + mixed + tl.trans(mixed)


@triton.jit
def _sum_shifted(
    x,
    shift,
    sums,
    products,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    inner,
    samples,
    d,
    chunk,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = block * tl.num_programs(1) + part
    near, total, square = shifted_sums(
        x + block * stride_block,
        stride_outer,
        stride_row,
        stride_inner,
        inner,
        samples,
        d,
        part * chunk,
        tl.minimum(samples, (part + 1) * chunk),
        HEIGHT,
        WIDTH,
        SPREAD,
        PRECISION,
    )
    rows = tl.arange(0, HEIGHT)
    if part == 0:
        tl.store(shift + block * d + rows, near, mask=rows < d)
    tl.store(sums + place * d + rows, total, mask=rows < d)
    store_matrix(products + place * d * d, square, rows, d)


@triton.jit
def crossed_sums(
    dy,
    x,
    mean,
    dy_stride_outer,
    dy_stride_row,
    dy_stride_inner,
    stride_outer,
    stride_row,
    stride_inner,
    inner,
    d,
    begin,
    end,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # sums, over the samples from begin to end, of dy and of dy (x - mean)'
    dy_stride_outer, dy_stride_row = narrow(dy_stride_outer), narrow(dy_stride_row)
    dy_stride_inner, stride_outer, stride_row = narrow(dy_stride_inner), narrow(stride_outer), narrow(stride_row)
    stride_inner, inner, d, begin, end = narrow(stride_inner), narrow(inner), narrow(d), narrow(begin), narrow(end)
    rows = tl.arange(0, HEIGHT)
    inside = rows < d
    centre = tl.load(mean + rows, mask=inside, other=0.0)
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for start in range(begin, end, WIDTH):
        m = start + tl.arange(0, WIDTH)
        valid = inside[:, None] & (m < end)[None, :]
        offsets = rows[:, None] * stride_row + columns(m, inner, stride_outer, stride_inner)[None, :]
        # dy is 0 outside, so x needn't be
        centred = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32) - centre[:, None]
        offsets = rows[:, None] * dy_stride_row + columns(m, inner, dy_stride_outer, dy_stride_inner)[None, :]
        gradient = tl.load(dy + offsets, mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(gradient, axis=1)
        moment = product(gradient, tl.trans(centred), moment, PRECISION)
    return total, moment


@triton.jit
def _sum_crossed(
    dy,
    x,
    mean,
    sums,
    products,
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
    d,
    chunk,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = block * tl.num_programs(1) + part
    rows = tl.arange(0, HEIGHT)
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
        d,
        part * chunk,
        tl.minimum(samples, (part + 1) * chunk),
        HEIGHT,
        WIDTH,
        PRECISION,
    )
    tl.store(sums + place * d + rows, total, mask=rows < d)
    store_matrix(products + place * d * d, moment, rows, d)


@triton.jit
def _total_shifted(sums, products, shift, mean, cov, parts, d, samples, HEIGHT: tl.constexpr, SUMMANDS: tl.constexpr):
    parts, d, samples = narrow(parts), narrow(d), narrow(samples)
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, HEIGHT)
    sums += block * parts * d
    product = tl.zeros((HEIGHT,), tl.float32)
    total = tl.zeros((HEIGHT,), tl.float32)
    for start in range(0, parts, SUMMANDS):
        part = (start + tl.arange(0, SUMMANDS))[:, None]
        valid = (part < parts) & (columns < d)[None, :]
        offsets = ((block * parts + part) * d + row) * d + columns[None, :]
        product += tl.sum(tl.load(products + offsets, mask=valid, other=0.0), axis=0)
        total += tl.sum(tl.load(sums + part * d + columns[None, :], mask=valid, other=0.0), axis=0)
    off = total / samples
    its_off = tl.sum(tl.where(columns == row, off, 0.0), axis=0)
    place = block * d + row
    tl.store(cov + place * d + columns, product / samples - its_off * off, mask=columns < d)
    tl.store(mean + place, tl.load(shift + place) + its_off)


@triton.jit
def _total_crossed(
    sums,
    products,
    weight,
    whitener,
    s,
    k,
    s_per_sample,
    matrix,
    weight_gradient,
    parts,
    d,
    samples,
    HEIGHT: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    parts, d, samples = narrow(parts), narrow(d), narrow(samples)
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, HEIGHT)
    sums += block * parts * d + row
    product = tl.zeros((HEIGHT,), tl.float32)
    total = 0.0
    for start in range(0, parts, SUMMANDS):
        part = start + tl.arange(0, SUMMANDS)
        valid = (part < parts)[:, None] & (columns < d)[None, :]
        offsets = ((block * parts + part) * d + row)[:, None] * d + columns[None, :]
        product += tl.sum(tl.load(products + offsets, mask=valid, other=0.0), axis=0)
        total += tl.sum(tl.load(sums + part * d, mask=part < parts, other=0.0), axis=0)
    place = block * d + row
    if weight is not None:
        w = tl.load(whitener + place * d + columns, mask=columns < d, other=0.0)
        tl.store(weight_gradient + place, tl.sum(product * w, axis=0))
        its_weight = tl.load(weight + place).to(tl.float32)
        tl.store(matrix + place * d + columns, its_weight * w, mask=columns < d)
        product *= its_weight
    tl.store(k + place * d + columns, product, mask=columns < d)
    tl.store(s + place, total)
    tl.store(s_per_sample + place, total / samples)
