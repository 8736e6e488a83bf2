"""How the joined kernels read arrays as they lie in memory: rows for the variables, and samples on two axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from polywhiten.torch.triton.tiles import Strides


class Layout(NamedTuple):
    """How several arrays of one shape are read.

    Attributes
    ----------
    inner : int
        The size of the inner one of the samples' two axes.
    samples : int
        The number of samples of a block.
    strides : tuple of Strides
        Those of each array.
    channels, positions : int
        If a row has several channels, as in group whitening: sample m belongs to channel `(m % inner) // positions` of
        the row's `channels`.
    """

    inner: int
    samples: int
    strides: tuple[Strides, ...]
    channels: int = 1
    positions: int = 1


class ChannelStrides(NamedTuple):
    """Strides of an array whose axes before the channels are read as one axis, and those after them as another."""

    before: int
    channel: int
    after: int


def channel_strides(shape: Sequence[int], stride: Sequence[int], axis: int) -> ChannelStrides | None:
    """Return None if the axes before or after the channels can't be read as one."""
    before, after = _common_stride(shape[:axis], stride[:axis]), _common_stride(shape[axis + 1 :], stride[axis + 1 :])
    return None if before is None or after is None else ChannelStrides(before, stride[axis], after)


def channel_layout(before: int, after: int, group_size: int, arrays: Sequence[ChannelStrides]) -> Layout:
    """Return the layout of groups of channels as blocks; there are `before` and `after` samples on the axes around."""
    has_one_axis = after == 1 or before == 1 or all(array.before == after * array.after for array in arrays)
    strides = []
    for array in arrays:
        outer, inner = array.before, array.after
        if has_one_axis:
            outer, inner = outer if after == 1 else inner, 0
        strides.append(Strides(group_size * array.channel, outer, array.channel, inner))
    return Layout(1 if has_one_axis else after, before * after, tuple(strides))


class SampleStrides(NamedTuple):
    """Strides of samples whose positions are read as one axis."""

    sample: int
    channel: int
    position: int


def sample_strides(shape: Sequence[int], stride: Sequence[int], axis: int) -> SampleStrides | None:
    """Return None if the positions can't be read as one axis."""
    sizes, strides = (*shape[1:axis], *shape[axis + 1 :]), (*stride[1:axis], *stride[axis + 1 :])
    position = _common_stride(sizes, strides)
    return None if position is None else SampleStrides(stride[0], stride[axis], position)


def sample_layout(channels: int, positions: int, arrays: Sequence[SampleStrides]) -> Layout:
    """Return the layout of samples as blocks, whose rows are groups of `channels` channels at so many positions."""
    has_one_axis = all(array.channel == positions * array.position for array in arrays)
    if has_one_axis:  # nothing lies on the outer one
        strides = tuple(Strides(sample, 0, channels * channel, position) for sample, channel, position in arrays)
        return Layout(channels * positions, channels * positions, strides, channels, positions)
    strides = tuple(Strides(sample, position, channels * channel, channel) for sample, channel, position in arrays)
    return Layout(channels, channels * positions, strides, channels, 1)


def _common_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride of several axes that are read as one; None if they can't be."""
    common, reach = 0, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if reach is None:
            common = stride
        elif stride != reach:
            return None
        reach = size * stride
    return common
