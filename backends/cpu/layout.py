"""How arrays lie in memory: as the blocks that a spec cuts them into, without copies and views."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from polywhiten.blocks import Blocks, SampleGroups
from polywhiten.cpu.device.panels import Layout
from polywhiten.cpu.geometry import is_interleaved
from polywhiten.cpu.library import Strided


def split(blocks: Blocks, array: Strided) -> Strided | None:
    """Return the array as (p, q, d, l), see `polywhiten.blocks`; None if that would take a copy."""
    shape, axis = blocks.split(array.shape), blocks.axis
    dims = list(zip(array.shape, array.strides, strict=True))
    lead, (channels, stride), trail = dims[:axis], dims[axis], dims[axis + 1 :]
    d = shape[2]
    if isinstance(blocks, SampleGroups):
        inner = channels // d
        parts = [lead[:1], lead[1:], [(d, stride * inner)], [(inner, stride), *trail]]
    else:
        parts = [lead, [(channels // d, stride * d)], [(d, stride)], trail]
    strides: list[int] = []
    for size, part in zip(reversed(shape), reversed(parts), strict=True):
        merged = _merged_stride(part)
        if merged is None:
            return None
        if size == 1:  # a stride that no element is at, as it is in a contiguous array
            merged = strides[-1] * shape[4 - len(strides)] if strides else 1
        strides.append(merged)
    return Strided(shape, strides[::-1])


def _merged_stride(dims: Sequence[tuple[int, int]]) -> int | None:
    """Return the stride of several dimensions, given by size and stride, as one; None if they aren't one."""
    dims = [(size, stride) for size, stride in dims if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(dims)):
        return None
    return dims[-1][1] if dims else 1


def layout_of(array: Strided, block_axis: int) -> Layout:
    """Return the layout of the blocks of a (p, q, d, l) array."""
    shape, strides = array.shape, list(array.strides)
    if shape[2] == 1:
        strides[2] = shape[3]  # no element is at this stride, but it decides in which order samples are counted
    if shape[3] == 1 and block_axis == 1:  # rows
        return Layout(shape[1], 1, shape[2], shape[0], strides[1], 0, strides[2], strides[0])
    axes = block_axis, 1 - block_axis, 2, 3
    return Layout(*(shape[axis] for axis in axes), *(strides[axis] for axis in axes))


def sample_order(layout: Layout, block_axis: int) -> tuple[bool, bool]:
    """Return whether panels are rows, and whether they are interleaved: together, how their samples are counted."""
    return is_read_as_rows(layout, block_axis), is_interleaved(layout)


def is_read_as_rows(layout: Layout, block_axis: int) -> bool:
    """Return whether panels are read as (samples, d), since variables are adjacent and samples are not."""
    return block_axis == 1 and layout.d_stride == 1 and layout.inner_stride != 1
