"""Cut arrays into blocks, the (d, M) matrices that are whitened separately, and join results.

A block has d variables and M samples. A reshape makes every array four-dimensional, (p, q, d, l): axis 2 holds the d
variables of a block, one of the axes 0 and 1 counts the blocks (`block_axis`), and the other one and axis 3 together
hold a block's M samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from polywhiten._types import Array, Namespace, Shape


@dataclass(frozen=True)
class ChannelGroups:
    """The blocks of IterNorm: `group_size` adjacent channels over the whole batch, (batch, groups, d, space)."""

    axis: int
    group_size: int
    block_axis: ClassVar[int] = 1

    def split(self, shape: Shape) -> Shape:
        """Return the shape (p, q, d, l) for an array whose groups all have `group_size` channels."""
        lead, channels, trail = _around(shape, self.axis)
        return math.prod(lead), channels // self.group_size, self.group_size, math.prod(trail)


@dataclass(frozen=True)
class SampleGroups:
    """The blocks of group whitening: samples, whose variables are groups of channels, (batch, space, groups, rest)."""

    axis: int
    num_groups: int
    block_axis: ClassVar[int] = 0

    def split(self, shape: Shape) -> Shape:
        """Return the shape (p, q, d, l) for an array of this shape."""
        (batch, *lead), channels, trail = _around(shape, self.axis)
        return batch, math.prod(lead), self.num_groups, channels // self.num_groups * math.prod(trail)


Blocks = ChannelGroups | SampleGroups


def channel_parts(channels: int, group_size: int) -> list[tuple[slice, int]]:
    """Return slices of channels that equal groups fill, each with its group size: two if the last group is smaller."""
    full = channels - channels % group_size
    parts = [(slice(0, full), group_size), (slice(full, channels), channels - full)]
    return [(part, size) for part, size in parts if size and part.start < part.stop]


def take_channels(x: Array | None, part: slice, axis: int = 0) -> Array | None:
    """Return the channels `part` of x; x itself if these are all."""
    if x is None or part == slice(0, x.shape[axis]):
        return x
    return x[(slice(None),) * axis + (part, ...)]


def join_channels(xp: Namespace, parts: Sequence[Array], axis: int = 0) -> Array:
    """Concatenate parts along the channels; a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else xp.concat(list(parts), axis=axis)


def take_groups(matrices: Array, part: slice, size: int) -> Array:
    """Return the matrices (groups, size, size) of the channels `part` out of (groups, d, d)."""
    d = matrices.shape[-1]
    if size == d and part.start == 0 and part.stop == d * matrices.shape[0]:
        return matrices
    return matrices[part.start // d : (part.stop + d - 1) // d, :size, :size]  # ONNX doesn't round -(-a // d) up


def channel_shape(ndim: int, axis: int) -> tuple[int, ...]:
    """Return the shape that lays a (C,) array along `axis` of an array of `ndim` dimensions."""
    return tuple(-1 if i == axis else 1 for i in range(ndim))


def divisors(number: int) -> list[int]:
    """Return the numbers of equal groups that so many channels can be cut into, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _around(shape: Shape, axis: int) -> tuple[Shape, int, Shape]:
    return shape[:axis], shape[axis], shape[axis + 1 :]
