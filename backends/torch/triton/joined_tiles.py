"""How the joined kernels cut samples into tiles and parts, and what they are compiled for besides.

Both depend on the dtype, the memory order and the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from polywhiten.torch._internals import assume_constant_result
from polywhiten.torch.triton.layouts import Layout
from polywhiten.torch.triton.sample_parts import GroupStrides, SampleParts
from polywhiten.torch.triton.support import multiplies_from_shared_memory
from polywhiten.torch.triton.tiles import Tiles, num_warps, tile_height, tile_width

# The programs for which a multiprocessor of an H100 has registers and shared memory, by their number of warps. If a
# launch had a few more, most of the device would be idle while these run.
_SUMS_AT_ONCE = {4: 2, 8: 1}
_MAPS_AT_ONCE = {4: 3, 8: 1}
_GRADIENT_MAPS_AT_ONCE = {4: 2, 8: 1}
_MULTIPROCESSORS = 128  # where there is no device
SUM_STAGES = 4  # tiles in shared memory: the one in use, and those on their way


def tiles_of_sums(
    num_blocks: int, d: int, samples: int, dtype: torch.dtype, device: torch.device, other_programs: int = 0
) -> Tiles:
    """Cut samples whose sums the last program adds up, where so many other programs of a block do something else."""
    at_once = _SUMS_AT_ONCE[num_warps(d)] * _multiprocessors(device)
    return _tiles(num_blocks, d, samples, dtype, at_once // num_blocks - other_programs)


def tiles_of_map(
    num_blocks: int, d: int, samples: int, dtype: torch.dtype, device: torch.device, of_gradient: bool = False
) -> Tiles:
    """Cut samples that are mapped, or two arrays of them for a gradient."""
    at_once = (_GRADIENT_MAPS_AT_ONCE if of_gradient else _MAPS_AT_ONCE)[num_warps(d)] * _multiprocessors(device)
    return _tiles(num_blocks, d, samples, dtype, at_once // num_blocks)


def parts_of_sums(
    num_blocks: int,
    d: int,
    channels: int,
    positions: int,
    strides: GroupStrides,
    dtype: torch.dtype,
    device: torch.device,
) -> SampleParts:
    """Cut samples of group whitening whose sums the last program adds up."""
    max_parts = max(1, _SUMS_AT_ONCE[num_warps(d)] * _multiprocessors(device) // num_blocks)
    return SampleParts.of(num_blocks, d, channels, positions, strides, max_parts, _width(d, dtype))


def _tiles(num_blocks: int, d: int, samples: int, dtype: torch.dtype, max_parts: int) -> Tiles:
    return Tiles.of(num_blocks, d, samples, max(1, max_parts), _width(d, dtype))


def _width(d: int, dtype: torch.dtype) -> int:
    return tile_width(d) * (4 // dtype.itemsize)  # tiles of all dtypes have the same number of bytes


def joined_precision(x_precision: str, d: int, dtype: torch.dtype, device: torch.device) -> str:
    """Return how tensor cores multiply x with matrices in float32, where `tiles.precision` is `x_precision`.

    Where they read tiles from shared memory, those in TF32 have to lie there in a certain order, and parts in bfloat16
    needn't. Other products are of what registers hold. Matrices keep all of their digits beside bfloat16, because what
    products with a large mean lose is large beside its deviations.
    """
    if dtype == torch.float32:
        if tile_height(d) < 64 or not multiplies_from_shared_memory(device):
            return x_precision
        return "bf16x3" if x_precision == "tf32" else "bf16x6"
    return "bf16x6" if dtype == torch.bfloat16 else "bf16x3"


def alignment(layout: Layout) -> int:
    """Return a power of 2 that divides the distances between rows, and the size of the samples' inner axis.

    Samples that are adjacent can then be loaded and stored several at a time. Triton itself sees only multiples of 16.
    """
    if any(strides.inner != 1 for strides in layout.strides):
        return 1
    return math.gcd(16, layout.inner, *(strides.row for strides in layout.strides))


def map_stages(device: torch.device) -> int:
    """Return the number of tiles that a map has in shared memory, as `SUM_STAGES`."""
    return 3 if multiplies_from_shared_memory(device) else 2


def channels_of_tiles(layout: Layout, width: int) -> str:
    """Return what is known of the channels that a row has in a tile of samples: "same", "two" or "any"."""
    if layout.inner == layout.channels and width % layout.channels == 0:
        return "same"  # in all tiles
    return "two" if layout.inner == layout.samples and layout.positions >= width else "any"


def sample_alignment(tile_channels: int, positions: int, arrays: Sequence[GroupStrides]) -> int:
    """Return a power of 2 that divides all strides but that of the adjacent channels or positions, and their number."""
    adjacent = [strides.position if tile_channels == 1 else strides.channel for strides in arrays]
    others = [strides.channel if tile_channels == 1 else strides.position for strides in arrays]
    if any(stride != 1 for stride in adjacent):
        return 1
    number = (positions,) if tile_channels == 1 else ()
    return math.gcd(16, *number, *others, *(each.row for each in arrays))


@assume_constant_result
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
