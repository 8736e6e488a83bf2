"""How the fused kernels cut an array (p, q, d, l) into tiles of all d variables and some of the samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_GROUP = 128  # variables of a block; the products of more are large enough for the default kernels
_LARGEST_SPAN = 2**31  # elements from the first to the last: offsets are 32 bits wide, which divide faster than 64
_TILE = 2048  # elements of a tile: larger ones don't leave enough registers for products in float32
PROGRAMS = 384  # that fill a large GPU
_FEWEST_TILES = 8  # a program reads for each matrix that it loads or leaves behind
LONGEST = 4096  # samples that are added up in one place: tensor cores cut off digits of sums too
_MOST_PARTS = 2**16 - 1  # CUDA's limit


class Strides(NamedTuple):
    """Of an array (p, q, d, l), in elements: from block to block, and along the axes of a block."""

    block: int
    outer: int
    row: int
    inner: int

    @classmethod
    def of(cls, x: Tensor, block_axis: int) -> Strides:
        p, q, d, l = x.stride()
        return cls(p, q, d, l) if block_axis == 0 else cls(q, p, d, l)


class Tiles(NamedTuple):
    """Sizes of a launch: blocks, programs for each, and the samples that a program reads, tile by tile."""

    blocks: int
    parts: int
    chunk: int
    height: int
    width: int
    warps: int

    @classmethod
    def of(cls, blocks: int, d: int, samples: int) -> Tiles:
        height, width = tile_height(d), tile_width(d)
        parts = min(triton.cdiv(PROGRAMS, blocks), triton.cdiv(samples, _FEWEST_TILES * width))
        parts = min(max(parts, triton.cdiv(samples, LONGEST)), _MOST_PARTS)
        chunk = triton.cdiv(triton.cdiv(samples, parts), width) * width
        return cls(blocks, triton.cdiv(samples, chunk), chunk, height, width, warps=8 if height > 64 else 4)


def tile_height(d: int) -> int:
    """The power of 2 that holds d variables; products of tiles need 16."""
    power: int = triton.next_power_of_2(d)
    return max(16, power)


def tile_width(d: int) -> int:
    """Samples of a tile of d variables."""
    return _TILE // tile_height(d)


def is_addressable(x: Tensor) -> bool:
    """Whether 32 bits count its elements and reach every one."""
    return is_reached(x.shape, x.stride())


def is_reached(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether 32 bits count the elements of such an array and reach every one."""
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return max(span, math.prod(shape)) < _LARGEST_SPAN


def have_values(tensors: Sequence[Tensor | None], number: int) -> bool:
    """Whether all that are there have so many values: nothing stops a kernel where they end."""
    return all(each is None or each.numel() == number for each in tensors)


def precision(dtype: torch.dtype) -> str:
    """How products of arrays of `dtype` are computed on tensor cores.

    TF32 has the digits of half precision. Three products in it are one of float32, unless users have allowed less.
    """
    return "tf32" if dtype != torch.float32 or _users_allow_tf32() else "tf32x3"


@torch.compiler.assume_constant_result  # PyTorch compiles anew when users change it
def _users_allow_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9, and after that has been set nothing else may be asked
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


@triton.jit
def narrow(number):
    # torch.compile hands over 64 bits where shapes are dynamic; offsets in 32 bits take half of the registers
    return tl.cast(number, tl.int32)


@triton.jit
def split(x):
    # float32 as two TF32, which keep 10 of its 23 digits each
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def rounded(x):
    # to TF32: tensor cores cut off digits, which would make all variances too small. NaN stays NaN.
    near = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    # a b + accumulator; PRECISION "tf32x3" keeps the digits of float32
    if PRECISION == "tf32x3":
        a_high, a_low = split(a)
        b_high, b_low = split(b)
        accumulator = tl.dot(a_low, b_high, accumulator, input_precision="tf32")
        accumulator = tl.dot(a_high, b_low, accumulator, input_precision="tf32")
        a, b = a_high, b_high
    else:
        a, b = rounded(a), rounded(b)
    return tl.dot(a, b, accumulator, input_precision="tf32")


@triton.jit
def load_matrix(matrix, rows, variables, d, stride_row, stride_column):
    inside = (rows < d)[:, None] & (variables < d)[None, :]
    return tl.load(matrix + rows[:, None] * stride_row + variables[None, :] * stride_column, mask=inside, other=0.0)


@triton.jit
def store_matrix(matrix, values, rows, d):
    inside = (rows < d)[:, None] & (rows < d)[None, :]
    tl.store(matrix + rows[:, None] * d + rows[None, :], values, mask=inside)


@triton.jit
def columns(m, inner, stride_outer, stride_inner):
    # offsets of the samples m of a block
    return (m // inner) * stride_outer + (m % inner) * stride_inner
