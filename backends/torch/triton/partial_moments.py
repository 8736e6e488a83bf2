"""The first pass over the samples: a mean and a covariance need their sums and products, one pair for every part.

Sums are taken of x minus a shift near the mean: no pass has to find the mean before, and no digits cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import load_tile, narrow, narrow_strides, store_matrix
from polywhiten.torch.triton.tf32 import round_to_tf32, split
from polywhiten.torch.triton.tiles import Strides, Tiles, precision

SHIFT_SAMPLES = 16  # their mean is near enough to that of the block


class PartialMoments(NamedTuple):
    """The shift (blocks, d) of every block, and for each of its parts the sum and the products of x - shift."""

    shift: Tensor
    sums: Tensor
    products: Tensor


def partial_moments(x: Tensor, block_axis: int) -> PartialMoments:
    """Return the partial moments of x (p, q, d, l)."""
    d, inner = x.shape[2:]
    samples = x.shape[1 - block_axis] * inner
    tiles = Tiles.of(x.shape[block_axis], d, samples)
    sums, products = allocate_partial_sums(x, tiles, d)
    shift = sums.new_empty((tiles.num_blocks, d))
    _partial_moments[(tiles.num_blocks, tiles.num_parts)](
        x,
        *Strides.of(x, block_axis),
        shift=shift,
        sums=sums,
        products=products,
        inner=inner,
        samples=samples,
        d=d,
        part_size=tiles.part_size,
        HEIGHT=tiles.height,
        WIDTH=tiles.width,
        SHIFT_SAMPLES=SHIFT_SAMPLES,
        PRECISION=precision(x.dtype),
        num_warps=tiles.num_warps,
    )
    return PartialMoments(shift, sums, products)


def allocate_partial_sums(x: Tensor, tiles: Tiles, d: int) -> tuple[Tensor, Tensor]:
    """Return memory for the sums (blocks, parts, d) and the products (blocks, parts, d, d)."""
    sums = x.new_empty((tiles.num_blocks, tiles.num_parts, d), dtype=torch.float32)
    return sums, sums.new_empty((tiles.num_blocks, tiles.num_parts, d, d))


@triton.jit
def load_shift(x, rows, inner, samples, d, SHIFT_SAMPLES: tl.constexpr):
    # Return the mean of a few samples from all over the block.
    m = tl.arange(0, SHIFT_SAMPLES) * (samples // SHIFT_SAMPLES | 1)  # odd, to miss the same corner of every picture
    values = load_tile(x, rows, m, inner, (rows < d)[:, None] & (m < samples)[None, :])
    return tl.sum(values, axis=1) / tl.sum((m < samples).to(tl.float32), axis=0)


@triton.jit
def sum_moments(
    x, inner, samples, d, begin, end,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHIFT_SAMPLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Return the shift of a block, and the sum and the products of x - shift over the samples from `begin` to `end`.
    x = narrow_strides(x)
    inner, samples, d, begin, end = narrow(inner), narrow(samples), narrow(d), narrow(begin), narrow(end)
    rows = tl.arange(0, HEIGHT)
    shift = load_shift(x, rows, inner, samples, d, SHIFT_SAMPLES)
    total = tl.zeros((HEIGHT,), tl.float32)
    square = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    mixed = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for start in range(begin, end, WIDTH):
        m = start + tl.arange(0, WIDTH)
        valid = (rows < d)[:, None] & (m < end)[None, :]
        shifted = load_tile(x, rows, m, inner, valid) - shift[:, None]
        shifted = tl.where(valid, shifted, 0.0)
        total += tl.sum(shifted, axis=1)
        if PRECISION == "tf32x3":  # the products of high with low digits, and of low with high, are transposes
            shifted, low = split(shifted)
            mixed = tl.dot(shifted, tl.trans(low), mixed, input_precision="tf32")
        else:
            shifted = round_to_tf32(shifted)
        square = tl.dot(shifted, tl.trans(shifted), square, input_precision="tf32")
    return shift, total, square + mixed + tl.trans(mixed)


@triton.jit
def _partial_moments(
    x, x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    shift, sums, products, inner, samples, d, part_size,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHIFT_SAMPLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = block * tl.num_programs(1) + part
    block_shift, total, square = sum_moments(
        (x + block * x_stride_block, x_stride_outer, x_stride_row, x_stride_inner),
        inner,
        samples,
        d,
        begin=part * part_size,
        end=tl.minimum(samples, (part + 1) * part_size),
        HEIGHT=HEIGHT,
        WIDTH=WIDTH,
        SHIFT_SAMPLES=SHIFT_SAMPLES,
        PRECISION=PRECISION,
    )
    rows = tl.arange(0, HEIGHT)
    if part == 0:
        tl.store(shift + block * d + rows, block_shift, mask=rows < d)
    tl.store(sums + slot * d + rows, total, mask=rows < d)
    store_matrix(products + slot * d * d, square, rows, d)
