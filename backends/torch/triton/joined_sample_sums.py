"""The sums over samples that the joined backward pass of group whitening needs, by products in bfloat16 or float16.

The weight belongs to channels, of which every row has several. Where the positions of a channel are adjacent, a program
takes one channel after the other: K without the weight gives both K with it and the gradient of the weight. Otherwise
the channels are adjacent, and a tile has several of them.
"""

import triton
import triton.language as tl

from polywhiten.torch.triton.addressing import load_matrix, load_vector, narrow, narrow_multiple
from polywhiten.torch.triton.affine_map import load_channels
from polywhiten.torch.triton.bfloat16_parts import multiply_parts
from polywhiten.torch.triton.joined_sums import cross_moments_shift, shift_back
from polywhiten.torch.triton.partial_sample_cross_moments import load_grouped


@triton.jit
def grouped_samples(
    pointer, stride_row, stride_channel, stride_position, CHANNELS: tl.constexpr, ALIGNMENT: tl.constexpr
):
    # Return the samples as the functions below take them. The adjacent axis has stride 1, the others are multiples.
    stride_row = narrow_multiple(stride_row, ALIGNMENT)
    if CHANNELS == 1:
        return pointer, stride_row, narrow_multiple(stride_channel, ALIGNMENT), narrow(stride_position)
    else:
        return pointer, stride_row, narrow(stride_channel), narrow_multiple(stride_position, ALIGNMENT)


@triton.jit
def _load_row_parameter(parameter, rows, channel, channels, d):
    # Return the values of one channel of every row.
    return tl.load(parameter + rows * channels + channel, mask=rows < d, other=0.0).to(tl.float32)


@triton.jit
def sum_channel_by_channel(
    dy, x, mean, variances, whitener, weight, dweight, dbias, channels, d,
    first_channel, end_channel, first_position, end_position,
    HEIGHT: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return the sums of weight dy and of weight dy (x - mean)' over some channels and positions of a sample. Store the
    # sums over these positions for the gradients of weight and bias.
    rows = tl.arange(0, HEIGHT)
    centre = load_vector(mean, rows, d)
    shift = cross_moments_shift(centre, variances, rows, d, x[0].dtype.element_ty)
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for channel in range(first_channel, end_channel):
        sums = tl.zeros((HEIGHT, POSITIONS), tl.float32)
        product = tl.zeros((HEIGHT, HEIGHT), tl.float32)
        for start in tl.range(first_position, end_position, POSITIONS, num_stages=STAGES):
            position = start + tl.arange(0, POSITIONS)
            valid = (rows < d)[:, None] & (position < end_position)[None, :]
            gradient = load_grouped(dy, rows, channel, position, valid)
            shifted = shift_back(load_grouped(x, rows, channel, position, valid), shift)
            sums += gradient.to(tl.float32)
            product = multiply_parts(gradient, tl.trans(shifted), product, PRECISION)
        channel_sum = tl.sum(sums, axis=1)
        product += channel_sum[:, None] * (shift - centre)[None, :]
        if dbias is not None:
            tl.store(dbias + rows * channels + channel, channel_sum, mask=rows < d)
        if dweight is not None:
            w = load_matrix((whitener, d, 1), rows, rows, d)
            tl.store(dweight + rows * channels + channel, tl.sum(product * w, axis=1), mask=rows < d)
        if weight is not None:
            scale = _load_row_parameter(weight, rows, channel, channels, d)
            channel_sum *= scale
            product *= scale[:, None]
        total += channel_sum
        moment += product
    return total, moment


@triton.jit
def sum_adjacent_channels(
    dy, x, mean, variances, whitener, weight, dweight, dbias, channels, d,
    first_channel, end_channel, first_position, end_position,
    HEIGHT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE_TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return and store what `sum_channel_by_channel` does. WHOLE_TILES says that CHANNELS divides the channels of a row.
    rows = tl.arange(0, HEIGHT)
    column = tl.arange(0, CHANNELS * POSITIONS)
    centre = load_vector(mean, rows, d)
    shift = cross_moments_shift(centre, variances, rows, d, x[0].dtype.element_ty)
    if dweight is not None:
        w = load_matrix((whitener, d, 1), rows, rows, d)
        white_shift = tl.sum(w * (shift - centre)[None, :], axis=1)
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for tile_channel in range(first_channel, end_channel, CHANNELS):
        channel = tile_channel + column % CHANNELS
        if weight is not None:
            valid_channels = (rows < d)[:, None] & (channel < end_channel)[None, :]
            scale = load_channels(weight, rows, channel, channels, valid_channels)
        weight_sums = tl.zeros((HEIGHT, CHANNELS * POSITIONS), tl.float32)
        bias_sums = tl.zeros((HEIGHT, CHANNELS * POSITIONS), tl.float32)
        for start in tl.range(first_position, end_position, POSITIONS, num_stages=STAGES):
            position = start + column // CHANNELS
            valid = (rows < d)[:, None] & (position < end_position)[None, :]
            if not WHOLE_TILES:
                valid = valid & (channel < end_channel)[None, :]
            gradient = load_grouped(dy, rows, channel, position, valid).to(tl.float32)
            shifted = shift_back(load_grouped(x, rows, channel, position, valid), shift)
            bias_sums += gradient
            if dweight is not None:
                white = tl.zeros((HEIGHT, CHANNELS * POSITIONS), tl.float32) + white_shift[:, None]
                weight_sums += gradient * multiply_parts(w, shifted, white, PRECISION)
            if weight is not None:
                gradient *= scale
            if x[0].dtype.element_ty == tl.float32:
                moment = multiply_parts(gradient, tl.trans(shifted), moment, PRECISION)
            else:  # two parts have more digits than half precision
                moment = multiply_parts(gradient, tl.trans(shifted), moment, "bf16x3")
        stored_channel = tile_channel + tl.arange(0, CHANNELS)
        offsets = rows[:, None] * channels + stored_channel[None, :]
        valid = (rows < d)[:, None] & (stored_channel < end_channel)[None, :]
        if dweight is not None:
            tl.store(dweight + offsets, _sum_positions(weight_sums, CHANNELS), mask=valid)
        if dbias is not None:
            tl.store(dbias + offsets, _sum_positions(bias_sums, CHANNELS), mask=valid)
        if weight is not None:
            bias_sums *= scale
        total += tl.sum(bias_sums, axis=1)
    return total, moment + total[:, None] * (shift - centre)[None, :]


@triton.jit
def _sum_positions(tile, CHANNELS: tl.constexpr):
    # Return the sums over the positions of each channel.
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // CHANNELS, CHANNELS)), axis=1)
