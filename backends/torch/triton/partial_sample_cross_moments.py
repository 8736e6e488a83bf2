"""The first pass of group whitening's backward: for every part of a sample the sums that make s and K.

The parameters are those of channels, not of the groups that are whitened. So dY is multiplied by the weight in this
pass, which sums the gradients of weight and bias too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import load_matrix, load_vector, narrow, narrow_strides, store_matrix
from polywhiten.torch.triton.affine_map import load_channels
from polywhiten.torch.triton.grouped_samples import GroupedSamples
from polywhiten.torch.triton.sample_parts import SampleParts
from polywhiten.torch.triton.tf32 import multiply_add
from polywhiten.torch.triton.tiles import precision, tile_height


class PartialSampleCrossMoments(NamedTuple):
    """s (N, parts, d) and K (N, parts, d, d) of weight dy, and gradients (parts, C) of the parameters that exist."""

    sums: Tensor
    products: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


def partial_sample_cross_moments(
    dy: GroupedSamples,
    x: GroupedSamples,
    mean: Tensor,
    whitener: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> PartialSampleCrossMoments:
    """Return the partial cross moments of weight dy and x."""
    num_blocks, _, d, _ = x.x.shape
    parts = SampleParts.of(num_blocks, d, x.channels, x.positions, x.strides)
    sums = mean.new_empty((num_blocks, parts.num_parts, d))
    products = sums.new_empty((num_blocks, parts.num_parts, d, d))
    dweight, dbias = (
        None if parameter is None else sums.new_empty((num_blocks * parts.num_position_parts, d * x.channels))
        for parameter in (weight, bias)
    )
    _partial_sample_cross_moments[(num_blocks, parts.num_channel_parts, parts.num_position_parts)](
        dy.x,
        *dy.strides,
        x.x,
        *x.strides,
        mean=mean.contiguous(),
        whitener=whitener.contiguous(),
        weight=None if weight is None else weight.contiguous(),
        sums=sums,
        products=products,
        dweight=dweight,
        dbias=dbias,
        channels=x.channels,
        positions=x.positions,
        d=d,
        part_channels=parts.part_channels,
        part_positions=parts.part_positions,
        HEIGHT=tile_height(d),
        CHANNELS=parts.tile_channels,
        POSITIONS=parts.tile_positions,
        PRECISION=precision(x.x.dtype),
        num_stages=2,
    )
    return PartialSampleCrossMoments(sums, products, dweight, dbias)


@triton.jit
def load_grouped(array, rows, channel, position, valid):
    # Return samples of (pointer, stride_row, stride_channel, stride_position); 0 where they are not valid.
    pointer, stride_row, stride_channel, stride_position = array
    columns = channel * stride_channel + position * stride_position
    return tl.load(pointer + (rows[:, None] * stride_row + columns[None, :]), mask=valid, other=0.0)


@triton.jit
def sum_sample_cross_moments(
    dy, x, mean, whitener, weight, dweight, dbias, channels, positions, d,
    channel_part, position_part, part_channels, part_positions,
    HEIGHT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return the sums of weight dy and of weight dy (x - mean)' over a part of a sample. Store the part's sums over the
    # positions for the gradients of weight and bias.
    dy, x = narrow_strides(dy), narrow_strides(x)
    channels, positions, d = narrow(channels), narrow(positions), narrow(d)
    part_channels, part_positions = narrow(part_channels), narrow(part_positions)
    rows = tl.arange(0, HEIGHT)
    centre = load_vector(mean, rows, d)
    if dweight is not None:
        w = load_matrix((whitener, d, 1), rows, rows, d)
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    column = tl.arange(0, CHANNELS * POSITIONS)
    first_position = position_part * part_positions
    end_position = tl.minimum(positions, first_position + part_positions)
    end_channel = tl.minimum(channels, (channel_part + 1) * part_channels)
    for first_channel in range(channel_part * part_channels, end_channel, CHANNELS):
        channel = first_channel + column % CHANNELS
        weight_sums = tl.zeros((HEIGHT, CHANNELS), tl.float32)
        bias_sums = tl.zeros((HEIGHT, CHANNELS), tl.float32)
        for start in range(first_position, end_position, POSITIONS):
            position = start + column // CHANNELS
            valid = (rows < d)[:, None] & ((channel < end_channel) & (position < end_position))[None, :]
            x_tile = load_grouped(x, rows, channel, position, valid).to(tl.float32)
            centred = x_tile - centre[:, None]  # not 0 outside, but dy is
            gradient = load_grouped(dy, rows, channel, position, valid).to(tl.float32)
            if dbias is not None:
                bias_sums += tl.sum(tl.reshape(gradient, (HEIGHT, POSITIONS, CHANNELS)), axis=1)
            if dweight is not None:
                white = multiply_add(w, centred, tl.zeros((HEIGHT, CHANNELS * POSITIONS), tl.float32), PRECISION)
                weight_sums += tl.sum(tl.reshape(gradient * white, (HEIGHT, POSITIONS, CHANNELS)), axis=1)
            if weight is not None:
                gradient *= load_channels(weight, rows, channel, channels, valid)
            total += tl.sum(gradient, axis=1)
            moment = multiply_add(gradient, tl.trans(centred), moment, PRECISION)
        stored_channel = first_channel + tl.arange(0, CHANNELS)
        offsets = rows[:, None] * channels + stored_channel[None, :]
        valid = (rows < d)[:, None] & (stored_channel < end_channel)[None, :]
        if dweight is not None:
            tl.store(dweight + offsets, weight_sums, mask=valid)
        if dbias is not None:
            tl.store(dbias + offsets, bias_sums, mask=valid)
    return total, moment


@triton.jit
def _partial_sample_cross_moments(
    dy, dy_stride_block, dy_stride_row, dy_stride_channel, dy_stride_position,
    x, x_stride_block, x_stride_row, x_stride_channel, x_stride_position,
    mean, whitener, weight, sums, products, dweight, dbias,
    channels, positions, d, part_channels, part_positions,
    HEIGHT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, channel_part, position_part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_position_parts = tl.num_programs(2)
    slot = (block * tl.num_programs(1) + channel_part) * num_position_parts + position_part
    parameter_offset = (block * num_position_parts + position_part) * d * channels
    rows = tl.arange(0, HEIGHT)
    total, moment = sum_sample_cross_moments(
        (dy + block * dy_stride_block, dy_stride_row, dy_stride_channel, dy_stride_position),
        (x + block * x_stride_block, x_stride_row, x_stride_channel, x_stride_position),
        mean + block * d,
        whitener + block * d * d,
        weight,
        None if dweight is None else dweight + parameter_offset,
        None if dbias is None else dbias + parameter_offset,
        channels,
        positions,
        d,
        channel_part,
        position_part,
        part_channels,
        part_positions,
        HEIGHT,
        CHANNELS,
        POSITIONS,
        PRECISION,
    )
    tl.store(sums + slot * d + rows, total, mask=rows < d)
    store_matrix(products + slot * d * d, moment, rows, d)
