"""Mean and covariance of every block, from the partial moments of its parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import narrow
from polywhiten.torch.triton.partial_moments import PartialMoments
from polywhiten.torch.triton.tiles import tile_height

PARTS_AT_ONCE = 32  # parts that a program reads together


def combine_moments(partial: PartialMoments, samples: int) -> tuple[Tensor, Tensor]:
    """Return the mean (blocks, d) and the covariance (blocks, d, d), which is divided by `samples`."""
    num_blocks, num_parts, d = partial.sums.shape
    mean, cov = torch.empty_like(partial.shift), partial.sums.new_empty((num_blocks, d, d))
    _combine_moments[(num_blocks, d)](
        partial.shift,
        partial.sums,
        partial.products,
        mean=mean,
        cov=cov,
        num_parts=num_parts,
        samples=samples,
        d=d,
        HEIGHT=tile_height(d),
        PARTS_AT_ONCE=PARTS_AT_ONCE,
    )
    return mean, cov


@triton.jit
def _combine_moments(
    shift, sums, products, mean, cov, num_parts, samples, d, HEIGHT: tl.constexpr, PARTS_AT_ONCE: tl.constexpr
):
    # A program combines one row of the products.
    num_parts, d, samples = narrow(num_parts), narrow(d), narrow(samples)
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, HEIGHT)
    sums += block * num_parts * d
    product = tl.zeros((HEIGHT,), tl.float32)
    total = tl.zeros((HEIGHT,), tl.float32)
    for start in range(0, num_parts, PARTS_AT_ONCE):
        part = (start + tl.arange(0, PARTS_AT_ONCE))[:, None]
        valid = (part < num_parts) & (columns < d)[None, :]
        offsets = ((block * num_parts + part) * d + row) * d + columns[None, :]
        product += tl.sum(tl.load(products + offsets, mask=valid, other=0.0), axis=0)
        total += tl.sum(tl.load(sums + part * d + columns[None, :], mask=valid, other=0.0), axis=0)
    mean_shifted = total / samples  # the mean of x - shift
    row_mean_shifted = tl.sum(tl.where(columns == row, mean_shifted, 0.0), axis=0)
    index = block * d + row
    tl.store(cov + index * d + columns, product / samples - row_mean_shifted * mean_shifted, mask=columns < d)
    tl.store(mean + index, tl.load(shift + index) + row_mean_shifted)
