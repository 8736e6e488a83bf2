"""Group whitening with weight and bias: forward, of a small sample in one launch, and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.kernels import Term
from polywhiten.statistics import Statistics
from polywhiten.torch.triton.affine_map import Channels, affine_map, load_channels, mapped
from polywhiten.torch.triton.moments import SPREAD, Crossed, moments, shifted_sums, total_crossed
from polywhiten.torch.triton.newton import SCRATCH, constants, inverse_sqrt, inverse_sqrt_adjoint, newton, scratch
from polywhiten.torch.triton.tiles import (
    LONGEST,
    PROGRAMS,
    Strides,
    columns,
    load_matrix,
    narrow,
    precision,
    product,
    store_matrix,
    tile_height,
    tile_width,
)

_LARGEST_SAMPLE = 2**16  # elements that a program reads twice: those of all programs at work stay in the device's cache
_LARGEST_MATRIX = 64  # that leaves registers for weight and bias


class WholeGroupWhitening(NamedTuple):
    """Forward and backward of (N, q, g, l), each sample a block.

    Its `strides` are those of x as (N, g, channels of a group, positions of the picture).
    """

    x: Tensor
    eps: float
    iterations: int
    channels: int
    positions: int
    strides: tuple[int, int, int, int]

    @classmethod
    def of(cls, x: Tensor, eps: float, iterations: int, channels: int) -> WholeGroupWhitening | None:
        """None where x has positions before and after the channels, or too many groups."""
        _, lead, groups, inner = x.shape
        channels //= groups
        strides = _strides(x, channels)
        if strides is None or groups > _LARGEST_MATRIX:
            return None
        return cls(x, eps, iterations, channels, lead * inner // channels, strides)

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """As `polywhiten.reference.Reference.forward`."""
        x = self.x
        channels = Channels(weight, bias, x.shape[3] // self.channels)
        if x[0].numel() <= _LARGEST_SAMPLE and x.shape[1] * x.shape[3] <= LONGEST:
            return self._forward_in_one(channels)
        mean, cov = moments(x, 0)
        stats = Statistics(mean, cov, inverse_sqrt(cov, self.eps, self.iterations))
        return affine_map([Term(stats.whitener, x, mean)], None, 0, x.dtype, after=channels), stats

    def backward(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `polywhiten.reference.Reference.backward`, of dy in the shape of x."""
        x = self.x
        crossed, dweight, dbias = self._cross_moments(weight, bias, stats, dy)
        samples = x.shape[1] * x.shape[3]
        b = inverse_sqrt_adjoint(stats.covariance, crossed.k, self.eps, self.iterations, samples)
        terms = [Term(stats.whitener.mT, dy, crossed.s_per_sample), Term(b, x, stats.mean)]
        dx = affine_map(terms, None, 0, x.dtype, before=Channels(weight, None, x.shape[3] // self.channels))
        return dx, dweight, dbias

    def _forward_in_one(self, channels: Channels) -> tuple[Tensor, Statistics]:
        x = self.x
        blocks, _, d, inner = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mean = x.new_empty((blocks, d), dtype=torch.float32)
        cov, whitener = mean.new_empty((blocks, d, d)), mean.new_empty((blocks, d, d))
        memory = scratch(mean, blocks, d)
        _whiten_sample[(memory.shape[0],)](
            y,
            *Strides.of(y, 0),
            x,
            *Strides.of(x, 0),
            mean,
            cov,
            whitener,
            memory,
            *channels.arguments(inner),
            inner,
            x.shape[1] * inner,
            d,
            blocks,
            self.eps,
            self.iterations,
            MATRICES=SCRATCH,
            WIDTH=tile_width(d),
            SPREAD=SPREAD,
            X_PRECISION=precision(x.dtype),
            **constants(d),
        )
        return y, Statistics(mean, cov, whitener)

    def _cross_moments(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Crossed, Tensor | None, Tensor | None]:
        """Cross moments of weight dy and x, and the gradients of weight and bias."""
        x = self.x
        blocks, _, d, _ = x.shape
        parts = ChannelParts.of(
            blocks, d, self.channels, self.positions, side_by_side=self.strides[2] < self.strides[3]
        )
        sums = x.new_empty((blocks, parts.of_channels * parts.of_positions, d), dtype=torch.float32)
        products = sums.new_empty((*sums.shape, d))
        of_weight, of_bias = (
            None if parameter is None else sums.new_empty((blocks * parts.of_positions, d * self.channels))
            for parameter in (weight, bias)
        )
        _sum_crossed_channels[(blocks, parts.of_channels, parts.of_positions)](
            dy,
            *(_strides(dy, self.channels) or ()),
            x,
            *self.strides,
            stats.mean.contiguous(),
            stats.whitener.contiguous(),
            None if weight is None else weight.contiguous(),
            sums,
            products,
            of_weight,
            of_bias,
            self.channels,
            self.positions,
            d,
            parts.channel_chunk,
            parts.position_chunk,
            HEIGHT=tile_height(d),
            CHANNELS=parts.tile_channels,
            POSITIONS=parts.tile_positions,
            PRECISION=precision(x.dtype),
            num_stages=2,
        )
        crossed = total_crossed(sums, products, self.channels * self.positions)
        return crossed, _summed(of_weight, weight), _summed(of_bias, bias)


class ChannelParts(NamedTuple):
    """How samples are cut for their cross moments: a tile's columns are some positions of some channels of a group."""

    tile_channels: int
    tile_positions: int
    channel_chunk: int
    position_chunk: int
    of_channels: int
    of_positions: int

    @classmethod
    def of(cls, blocks: int, d: int, channels: int, positions: int, *, side_by_side: bool) -> ChannelParts:
        """For so many channels a group; they are `side_by_side` where they are nearer in memory than positions."""
        width = tile_width(d) // 2  # so much is kept at a time that more wouldn't leave enough registers
        near = positions == 1 or side_by_side
        tile_channels = min(triton.next_power_of_2(channels), width) if near else 1
        tile_positions = width // tile_channels
        programs = max(triton.cdiv(PROGRAMS, blocks), triton.cdiv(channels * positions, LONGEST))
        channel_chunk = _chunk(channels, tile_channels, programs)
        of_channels = triton.cdiv(channels, channel_chunk)
        position_chunk = _chunk(positions, tile_positions, triton.cdiv(programs, of_channels))
        of_positions = triton.cdiv(positions, position_chunk)
        return cls(tile_channels, tile_positions, channel_chunk, position_chunk, of_channels, of_positions)


def _strides(x: Tensor, channels: int) -> tuple[int, int, int, int] | None:
    """Of (N, q, g, l) as (N, g, channels, positions); None where the positions lie on both of q and l."""
    block, outer, row, step = x.stride()
    if x.shape[1] == 1:
        return block, row, x.shape[3] // channels * step, step
    return (block, row, step, outer) if x.shape[3] == channels else None


def _chunk(size: int, tile: int, parts: int) -> int:
    """Of about equal parts of an axis, each a number of tiles."""
    tiles: int = triton.cdiv(triton.cdiv(size, tile), parts)
    return tiles * tile


def _summed(parts: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if parts is None or parameter is None else parts.sum(0).to(parameter.dtype)


@triton.jit
def _whiten_sample(
    y,
    y_stride_block,
    y_stride_outer,
    y_stride_row,
    y_stride_inner,
    x,
    stride_block,
    stride_outer,
    stride_row,
    stride_inner,
    mean,
    cov,
    whitener,
    scratch,
    weight,
    bias,
    channels,
    positions,
    inner,
    samples,
    d,
    count,
    eps,
    iterations,
    MATRICES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPREAD: tl.constexpr,
    X_PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr,
    HEIGHT: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    y_stride_outer, y_stride_row = narrow(y_stride_outer), narrow(y_stride_row)
    y_stride_inner, stride_outer, stride_row = narrow(y_stride_inner), narrow(stride_outer), narrow(stride_row)
    stride_inner = narrow(stride_inner)
    channels, positions, inner, samples = narrow(channels), narrow(positions), narrow(inner), narrow(samples)
    d = narrow(d)
    rows = tl.arange(0, HEIGHT)
    scratch += tl.program_id(0) * MATRICES * HEIGHT * HEIGHT
    for sample in range(tl.program_id(0), count, tl.num_programs(0)):
        block = tl.cast(sample, tl.int64)
        its_x = x + block * stride_block
        its_y = y + block * y_stride_block
        its_cov = cov + block * d * d
        near, total, square = shifted_sums(
            its_x,
            stride_outer,
            stride_row,
            stride_inner,
            inner,
            samples,
            d,
            0,
            samples,
            HEIGHT,
            WIDTH,
            SPREAD,
            X_PRECISION,
        )
        off = total / samples
        centre = near + off
        tl.store(mean + block * d + rows, centre, mask=rows < d)
        store_matrix(its_cov, square / samples - off[:, None] * off[None, :], rows, d)
        tl.debug_barrier()
        w = newton(its_cov, d, scratch, d, eps, iterations, SMALLEST, HEIGHT, TILE, STEP, PRECISION)
        store_matrix(whitener + block * d * d, w, rows, d)
        for start in range(0, samples, WIDTH):
            m = start + tl.arange(0, WIDTH)
            valid = (rows < d)[:, None] & (m < samples)[None, :]
            offsets = rows[:, None] * stride_row + columns(m, inner, stride_outer, stride_inner)[None, :]
            result = mapped(w, its_x, centre, None, offsets, valid, tl.zeros((HEIGHT, WIDTH), tl.float32), X_PRECISION)
            channel = rows[:, None] * channels + ((m % inner) // positions)[None, :]
            if weight is not None:
                result *= load_channels(weight, channel, valid)
            if bias is not None:
                result += load_channels(bias, channel, valid)
            offsets = rows[:, None] * y_stride_row + columns(m, inner, y_stride_outer, y_stride_inner)[None, :]
            tl.store(its_y + offsets, result.to(y.dtype.element_ty), mask=valid)
        tl.debug_barrier()


@triton.jit
def crossed_channel_sums(
    dy,
    dy_stride_row,
    dy_stride_channel,
    dy_stride_position,
    x,
    stride_row,
    stride_channel,
    stride_position,
    mean,
    whitener,
    weight,
    of_weight,
    of_bias,
    channels,
    positions,
    d,
    channel_part,
    position_part,
    channel_chunk,
    position_chunk,
    HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # sums of weight dy and of weight dy (x - mean)' over some channels and positions of a sample; and over these
    # positions those of the gradients of weight and bias
    dy_stride_row, dy_stride_channel = narrow(dy_stride_row), narrow(dy_stride_channel)
    dy_stride_position, stride_row = narrow(dy_stride_position), narrow(stride_row)
    stride_channel, stride_position, channels = narrow(stride_channel), narrow(stride_position), narrow(channels)
    positions, d, channel_chunk = narrow(positions), narrow(d), narrow(channel_chunk)
    position_chunk = narrow(position_chunk)
    rows = tl.arange(0, HEIGHT)
    inside = rows < d
    centre = tl.load(mean + rows, mask=inside, other=0.0)
    if of_weight is not None:
        w = load_matrix(whitener, rows, rows, d, d, 1)
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    column = tl.arange(0, CHANNELS * POSITIONS)
    first_position = position_part * position_chunk
    last_position = tl.minimum(positions, first_position + position_chunk)
    last_channel = tl.minimum(channels, (channel_part + 1) * channel_chunk)
    for first in range(channel_part * channel_chunk, last_channel, CHANNELS):
        channel = first + column % CHANNELS
        its_weight = tl.zeros((HEIGHT, CHANNELS), tl.float32)
        its_bias = tl.zeros((HEIGHT, CHANNELS), tl.float32)
        for start in range(first_position, last_position, POSITIONS):
            position = start + column // CHANNELS
            valid = inside[:, None] & ((channel < last_channel) & (position < last_position))[None, :]
            offsets = rows[:, None] * stride_row + (channel * stride_channel + position * stride_position)[None, :]
            centred = tl.load(x + offsets, mask=valid, other=0.0).to(tl.float32) - centre[:, None]
            offsets = rows[:, None] * dy_stride_row
            offsets += (channel * dy_stride_channel + position * dy_stride_position)[None, :]
            gradient = tl.load(dy + offsets, mask=valid, other=0.0).to(tl.float32)  # 0 outside, so centred needn't be
            if of_bias is not None:
                its_bias += tl.sum(tl.reshape(gradient, (HEIGHT, POSITIONS, CHANNELS)), axis=1)
            if of_weight is not None:
                white = product(w, centred, tl.zeros((HEIGHT, CHANNELS * POSITIONS), tl.float32), PRECISION)
                its_weight += tl.sum(tl.reshape(gradient * white, (HEIGHT, POSITIONS, CHANNELS)), axis=1)
            if weight is not None:
                gradient *= load_channels(weight, rows[:, None] * channels + channel[None, :], valid)
            total += tl.sum(gradient, axis=1)
            moment = product(gradient, tl.trans(centred), moment, PRECISION)
        its_channel = first + tl.arange(0, CHANNELS)
        offsets = rows[:, None] * channels + its_channel[None, :]
        valid = inside[:, None] & (its_channel < last_channel)[None, :]
        if of_weight is not None:
            tl.store(of_weight + offsets, its_weight, mask=valid)
        if of_bias is not None:
            tl.store(of_bias + offsets, its_bias, mask=valid)
    return total, moment


@triton.jit
def _sum_crossed_channels(
    dy,
    dy_stride_block,
    dy_stride_row,
    dy_stride_channel,
    dy_stride_position,
    x,
    stride_block,
    stride_row,
    stride_channel,
    stride_position,
    mean,
    whitener,
    weight,
    sums,
    products,
    of_weight,
    of_bias,
    channels,
    positions,
    d,
    channel_chunk,
    position_chunk,
    HEIGHT: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, channel_part, position_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position_parts = tl.num_programs(2)
    place = (block * tl.num_programs(1) + channel_part) * position_parts + position_part
    parameter_place = (block * position_parts + position_part) * d * channels
    rows = tl.arange(0, HEIGHT)
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
        channel_part,
        position_part,
        channel_chunk,
        position_chunk,
        HEIGHT,
        CHANNELS,
        POSITIONS,
        PRECISION,
    )
    tl.store(sums + place * d + rows, total, mask=rows < d)
    store_matrix(products + place * d * d, moment, rows, d)
