"""Matrix products with the samples of every block, one or two, centred on their way and summed with a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.kernels import Term
from polywhiten.torch.triton.tiles import Strides, Tiles, columns, load_matrix, narrow, precision, product

_LARGEST_MATRIX = 64  # rows and columns that are kept while the samples pass


class Channels(NamedTuple):
    """Weight and bias (C,) of channels that lie in groups along the rows: `positions` of each on the last axis."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    positions: int = 1

    def arguments(self, inner: int) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Weight, bias, channels of a group, and positions, as the kernels take them."""
        weight, bias = (None if values is None else values.contiguous() for values in self[:2])
        return weight, bias, inner // self.positions, self.positions


NO_CHANNELS = Channels()


def affine_map(
    terms: Sequence[Term],
    bias: Tensor | None,
    block_axis: int,
    dtype: torch.dtype,
    *,
    before: Channels = NO_CHANNELS,
    after: Channels = NO_CHANNELS,
    scale: Tensor | None = None,
) -> Tensor:
    """As `polywhiten.kernels.Kernels.affine_map`, of one or two terms.

    The weight of the channels `before` multiplies the first array; weight and bias of those `after`, the result; and
    `scale` (blocks, d) the terms' sum before the bias.
    """
    x = terms[0].array
    inner = x.shape[3]
    samples = x.shape[1 - block_axis] * inner
    tiles = Tiles.of(x.shape[block_axis], x.shape[2], samples)
    rows = min(tiles.height, _LARGEST_MATRIX)
    kept = rows == tiles.height  # the matrices; else tiles of theirs come and go for each of the samples', a larger one
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    arguments = (
        argument
        for matrix, array, centre in (terms[0], terms[-1])
        for argument in (matrix, *matrix.stride(), array, centre.contiguous(), *Strides.of(array, block_axis))
    )
    _affine_map[(tiles.blocks, tiles.parts, tiles.height // rows)](
        y,
        *Strides.of(y, block_axis),
        *arguments,
        *(None if values is None else values.contiguous() for values in (scale, bias)),
        before.arguments(inner)[0],
        *after.arguments(inner)[:2],
        *(after if before.weight is None else before).arguments(inner)[2:],
        inner,
        samples,
        x.shape[2],
        tiles.chunk,
        TWO=len(terms) == 2,
        HEIGHT=tiles.height,
        ROWS=rows,
        WIDTH=tiles.width if kept else 64,
        PRECISION=precision(x.dtype),
        num_warps=tiles.warps,
        num_stages=2 if kept else 1,  # with more, two terms need more shared memory than many a device has
    )
    return y


@triton.jit
def load_channels(values, channel, valid):
    return tl.load(values + channel, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def mapped(matrix, x, centre, weight, offsets, valid, total, PRECISION: tl.constexpr):
    # total + matrix (weight x - centre); with no meaning outside, which is not stored
    array = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32)
    if weight is not None:
        array *= weight
    return product(matrix, array - centre[:, None], total, PRECISION)


@triton.jit
def map_samples(
    y,
    y_stride_outer,
    y_stride_row,
    y_stride_inner,
    matrix,
    matrix_stride_row,
    matrix_stride_column,
    x,
    centre,
    stride_outer,
    stride_row,
    stride_inner,
    matrix2,
    matrix2_stride_row,
    matrix2_stride_column,
    x2,
    centre2,
    stride_outer2,
    stride_row2,
    stride_inner2,
    scale,
    bias,
    before,
    weight,
    channel_bias,
    channels,
    positions,
    inner,
    d,
    begin,
    end,
    first_row,
    TWO: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # ROWS rows of the affine map of one block's samples from begin to end
    y_stride_outer, y_stride_row = narrow(y_stride_outer), narrow(y_stride_row)
    y_stride_inner, stride_outer, stride_row = narrow(y_stride_inner), narrow(stride_outer), narrow(stride_row)
    stride_inner, stride_outer2, stride_row2 = narrow(stride_inner), narrow(stride_outer2), narrow(stride_row2)
    stride_inner2, channels, positions = narrow(stride_inner2), narrow(channels), narrow(positions)
    inner, d, begin, end = narrow(inner), narrow(d), narrow(begin), narrow(end)
    rows = first_row + tl.arange(0, ROWS)
    if HEIGHT == ROWS:  # the whole matrices stay
        a = load_matrix(matrix, rows, rows, d, matrix_stride_row, matrix_stride_column).to(tl.float32)
        c = tl.load(centre + rows, mask=rows < d, other=0.0).to(tl.float32)
        if TWO:
            a2 = load_matrix(matrix2, rows, rows, d, matrix2_stride_row, matrix2_stride_column).to(tl.float32)
            c2 = tl.load(centre2 + rows, mask=rows < d, other=0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + rows, mask=rows < d, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + rows, mask=rows < d, other=0.0).to(tl.float32)
    for start in range(begin, end, WIDTH):
        m = start + tl.arange(0, WIDTH)
        its_channel = (m % inner) // positions
        result = tl.zeros((ROWS, WIDTH), tl.float32)
        for step in tl.static_range(0, HEIGHT, ROWS):
            variables = step + tl.arange(0, ROWS)
            valid = (variables < d)[:, None] & (m < end)[None, :]
            if HEIGHT != ROWS:
                a = load_matrix(matrix, rows, variables, d, matrix_stride_row, matrix_stride_column).to(tl.float32)
                c = tl.load(centre + variables, mask=variables < d, other=0.0).to(tl.float32)
            offsets = variables[:, None] * stride_row + columns(m, inner, stride_outer, stride_inner)[None, :]
            its_weight = None
            if before is not None:
                its_weight = load_channels(before, variables[:, None] * channels + its_channel[None, :], valid)
            result = mapped(a, x, c, its_weight, offsets, valid, result, PRECISION)
            if TWO:
                if HEIGHT != ROWS:
                    a2 = load_matrix(matrix2, rows, variables, d, matrix2_stride_row, matrix2_stride_column).to(
                        tl.float32
                    )
                    c2 = tl.load(centre2 + variables, mask=variables < d, other=0.0).to(tl.float32)
                offsets = variables[:, None] * stride_row2 + columns(m, inner, stride_outer2, stride_inner2)[None, :]
                result = mapped(a2, x2, c2, None, offsets, valid, result, PRECISION)
        offsets = rows[:, None] * y_stride_row + columns(m, inner, y_stride_outer, y_stride_inner)[None, :]
        valid = (rows < d)[:, None] & (m < end)[None, :]
        if scale is not None:
            result *= factor[:, None]
        if bias is not None:
            result += shift[:, None]
        if weight is not None:
            result *= load_channels(weight, rows[:, None] * channels + its_channel[None, :], valid)
        if channel_bias is not None:
            result += load_channels(channel_bias, rows[:, None] * channels + its_channel[None, :], valid)
        tl.store(y + offsets, result.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _affine_map(
    y,
    y_stride_block,
    y_stride_outer,
    y_stride_row,
    y_stride_inner,
    matrix,
    matrix_stride_block,
    matrix_stride_row,
    matrix_stride_column,
    x,
    centre,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    matrix2,
    matrix2_stride_block,
    matrix2_stride_row,
    matrix2_stride_column,
    x2,
    centre2,
    stride_block2,
    stride_outer2,
    stride_row2,
    stride_inner2,
    scale,
    bias,
    before,
    weight,
    channel_bias,
    channels,
    positions,
    inner,
    samples,
    d,
    chunk,
    TWO: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    map_samples(
        y + block * y_stride_block,
        y_stride_outer,
        y_stride_row,
        y_stride_inner,
        matrix + block * matrix_stride_block,
        matrix_stride_row,
        matrix_stride_column,
        x + block * stride_block,
        centre + block * d,
        stride_outer,
        stride_row,
        stride_inner,
        matrix2 + block * matrix2_stride_block,
        matrix2_stride_row,
        matrix2_stride_column,
        x2 + block * stride_block2,
        centre2 + block * d,
        stride_outer2,
        stride_row2,
        stride_inner2,
        None if scale is None else scale + block * d,
        None if bias is None else bias + block * d,
        before,
        weight,
        channel_bias,
        channels,
        positions,
        inner,
        d,
        part * chunk,
        tl.minimum(samples, (part + 1) * chunk),
        tl.program_id(2) * ROWS,
        TWO,
        HEIGHT,
        ROWS,
        WIDTH,
        PRECISION,
    )
