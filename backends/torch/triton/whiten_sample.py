"""All of group whitening's forward for small samples: one program whitens a sample, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.statistics import Statistics
from polywhiten.torch.triton.addressing import load_tile, narrow, narrow_strides, store_matrix, tile_pointers
from polywhiten.torch.triton.affine_map import ChannelAffine, load_channels
from polywhiten.torch.triton.newton_in_memory import (
    NEWTON_MATRICES,
    allocate_workspace,
    newton,
    newton_constants,
)
from polywhiten.torch.triton.partial_moments import SHIFT_SAMPLES, sum_moments
from polywhiten.torch.triton.tf32 import multiply_add
from polywhiten.torch.triton.tiles import Strides, precision, tile_width


def whiten_sample(x: Tensor, channel_affine: ChannelAffine, eps: float, iterations: int) -> tuple[Tensor, Statistics]:
    """Return y and the statistics of samples x (N, q, d, l)."""
    num_blocks, q, d, inner = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = x.new_empty((num_blocks, d), dtype=torch.float32)
    cov, whitener = mean.new_empty((num_blocks, d, d)), mean.new_empty((num_blocks, d, d))
    workspace = allocate_workspace(mean, num_blocks, d, NEWTON_MATRICES)
    arguments = channel_affine.arguments(inner)
    _whiten_sample[(workspace.shape[0],)](
        y,
        *Strides.of(y, 0),
        x,
        *Strides.of(x, 0),
        mean=mean,
        cov=cov,
        whitener=whitener,
        workspace=workspace,
        weight=arguments["weight"],
        bias=arguments["bias"],
        channels=arguments["channels"],
        positions=arguments["positions"],
        inner=inner,
        samples=q * inner,
        d=d,
        count=num_blocks,
        eps=eps,
        iterations=iterations,
        MATRICES=NEWTON_MATRICES,
        WIDTH=tile_width(d),
        SHIFT_SAMPLES=SHIFT_SAMPLES,
        X_PRECISION=precision(x.dtype),
        **newton_constants(d),
    )
    return y, Statistics(mean, cov, whitener)


@triton.jit
def _whiten_tiles(
    y, x, w, centre, weight, bias, channels, positions, inner, samples, d,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Store weight w (x - centre) + bias of a sample, with w and the centre in registers.
    rows = tl.arange(0, HEIGHT)
    for start in range(0, samples, WIDTH):
        m = start + tl.arange(0, WIDTH)
        valid = (rows < d)[:, None] & (m < samples)[None, :]
        centred = load_tile(x, rows, m, inner, valid) - centre[:, None]
        result = multiply_add(w, centred, tl.zeros((HEIGHT, WIDTH), tl.float32), PRECISION)
        channel = (m % inner) // positions
        if weight is not None:
            result *= load_channels(weight, rows, channel, channels, valid)
        if bias is not None:
            result += load_channels(bias, rows, channel, channels, valid)
        pointers = tile_pointers(y, rows, m, inner)
        tl.store(pointers, result.to(pointers.dtype.element_ty), mask=valid)


@triton.jit
def _whiten_sample(
    y, y_stride_block, y_stride_outer, y_stride_row, y_stride_inner,
    x, x_stride_block, x_stride_outer, x_stride_row, x_stride_inner,
    mean, cov, whitener, workspace, weight, bias, channels, positions, inner, samples, d, count, eps, iterations,
    MATRICES: tl.constexpr, WIDTH: tl.constexpr, SHIFT_SAMPLES: tl.constexpr, X_PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr, HEIGHT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    channels, positions, inner = narrow(channels), narrow(positions), narrow(inner)
    samples, d = narrow(samples), narrow(d)
    rows = tl.arange(0, HEIGHT)
    workspace += tl.program_id(0) * MATRICES * HEIGHT * HEIGHT
    for sample in range(tl.program_id(0), count, tl.num_programs(0)):
        block = tl.cast(sample, tl.int64)
        block_x = narrow_strides((x + block * x_stride_block, x_stride_outer, x_stride_row, x_stride_inner))
        block_y = narrow_strides((y + block * y_stride_block, y_stride_outer, y_stride_row, y_stride_inner))
        block_cov = cov + block * d * d
        shift, total, square = sum_moments(
            block_x, inner, samples, d, 0, samples, HEIGHT, WIDTH, SHIFT_SAMPLES, X_PRECISION
        )
        mean_shifted = total / samples  # the mean of x - shift
        centre = shift + mean_shifted
        tl.store(mean + block * d + rows, centre, mask=rows < d)
        store_matrix(block_cov, square / samples - mean_shifted[:, None] * mean_shifted[None, :], rows, d)
        tl.debug_barrier()
        w = newton(block_cov, d, workspace, d, eps, iterations, SMALLEST, HEIGHT, TILE, STEP, PRECISION)
        store_matrix(whitener + block * d * d, w, rows, d)
        _whiten_tiles(
            block_y, block_x, w, centre, weight, bias, channels, positions, inner, samples, d,
            HEIGHT, WIDTH, X_PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
