"""How group whitening's samples are shared among programs.

One program whitens a small sample. A larger one is cut into parts, of some channels of every group at some positions.
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from polywhiten.torch.triton.tiles import MAX_PART_SAMPLES, TARGET_PROGRAMS, ceil_div, tile_width

MAX_GROUPS = 64  # more leave no registers for weight and bias
MAX_SAMPLE_ELEMENTS = 2**16  # of a small sample: those of all running programs stay in the device's cache


def is_small_sample(d: int, samples: int) -> bool:
    """Return whether one program whitens a block of d variables and so many samples, which it reads twice."""
    return d * samples <= MAX_SAMPLE_ELEMENTS and samples <= MAX_PART_SAMPLES


class GroupStrides(NamedTuple):
    """Strides of samples as (N, groups, channels of a group, positions)."""

    block: int
    row: int
    channel: int
    position: int

    def named(self, array: str) -> dict[str, int]:
        """Return them by the names of a kernel's arguments."""
        return {
            f"{array}_stride_block": self.block,
            f"{array}_stride_row": self.row,
            f"{array}_stride_channel": self.channel,
            f"{array}_stride_position": self.position,
        }


class SampleParts(NamedTuple):
    """The sizes of tiles and parts, in channels of every group and in positions, and the number of parts.

    Each part is read tile by tile.
    """

    tile_channels: int
    tile_positions: int
    part_channels: int
    part_positions: int
    num_channel_parts: int
    num_position_parts: int

    @property
    def num_parts(self) -> int:
        """The number of parts of a sample."""
        return self.num_channel_parts * self.num_position_parts

    @classmethod
    def of(
        cls,
        num_blocks: int,
        d: int,
        channels: int,
        positions: int,
        strides: GroupStrides,
        max_parts: int | None = None,
        width: int | None = None,
    ) -> SampleParts:
        """Cut samples of d groups with `channels` channels each into at most `max_parts`, but for a limit on size."""
        max_parts = max_parts or ceil_div(TARGET_PROGRAMS, num_blocks)
        are_adjacent = positions == 1 or strides.channel < strides.position
        if width is None or are_adjacent:  # more would be kept in registers than there are
            width = (width or tile_width(d)) // 2
        tile_channels = min(triton.next_power_of_2(channels), width) if are_adjacent else 1
        tile_positions = width // tile_channels
        num_parts = max(max_parts, ceil_div(channels * positions, MAX_PART_SAMPLES))
        part_channels = _part_size(channels, tile_channels, num_parts)
        num_channel_parts = ceil_div(channels, part_channels)
        part_positions = _part_size(positions, tile_positions, ceil_div(num_parts, num_channel_parts))
        num_position_parts = ceil_div(positions, part_positions)
        return cls(tile_channels, tile_positions, part_channels, part_positions, num_channel_parts, num_position_parts)


def _part_size(size: int, tile_size: int, num_parts: int) -> int:
    """Return the size of about `num_parts` equal parts, as a multiple of the tile's size."""
    return ceil_div(ceil_div(size, tile_size), num_parts) * tile_size
