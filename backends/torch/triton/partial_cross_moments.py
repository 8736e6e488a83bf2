"""The first pass of backward: for every part of the samples, the sums that make s = dY 1 and K = dY (X - mean)'."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import load_tile, load_vector, narrow, narrow_strides, store_matrix
from polywhiten.torch.triton.partial_moments import allocate_partial_sums
from polywhiten.torch.triton.tf32 import multiply_add
from polywhiten.torch.triton.tiles import Strides, Tiles, precision


def partial_cross_moments(dy: Tensor, x: Tensor, mean: Tensor, block_axis: int) -> tuple[Tensor, Tensor]:
    """Return s (blocks, parts, d) and K (blocks, parts, d, d) of the parts of dy and x (p, q, d, l)."""
    d, inner = x.shape[2:]
    samples = x.shape[1 - block_axis] * inner
    tiles = Tiles.of(x.shape[block_axis], d, samples)
    sums, products = allocate_partial_sums(x, tiles, d)
    _partial_cross_moments[(tiles.num_blocks, tiles.num_parts)](
        dy,
        *Strides.of(dy, block_axis),
        x,
        *Strides.of(x, block_axis),
        mean=mean.contiguous(),
        sums=sums,
        products=products,
        inner=inner,
        samples=samples,
        d=d,
        part_size=tiles.part_size,
        HEIGHT=tiles.height,
        WIDTH=tiles.width,
        PRECISION=precision(x.dtype),
        num_warps=tiles.num_warps,
    )
    return sums, products


@triton.jit
def sum_cross_moments(
    dy, x, mean, inner, d, begin, end, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr
):
    # Return the sums of dy and of dy (x - mean)' over the samples of a block from `begin` to `end`.
    dy, x = narrow_strides(dy), narrow_strides(x)
    inner, d, begin, end = narrow(inner), narrow(d), narrow(begin), narrow(end)
    rows = tl.arange(0, HEIGHT)
    centre = load_vector(mean, rows, d)
    total = tl.zeros((HEIGHT,), tl.float32)
    moment = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for start in range(begin, end, WIDTH):
        m = start + tl.arange(0, WIDTH)
        valid = (rows < d)[:, None] & (m < end)[None, :]
        centred = load_tile(x, rows, m, inner, valid) - centre[:, None]  # not 0 outside, but dy is
        gradient = load_tile(dy, rows, m, inner, valid)
        total += tl.sum(gradient, axis=1)
        moment = multiply_add(gradient, tl.trans(centred), moment, PRECISION)
    return total, moment


@triton.jit
def _partial_cross_moments(
    dy, dy_stride_block, dy_stride_outer, dy_stride_row, dy_stride_inner,
    x, x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    mean, sums, products, inner, samples, d, part_size,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = block * tl.num_programs(1) + part
    rows = tl.arange(0, HEIGHT)
    total, moment = sum_cross_moments(
        (dy + block * dy_stride_block, dy_stride_outer, dy_stride_row, dy_stride_inner),
        (x + block * x_stride_block, x_stride_outer, x_stride_row, x_stride_inner),
        mean + block * d,
        inner,
        d,
        begin=part * part_size,
        end=tl.minimum(samples, (part + 1) * part_size),
        HEIGHT=HEIGHT,
        WIDTH=WIDTH,
        PRECISION=PRECISION,
    )
    tl.store(sums + slot * d + rows, total, mask=rows < d)
    store_matrix(products + slot * d * d, moment, rows, d)
