"""s and K of every block, from those of its parts, and what else backward needs that follows from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.addressing import narrow
from polywhiten.torch.triton.combine_moments import PARTS_AT_ONCE
from polywhiten.torch.triton.tiles import tile_height


class CrossMoments(NamedTuple):
    """Cross moments of every block; the last two are None without a row scale.

    Attributes
    ----------
    s : Tensor, shape (blocks, d)
        dY 1.
    mean_s : Tensor, shape (blocks, d)
        s divided by the number of samples.
    k : Tensor, shape (blocks, d, d)
        diag(row_scale) dY (X - mean)'.
    scaled_whitener : Tensor, shape (blocks, d, d), or None
        diag(row_scale) W.
    row_scale_gradient : Tensor, shape (blocks, d), or None
        The gradient of the row scale.
    """

    s: Tensor
    mean_s: Tensor
    k: Tensor
    scaled_whitener: Tensor | None
    row_scale_gradient: Tensor | None


def combine_cross_moments(
    sums: Tensor, products: Tensor, samples: int, row_scale: Tensor | None = None, whitener: Tensor | None = None
) -> CrossMoments:
    """Return the cross moments; a row scale (blocks, d), which multiplied the rows of W x, needs the whitener too."""
    num_blocks, num_parts, d = sums.shape
    s, mean_s, k = (sums.new_empty(shape) for shape in ((num_blocks, d), (num_blocks, d), (num_blocks, d, d)))
    scaled_whitener, gradient = (None, None) if row_scale is None else (torch.empty_like(k), torch.empty_like(s))
    _combine_cross_moments[(num_blocks, d)](
        sums,
        products,
        row_scale=row_scale,
        whitener=whitener,
        s=s,
        mean_s=mean_s,
        k=k,
        scaled_whitener=scaled_whitener,
        row_scale_gradient=gradient,
        num_parts=num_parts,
        samples=samples,
        d=d,
        HEIGHT=tile_height(d),
        PARTS_AT_ONCE=PARTS_AT_ONCE,
    )
    return CrossMoments(s, mean_s, k, scaled_whitener, gradient)


@triton.jit
def _combine_cross_moments(
    sums, products, row_scale, whitener, s, mean_s, k, scaled_whitener, row_scale_gradient, num_parts, samples, d,
    HEIGHT: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    # A program combines one row of the products.
    num_parts, d, samples = narrow(num_parts), narrow(d), narrow(samples)
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, HEIGHT)
    sums += block * num_parts * d + row
    product = tl.zeros((HEIGHT,), tl.float32)
    total = 0.0
    for start in range(0, num_parts, PARTS_AT_ONCE):
        part = start + tl.arange(0, PARTS_AT_ONCE)
        valid = (part < num_parts)[:, None] & (columns < d)[None, :]
        offsets = ((block * num_parts + part) * d + row)[:, None] * d + columns[None, :]
        product += tl.sum(tl.load(products + offsets, mask=valid, other=0.0), axis=0)
        total += tl.sum(tl.load(sums + part * d, mask=part < num_parts, other=0.0), axis=0)
    index = block * d + row
    if row_scale is not None:
        w = tl.load(whitener + index * d + columns, mask=columns < d, other=0.0)
        tl.store(row_scale_gradient + index, tl.sum(product * w, axis=0))
        scale = tl.load(row_scale + index).to(tl.float32)
        tl.store(scaled_whitener + index * d + columns, scale * w, mask=columns < d)
        product *= scale
    tl.store(k + index * d + columns, product, mask=columns < d)
    tl.store(s + index, total)
    tl.store(mean_s + index, total / samples)
