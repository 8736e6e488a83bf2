"""An array as blocks: the (d, M) matrices that are whitened each by itself.

An array becomes, by a reshape alone, four-dimensional: (p, q, d, l). Axis 2 holds the d variables of a block. One of
the axes 0 and 1 counts the blocks (`block_axis`); the other one and axis 3 together hold a block's M samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from polywhiten._types import Shape


@dataclass(frozen=True)
class ChannelGroups:
    """IterNorm's blocks: `group_size` adjacent channels each, over the whole batch; (batch, groups, d, space)."""

    axis: int
    group_size: int
    block_axis: ClassVar[int] = 1

    def split(self, shape: Shape) -> Shape:
        """(p, q, d, l) of an array's shape."""
        lead, channels, trail = _around(shape, self.axis)
        return math.prod(lead), channels // self.group_size, self.group_size, math.prod(trail)


@dataclass(frozen=True)
class SampleGroups:
    """Group whitening's blocks: one a sample; its variables are groups of channels; (batch, space, groups, rest)."""

    axis: int
    num_groups: int
    block_axis: ClassVar[int] = 0

    def split(self, shape: Shape) -> Shape:
        """(p, q, d, l) of an array's shape."""
        (batch, *lead), channels, trail = _around(shape, self.axis)
        return batch, math.prod(lead), self.num_groups, channels // self.num_groups * math.prod(trail)


Blocks = ChannelGroups | SampleGroups


def channel_shape(ndim: int, axis: int) -> tuple[int, ...]:
    """Shape that lays a (C,) array along `axis` of an array of `ndim` dimensions."""
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def divisors(number: int) -> list[int]:
    """In how many equal groups so many channels can be cut, the smallest number first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _around(shape: Shape, axis: int) -> tuple[Shape, int, Shape]:
    return shape[:axis], shape[axis], shape[axis + 1 :]
