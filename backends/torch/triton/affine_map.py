"""The last pass over the samples, forward and backward: products of matrices with one or two centred arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.kernels import Term
from polywhiten.torch.triton.addressing import (
    load_matrix,
    load_samples,
    load_vector,
    narrow,
    narrow_strides,
    tile_pointers,
)
from polywhiten.torch.triton.bfloat16_parts import multiply_parts
from polywhiten.torch.triton.tiles import Strides, Tiles, precision

_MAX_ROWS = 64  # of the matrices that a program keeps in registers while the samples pass


class ChannelAffine(NamedTuple):
    """Parameters (C,) of channels, where a row has several and each has `positions` samples on the last axis.

    `input_weight` multiplies the first array; `weight` multiplies the result, and `bias` is added to it.
    """

    input_weight: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    positions: int = 1

    def arguments(self, inner: int) -> dict[str, Tensor | int | None]:
        """Return the arguments of the kernels for rows of `inner` samples on their last axis."""
        input_weight, weight, bias = (None if each is None else each.contiguous() for each in self[:3])
        return {
            "input_weight": input_weight,
            "weight": weight,
            "bias": bias,
            "channels": inner // self.positions,
            "positions": self.positions,
        }


NO_CHANNEL_AFFINE = ChannelAffine()


def affine_map(
    terms: Sequence[Term],
    row_bias: Tensor | None,
    block_axis: int,
    dtype: torch.dtype,
    row_scale: Tensor | None = None,
    channel_affine: ChannelAffine = NO_CHANNEL_AFFINE,
) -> Tensor:
    """Return row_scale (sum of one or two terms) + row_bias, as `polywhiten.kernels.Kernels.affine_map`.

    The weights and the bias of channels are applied in the same pass.
    """
    x = terms[0].array
    d, inner = x.shape[2:]
    samples = x.shape[1 - block_axis] * inner
    tiles = Tiles.of(x.shape[block_axis], d, samples)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    arguments = (
        argument
        for matrix, array, centre in (terms[0], terms[-1])
        for argument in (matrix, *matrix.stride(), array, *Strides.of(array, block_axis), centre.contiguous())
    )
    _affine_map[map_grid(tiles)](
        y,
        *Strides.of(y, block_axis),
        *arguments,
        row_scale=None if row_scale is None else row_scale.contiguous(),
        row_bias=None if row_bias is None else row_bias.contiguous(),
        **channel_affine.arguments(inner),
        inner=inner,
        samples=samples,
        d=d,
        part_size=tiles.part_size,
        HAS_SECOND_TERM=len(terms) == 2,
        **map_constants(tiles, precision(x.dtype)),
    )
    return y


def map_grid(tiles: Tiles) -> tuple[int, int, int]:
    """Return the programs of a map: for every block, part of its samples, and tile of the matrices' rows."""
    return tiles.num_blocks, tiles.num_parts, tiles.height // min(tiles.height, _MAX_ROWS)


def map_constants(tiles: Tiles, x_precision: str) -> dict[str, Any]:
    """Return the constants and the options that a map is compiled for."""
    keeps_matrices = tiles.height <= _MAX_ROWS  # else every tile of samples, a larger one, loads the matrices again
    return {
        "HEIGHT": tiles.height,
        "ROWS": min(tiles.height, _MAX_ROWS),
        "WIDTH": tiles.width if keeps_matrices else 64,
        "PRECISION": x_precision,
        "num_warps": tiles.num_warps,
        "num_stages": 2 if keeps_matrices else 1,  # more would need more shared memory than many devices have
    }


@triton.jit
def load_channels(values, rows, channel, channels, valid):
    # Return the values of the channels of some samples, where each row has `channels` of them.
    return tl.load(values + (rows[:, None] * channels + channel[None, :]), mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _known_values(values, rows, d, channels, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    # Return the values of the channels of every tile with CHANNELS "same", where a tile begins with the first channel.
    if values is None or CHANNELS != "same":
        return 0.0
    else:
        return load_channels(values, rows, tl.arange(0, WIDTH) % channels, channels, (rows < d)[:, None])


@triton.jit
def _channel_values(values, known, rows, d, samples, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    # Return the values of the channels of a tile of samples (start, end, inner, channels, positions). With CHANNELS
    # "two" it has at most two channels, and with "same" always the `known` ones.
    start, end, inner, channels, positions = samples
    m = start + tl.arange(0, WIDTH)
    if CHANNELS == "same":
        return known
    elif CHANNELS == "two":
        first = start // positions
        pointers = values + rows * channels + first
        first_value = tl.load(pointers, mask=rows < d, other=0.0).to(tl.float32)
        has_second = rows < tl.where(first + 1 < channels, d, 0)
        second_value = tl.load(pointers + 1, mask=has_second, other=0.0).to(tl.float32)
        return tl.where((m < (first + 1) * positions)[None, :], first_value[:, None], second_value[:, None])
    else:
        valid = (rows < d)[:, None] & (m < end)[None, :]
        return load_channels(values, rows, (m % inner) // positions, channels, valid)


@triton.jit
def _load_term(matrix, centre, rows, variables, d):
    # Return the rows of a matrix for some variables, and the centre of these.
    return load_matrix(matrix, rows, variables, d).to(tl.float32), load_vector(centre, variables, d)


@triton.jit
def _add_term(result, a, values, c, PRECISION: tl.constexpr):
    # Return result + a (values - c); meaningless where values are not valid.
    if PRECISION == "bf16x6" and values.dtype == tl.bfloat16:  # a c is subtracted in float32: bfloat16 has fewer digits
        return multiply_parts(a, values, result - tl.sum(a * c[None, :], axis=1)[:, None], PRECISION)
    else:
        return multiply_parts(a, values.to(tl.float32) - c[:, None], result, PRECISION)


@triton.jit
def map_samples(
    y, term, second_term, row_scale, row_bias, input_weight, weight, bias, channels, positions,
    inner, d, begin, end, first_row,
    HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Store ROWS rows of the affine map of the samples of a block from `begin` to `end`. A term is (matrix, x, centre);
    # the second one may be None, as may row_scale and all that follows up to the bias.
    matrix, x, centre = term
    y, x, channels, positions = narrow_strides(y), narrow_strides(x), narrow(channels), narrow(positions)
    inner, d, begin, end = narrow(inner), narrow(d), narrow(begin), narrow(end)
    rows = first_row + tl.arange(0, ROWS)
    if second_term is not None:
        matrix2, x2, centre2 = second_term
        x2 = narrow_strides(x2)
    if HEIGHT == ROWS:  # the matrices stay in registers
        a, c = _load_term(matrix, centre, rows, rows, d)
        if second_term is not None:
            a2, c2 = _load_term(matrix2, centre2, rows, rows, d)
    if row_scale is not None:
        scale = load_vector(row_scale, rows, d)
    if row_bias is not None:
        offset = load_vector(row_bias, rows, d)
    known_input_weight = _known_values(input_weight, rows, d, channels, WIDTH, CHANNELS)
    known_weight = _known_values(weight, rows, d, channels, WIDTH, CHANNELS)
    known_bias = _known_values(bias, rows, d, channels, WIDTH, CHANNELS)
    for start in range(begin, end, WIDTH):
        m, tile = start + tl.arange(0, WIDTH), (start, end, inner, channels, positions)
        result = tl.zeros((ROWS, WIDTH), tl.float32)
        for first_variable in tl.static_range(0, HEIGHT, ROWS):
            variables = first_variable + tl.arange(0, ROWS)
            valid = (variables < d)[:, None] & (m < end)[None, :]
            if HEIGHT != ROWS:
                a, c = _load_term(matrix, centre, rows, variables, d)
            values = load_samples(x, variables, m, inner, valid)
            if input_weight is not None:
                factors = _channel_values(input_weight, known_input_weight, rows, d, tile, WIDTH, CHANNELS)
                values = values.to(tl.float32) * factors
            result = _add_term(result, a, values, c, PRECISION)
            if second_term is not None:
                if HEIGHT != ROWS:
                    a2, c2 = _load_term(matrix2, centre2, rows, variables, d)
                result = _add_term(result, a2, load_samples(x2, variables, m, inner, valid), c2, PRECISION)
        valid = (rows < d)[:, None] & (m < end)[None, :]
        if row_scale is not None:
            result *= scale[:, None]
        if row_bias is not None:
            result += offset[:, None]
        if weight is not None:
            result *= _channel_values(weight, known_weight, rows, d, tile, WIDTH, CHANNELS)
        if bias is not None:
            result += _channel_values(bias, known_bias, rows, d, tile, WIDTH, CHANNELS)
        pointers = tile_pointers(y, rows, m, inner)
        tl.store(pointers, result.to(pointers.dtype.element_ty), mask=valid)


@triton.jit
def _affine_map(
    y, y_stride_block, y_stride_outer, y_stride_row, y_stride_inner,
    matrix, matrix_stride_block, matrix_stride_row, matrix_stride_column,
    x, x_stride_block, x_stride_outer, x_stride_row, x_stride_inner, centre,
    matrix2, matrix2_stride_block, matrix2_stride_row, matrix2_stride_column,
    x2, x2_stride_block, x2_stride_outer, x2_stride_row, x2_stride_inner, centre2,
    row_scale, row_bias, input_weight, weight, bias, channels, positions, inner, samples, d, part_size,
    HAS_SECOND_TERM: tl.constexpr, HEIGHT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    second_term = None
    if HAS_SECOND_TERM:
        second_term = (
            (matrix2 + block * matrix2_stride_block, matrix2_stride_row, matrix2_stride_column),
            (x2 + block * x2_stride_block, x2_stride_outer, x2_stride_row, x2_stride_inner),
            centre2 + block * d,
        )
    map_samples(
        (y + block * y_stride_block, y_stride_outer, y_stride_row, y_stride_inner),
        (
            (matrix + block * matrix_stride_block, matrix_stride_row, matrix_stride_column),
            (x + block * x_stride_block, x_stride_outer, x_stride_row, x_stride_inner),
            centre + block * d,
        ),
        second_term,
        None if row_scale is None else row_scale + block * d,
        None if row_bias is None else row_bias + block * d,
        input_weight,
        weight,
        bias,
        channels,
        positions,
        inner,
        d,
        begin=part * part_size,
        end=tl.minimum(samples, (part + 1) * part_size),
        first_row=tl.program_id(2) * ROWS,
        HEIGHT=HEIGHT,
        ROWS=ROWS,
        WIDTH=WIDTH,
        PRECISION=PRECISION,
        CHANNELS="any",
    )
