"""An array as blocks: the (d, M) matrices that are whitened each by itself.

An array becomes, by a reshape alone, four-dimensional: (p, q, d, l). Axis 2 holds the d variables of a block. One of
the axes 0 and 1 counts the blocks (`block_axis`); the other one and axis 3 together hold a block's M samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from polywhiten._types import Array, Namespace


@dataclass(frozen=True)
class ChannelGroups:
    """IterNorm's blocks: `group_size` adjacent channels each, over the whole batch; (batch, groups, d, space)."""

    axis: int
    group_size: int
    block_axis: ClassVar[int] = 1

    def split(self, xp: Namespace, x: Array) -> Array:
        lead, channels, trail = _around(x.shape, self.axis)
        return xp.reshape(x, (math.prod(lead), channels // self.group_size, self.group_size, math.prod(trail)))


@dataclass(frozen=True)
class SampleGroups:
    """Group whitening's blocks: one a sample; its variables are groups of channels; (batch, space, groups, rest)."""

    axis: int
    num_groups: int
    block_axis: ClassVar[int] = 0

    def split(self, xp: Namespace, x: Array) -> Array:
        (batch, *lead), channels, trail = _around(x.shape, self.axis)
        rest = channels // self.num_groups * math.prod(trail)
        return xp.reshape(x, (batch, math.prod(lead), self.num_groups, rest))


Blocks = ChannelGroups | SampleGroups


def sample_count(x: Array, block_axis: int) -> int:
    """M of the (p, q, d, l) array's blocks."""
    count: int = x.shape[1 - block_axis] * x.shape[3]
    return count


def channel_shape(ndim: int, axis: int) -> tuple[int, ...]:
    """Shape that lays a (C,) array along `axis` of an array of `ndim` dimensions."""
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def _around(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    return shape[:axis], shape[axis], shape[axis + 1 :]
