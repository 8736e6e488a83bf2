"""What joined launches take beside the tensors' addresses: it follows from shapes, strides and dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polywhiten.torch.triton import joined_backward, joined_forward
from polywhiten.torch.triton.counting import Clusters
from polywhiten.torch.triton.group_whitening import ChannelParts
from polywhiten.torch.triton.layouts import (
    Layout,
    SampleStrides,
    channel_layout,
    channel_strides,
    sample_layout,
    sample_strides,
)
from polywhiten.torch.triton.moments import SPREAD
from polywhiten.torch.triton.newton import ADJOINT_SCRATCH, SCRATCH, constants
from polywhiten.torch.triton.newton_registers import ADJOINT_WAITING
from polywhiten.torch.triton.prepared import Pointer, PreparedLaunch
from polywhiten.torch.triton.tiles import LARGEST_GROUP, LONGEST, Tiles, have_values, is_reached, tile_height

LARGEST_SAMPLE = 2**16  # elements that a program reads twice: those of all programs at work stay in the device's cache
_MOST_BLOCKS = 4096  # each has memory to work in for 16 variables or more, which is many times a small block's own
_LARGEST_MATRIX = 64  # rows and columns of a matrix that are kept while samples pass, or in registers altogether

Stride = tuple[int, ...]
Types = tuple[Any, ...]  # dtypes of tensors, None for those that aren't there, and the device last


class Whitening(NamedTuple):
    """IterNorm, of groups of so many channels; or where `of_samples` group whitening, of so many groups of channels."""

    of_samples: bool
    axis: int
    groups: int
    eps: float = 0.0
    iterations: int = 0

    def reads(self, shape: tuple[int, ...], stride: Stride) -> bool:
        """Whether the kernels can read an array that so lies in memory, and have not too many blocks to work on."""
        strides = sample_strides if self.of_samples else channel_strides
        largest = _LARGEST_MATRIX if self.of_samples else LARGEST_GROUP  # that leaves registers for weight and bias
        if math.prod(shape) == 0:
            return False
        blocks = self.blocks(shape)
        return (
            is_reached(shape, stride)
            and blocks.d <= largest
            and blocks.number <= _MOST_BLOCKS
            and strides(shape, stride, self.axis) is not None
        )

    def fits(self, shape: tuple[int, ...], of_channels: Sequence[Tensor | None], matrices: Tensor | None) -> bool:
        """Whether other tensors have as many values as go with an array."""
        if not have_values(of_channels, shape[self.axis]):
            return False
        if matrices is None:
            return True
        number, _, d = self.blocks(shape)
        return matrices.shape == (number, d, d)

    def blocks(self, shape: tuple[int, ...]) -> Blocks:
        """The blocks of an array."""
        if self.of_samples:
            return Blocks(shape[0], shape[0] * self.groups, self.groups)
        channels = shape[self.axis]
        d = min(self.groups, channels)
        return Blocks(-(-channels // d), channels, d)

    def layout(self, shape: tuple[int, ...], *strides: Stride) -> Layout:
        """How several arrays of one shape are read."""
        axis, d = self.axis, self.blocks(shape).d
        if self.of_samples:
            channels = shape[axis]
            positions = math.prod(shape[1:]) // channels
            return sample_layout(channels // d, positions, [self.sample_strides(shape, each) for each in strides])
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        found = [channel_strides(shape, each, axis) for each in strides]
        return channel_layout(before, after, d, [each for each in found if each is not None])

    def sample_strides(self, shape: tuple[int, ...], stride: Stride) -> SampleStrides:
        """Of an array that the kernels can read."""
        found = sample_strides(shape, stride, self.axis)
        assert found is not None
        return found


class Memory(NamedTuple):
    """Several regions of float32 numbers, by their sizes, in one allocation."""

    sizes: tuple[int, ...]
    places: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, *sizes: int) -> Memory:
        places, end = [], 0
        for size in sizes:
            places.append(end)
            end += -(-size // 4) * 4  # all are aligned to 16 bytes
        return cls(sizes, tuple(places), end)

    def allocate(self, like: Tensor, rank: int) -> list[Tensor]:
        """One tensor.

        For what PyTorch compiles one a region, from `rank` dimensions on and no two of the same shape: it would copy
        what kernels write through views, and takes empty tensors of one shape for the same one.
        """
        if torch.compiler.is_compiling():
            shapes = [(1,) * (rank + i) + (size,) for i, size in enumerate(self.sizes)]
            return [like.new_empty(shape, dtype=torch.float32) for shape in shapes]
        return [torch.empty(self.end, dtype=torch.float32, device=like.device)]

    def pointers(self, tensors: list[Tensor]) -> list[Pointer]:
        """To the regions."""
        if len(tensors) == len(self.places):
            return list(tensors)
        return [(tensors[0], place) for place in self.places]


class Blocks(NamedTuple):
    """An array as blocks of rows: `rows` in all of them, `d` in each, but fewer in the last one where they end."""

    number: int
    rows: int
    d: int

    def statistics(self) -> Memory:
        """Covariances, whiteners and means."""
        matrices = self.number * self.d**2
        return Memory.of(matrices, matrices, self.number * self.d)


class Forward(NamedTuple):
    """Launches and memory of a forward pass; no second launch where the first one maps too."""

    sums: PreparedLaunch
    map: PreparedLaunch | None
    stats: Memory
    scratch: Memory
    counters: int


class Backward(NamedTuple):
    """Launches and memory of a backward pass; the regions of the scratch memory are the kernels' arguments."""

    sums: PreparedLaunch
    map: PreparedLaunch
    stats: Memory
    scratch: Memory
    counters: int


def plan_forward(
    whitening: Whitening,
    shape: tuple[int, ...],
    x_stride: Stride,
    y_stride: Stride,
    x_precision: str,
    averages: tuple[float | None, bool] | None,
    types: Types,
) -> Forward:
    blocks = whitening.blocks(shape)
    layout = whitening.layout(shape, x_stride, y_stride)
    x, y = layout.strides
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    maps = whitening.of_samples and blocks.d * layout.samples <= LARGEST_SAMPLE and layout.samples <= LONGEST
    if maps:
        tiles = tiles._replace(parts=1, chunk=layout.samples)
    clusters = Clusters.of(tiles.parts)
    compiled_for = _matrix_constants(blocks.d, types, in_registers=0, in_memory=SCRATCH)
    region = _slots(tiles.height, clusters) + compiled_for["MATRICES"] * tiles.height**2
    momentum, of_covariance = averages or (None, False)
    of_channels = layout.channels, layout.positions
    sums = PreparedLaunch(
        joined_forward.whiten_sums,
        (tiles.blocks, tiles.parts, 1),
        (
            *(*x, *y, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, clusters.size, region),
            *(clusters.counters, *of_channels, whitening.eps, momentum, whitening.iterations),
        ),
        {
            "TRACKS_COVARIANCE": of_covariance,
            "MAPS": maps,
            "LEVELS": clusters.levels,
            "WIDTH": tiles.width,
            "SPREAD": SPREAD,
            "PRECISION": x_precision,
            **compiled_for,
        },
        num_warps=tiles.warps,
    )
    numbers = *y, *x, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, *of_channels
    mapped = None if maps else _map(joined_forward.whiten_map, tiles, numbers, x_precision)
    scratch = Memory.of(blocks.number * region, blocks.number)  # and each block's verdict on the running averages
    return Forward(sums, mapped, blocks.statistics(), scratch, blocks.number * clusters.counters)


def plan_frozen(
    whitening: Whitening,
    shape: tuple[int, ...],
    x_stride: Stride,
    y_stride: Stride,
    x_precision: str,
    types: Types,
) -> PreparedLaunch:
    """Of groups of channels, by statistics that are given."""
    blocks = whitening.blocks(shape)
    layout = whitening.layout(shape, x_stride, y_stride)
    x, y = layout.strides
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    numbers = *y, *x, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, 1, 1
    return _map(joined_forward.whiten_map, tiles, numbers, x_precision)


def plan_channels_backward(
    whitening: Whitening,
    shape: tuple[int, ...],
    dy_stride: Stride,
    x_stride: Stride,
    dx_stride: Stride,
    x_precision: str,
    types: Types,
) -> Backward:
    blocks = whitening.blocks(shape)
    layout = whitening.layout(shape, dy_stride, x_stride, dx_stride)
    dy, x, dx = layout.strides
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    clusters = Clusters.of(tiles.parts)
    compiled_for = _matrix_constants(blocks.d, types, in_registers=ADJOINT_WAITING, in_memory=ADJOINT_SCRATCH)
    region = _gradient_region(tiles.height, clusters, compiled_for["MATRICES"])
    common = layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk
    sums = PreparedLaunch(
        joined_backward.channels_gradient_sums,
        (tiles.blocks, tiles.parts, 1),
        (*dy, *x, *common, clusters.size, region, clusters.counters, whitening.eps, whitening.iterations),
        {
            "LEVELS": clusters.levels,
            "WIDTH": tiles.width,
            "PRECISION": x_precision,
            **compiled_for,
        },
        num_warps=tiles.warps,
    )
    numbers = *dx, *dy, *x, *common, region, layout.channels, layout.positions, 0, 0
    mapped = _map(joined_backward.gradient_map, tiles, numbers, x_precision)
    return Backward(
        sums, mapped, blocks.statistics(), Memory.of(blocks.number * region), blocks.number * clusters.counters
    )


def plan_samples_backward(
    whitening: Whitening,
    shape: tuple[int, ...],
    dy_stride: Stride,
    x_stride: Stride,
    dx_stride: Stride,
    x_precision: str,
    types: Types,
) -> Backward:
    blocks = whitening.blocks(shape)
    layout = whitening.layout(shape, dy_stride, x_stride, dx_stride)
    dy, x, dx = layout.strides
    all_channels = shape[whitening.axis]
    channels = all_channels // blocks.d
    positions = layout.samples // channels
    of_x = whitening.sample_strides(shape, x_stride)
    parts = ChannelParts.of(blocks.number, blocks.d, channels, positions, side_by_side=of_x.channel < of_x.position)
    clusters = Clusters.of(parts.of_channels * parts.of_positions)
    compiled_for = _matrix_constants(blocks.d, types, in_registers=ADJOINT_WAITING, in_memory=ADJOINT_SCRATCH)
    region = _gradient_region(tile_height(blocks.d), clusters, compiled_for["MATRICES"])
    by_channel = (
        (sample, channels * channel, channel, position)
        for sample, channel, position in (whitening.sample_strides(shape, each) for each in (dy_stride, x_stride))
    )
    sums = PreparedLaunch(
        joined_backward.samples_gradient_sums,
        (blocks.number, parts.of_channels, parts.of_positions),
        (
            *(number for strides in by_channel for number in strides),
            *(channels, positions, blocks.d, parts.channel_chunk, parts.position_chunk),
            *(clusters.size, region, clusters.counters, whitening.eps, whitening.iterations),
        ),
        {
            "LEVELS": clusters.levels,
            "CHANNELS": parts.tile_channels,
            "POSITIONS": parts.tile_positions,
            "PRECISION": x_precision,
            **compiled_for,
        },
        num_stages=2,
    )
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    parameter_parts = blocks.number * parts.of_positions
    numbers = (
        *(*dx, *dy, *x, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, region),
        *(layout.channels, layout.positions, parameter_parts, all_channels),
    )
    mapped = _map(joined_backward.gradient_map, tiles, numbers, x_precision)
    _, weight_type, bias_type, *_ = types
    of_parameters = (0 if each is None else parameter_parts * all_channels for each in (weight_type, bias_type))
    scratch = Memory.of(blocks.number * region, *of_parameters)
    return Backward(sums, mapped, blocks.statistics(), scratch, blocks.number * clusters.counters)


def _map(kernel: Any, tiles: Tiles, numbers: tuple[int, ...], x_precision: str) -> PreparedLaunch:
    rows = min(tiles.height, _LARGEST_MATRIX)
    keeps_matrices = rows == tiles.height
    return PreparedLaunch(
        kernel,
        (tiles.blocks, tiles.parts, tiles.height // rows),
        numbers,
        {
            "HEIGHT": tiles.height,
            "ROWS": rows,
            "WIDTH": tiles.width if keeps_matrices else _LARGEST_MATRIX,
            "PRECISION": x_precision,
        },
        num_warps=tiles.warps,
        num_stages=2 if keeps_matrices else 1,  # more need more shared memory than many a device has
    )


def _matrix_constants(d: int, types: Types, *, in_registers: int, in_memory: int) -> dict[str, Any]:
    """What the iterations are compiled for; `MATRICES` is how many lie in memory, by where programs iterate."""
    given = constants(d)
    fit_registers = _fit_registers(given["HEIGHT"], types[-1])
    return {
        "HEIGHT": given["HEIGHT"],
        "SMALLEST": given["SMALLEST"],
        "TILE": given["TILE"],
        "STEP": given["STEP"],
        "MATRIX_PRECISION": given["PRECISION"],
        "IN_REGISTERS": fit_registers,
        "MATRICES": in_registers if fit_registers else in_memory,
    }


def _slots(height: int, clusters: Clusters) -> int:
    """Numbers that hold a block's sums of parts and of clusters."""
    return clusters.slots * (height**2 + height)


def _gradient_region(height: int, clusters: Clusters, matrices: int) -> int:
    """Numbers of a block: A and B, s / M, then the parts' sums, then the matrices that the iteration works in."""
    return (2 + matrices) * height**2 + height + _slots(height, clusters)


def _fit_registers(height: int, device: torch.device) -> bool:
    """Whether programs iterate in registers: before 9.0, operands of 64 variables alone take most of them."""
    return height <= 32 or (height == _LARGEST_MATRIX and _capability(device) >= (9, 0))


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """9.0, as the newest, where there is no device but Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
