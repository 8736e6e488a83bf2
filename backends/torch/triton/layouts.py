"""How arrays of one shape lie in memory, as the joined kernels read them: blocks of rows, with samples on two axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from polywhiten.torch.triton.tiles import Strides


class Layout(NamedTuple):
    """Samples of a block, of which `inner` lie on the second axis, and each array's strides.

    The channels of the rows, for weight and bias that aren't the rows' own: sample m has channel
    `(m % inner) // positions` among a row's `channels`.
    """

    inner: int
    samples: int
    strides: tuple[Strides, ...]
    channels: int = 1
    positions: int = 1


class ChannelStrides(NamedTuple):
    """Of an array whose axes before the channels have one stride, and those after them too."""

    before: int
    channel: int
    after: int


def channel_strides(shape: Sequence[int], stride: Sequence[int], axis: int) -> ChannelStrides | None:
    """None where the axes before or after the channels have no common stride."""
    before, after = _common(shape[:axis], stride[:axis]), _common(shape[axis + 1 :], stride[axis + 1 :])
    return None if before is None or after is None else ChannelStrides(before, stride[axis], after)


def channel_layout(before: int, after: int, group_size: int, arrays: Sequence[ChannelStrides]) -> Layout:
    """Groups of channels as blocks; `before` and `after` are the sizes of the axes around them."""
    one_axis = after == 1 or before == 1 or all(array.before == after * array.after for array in arrays)
    strides = []
    for array in arrays:
        outer, inner = array.before, array.after
        if one_axis:
            outer, inner = outer if after == 1 else inner, 0
        strides.append(Strides(group_size * array.channel, outer, array.channel, inner))
    return Layout(1 if one_axis else after, before * after, tuple(strides))


class SampleStrides(NamedTuple):
    """Of samples whose positions all lie before or all after the channels."""

    sample: int
    channel: int
    position: int


def sample_strides(shape: Sequence[int], stride: Sequence[int], axis: int) -> SampleStrides | None:
    """None where the positions have no common stride."""
    sizes, strides = (*shape[1:axis], *shape[axis + 1 :]), (*stride[1:axis], *stride[axis + 1 :])
    position = _common(sizes, strides)
    return None if position is None else SampleStrides(stride[0], stride[axis], position)


def sample_layout(channels: int, positions: int, arrays: Sequence[SampleStrides]) -> Layout:
    """Samples as blocks, their rows being groups of so many channels at so many positions."""
    one_axis = all(array.channel == positions * array.position for array in arrays)
    strides = tuple(
        Strides(sample, position, channels * channel, position if one_axis else channel)
        for sample, channel, position in arrays
    )
    if one_axis:
        return Layout(channels * positions, channels * positions, strides, channels, positions)
    return Layout(channels, channels * positions, strides, channels, 1)


def _common(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of several axes as one; None where they have none in common."""
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
