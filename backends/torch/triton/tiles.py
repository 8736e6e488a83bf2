"""How an array (p, q, d, l) is cut into tiles, and which arrays the kernels can read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polywhiten.torch._internals import assume_constant_result

MAX_VARIABLES = 128  # of a block; the products of larger ones are large enough for PyTorch's own operations
TARGET_PROGRAMS = 384  # enough programs to fill a large GPU
MAX_PART_SAMPLES = 4096  # the rounding error of tensor cores' sums grows with the number of summands
_MAX_SPAN = 2**31  # elements from the first to the last: offsets have 32 bits, which divide faster than 64
_TILE_ELEMENTS = 2048  # larger tiles leave too few registers for products in float32
_MIN_TILES_PER_PART = 8  # fewer would not pay for the matrix that a program loads or stores
_MAX_PARTS = 2**16 - 1  # CUDA's limit on the second axis of a grid


class Strides(NamedTuple):
    """Strides of an array (p, q, d, l) in elements: between blocks, and along the axes of a block."""

    block: int
    outer: int
    row: int
    inner: int

    @classmethod
    def of(cls, x: Tensor, block_axis: int) -> Strides:
        p, q, d, l = x.stride()
        return cls(p, q, d, l) if block_axis == 0 else cls(q, p, d, l)

    def named(self, array: str) -> dict[str, int]:
        """Return them by the names of a kernel's arguments."""
        return {
            f"{array}_stride_block": self.block,
            f"{array}_stride_outer": self.outer,
            f"{array}_stride_row": self.row,
            f"{array}_stride_inner": self.inner,
        }


class Tiles(NamedTuple):
    """The grid of a launch and its tiles: a program reads `part_size` samples of a block, one tile after the other."""

    num_blocks: int
    num_parts: int
    part_size: int
    height: int
    width: int
    num_warps: int

    @classmethod
    def of(cls, num_blocks: int, d: int, samples: int, max_parts: int | None = None, width: int | None = None) -> Tiles:
        """Cut so many samples of a block into at most `max_parts` parts, but for a limit on their size."""
        height, width = tile_height(d), width or tile_width(d)
        max_parts = max_parts or ceil_div(TARGET_PROGRAMS, num_blocks)
        num_parts = min(max_parts, ceil_div(samples, _MIN_TILES_PER_PART * tile_width(d)))
        num_parts = min(max(num_parts, ceil_div(samples, MAX_PART_SAMPLES)), _MAX_PARTS)
        part_size = ceil_div(ceil_div(samples, num_parts), width) * width
        num_parts = ceil_div(samples, part_size)
        return cls(num_blocks, num_parts, part_size, height, width, num_warps(d))


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up; `triton.cdiv` takes as long as a small tensor operation."""
    return (a + b - 1) // b


def tile_height(d: int) -> int:
    """Return the power of 2 that holds d variables; tensor cores need at least 16 rows."""
    return max(16, 1 << (d - 1).bit_length())


def tile_width(d: int) -> int:
    """Return the number of samples in a tile of d variables."""
    return _TILE_ELEMENTS // tile_height(d)


def num_warps(d: int) -> int:
    """Return the number of warps of a program for d variables."""
    return 8 if tile_height(d) > 64 else 4


def fits_32_bits(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the number of elements of an array, and the offset of each, fit into 32 bits."""
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return max(span, math.prod(shape)) < _MAX_SPAN


def have_size(tensors: Sequence[Tensor | None], size: int) -> bool:
    """Return whether every tensor that isn't None has `size` elements; kernels read beyond the end of smaller ones."""
    return all(tensor is None or tensor.numel() == size for tensor in tensors)


def precision(dtype: torch.dtype) -> str:
    """Return how tensor cores multiply arrays of `dtype`: "tf32", or "tf32x3" for the precision of float32.

    TF32 has as many digits as half precision. Three products in TF32 replace one in float32, unless users have allowed
    TF32.
    """
    return "tf32" if dtype != torch.float32 or _users_allow_tf32() else "tf32x3"


@assume_constant_result  # PyTorch recompiles when users change the setting
def _users_allow_tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9; once it is set, the older setting must not be read
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"
