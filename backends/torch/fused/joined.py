"""IterNorm and group whitening with joined launches: two forward, or one for small samples, and two backward.

All that a launch takes beside addresses follows from shapes, strides and dtypes: it is worked out once, and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from polywhiten.torch.averages import RunningAverages
from polywhiten.torch.fused import joined_kernels
from polywhiten.torch.fused.counting import Clusters, counters
from polywhiten.torch.fused.group_whitening import ChannelParts
from polywhiten.torch.fused.layouts import Layout, channel_layout, channel_strides, sample_layout, sample_strides
from polywhiten.torch.fused.moments import SPREAD
from polywhiten.torch.fused.newton import ADJOINT_SCRATCH, SCRATCH, constants
from polywhiten.torch.fused.prepared import Pointer, PreparedLaunch, current_stream
from polywhiten.torch.fused.tiles import LONGEST, Tiles, precision, tile_height

LARGEST_SAMPLE = 2**16  # elements that a program reads twice: those of all programs at work stay in the device's cache
LARGEST_SAMPLE_MATRIX = 64  # groups of a sample, so that registers have room for weight and bias too
_LARGEST_MATRIX = 64  # rows and columns of a matrix that are kept while samples pass, or in registers altogether
_KEPT_PLANS = 1024

Stride = tuple[int, ...]
Gradients = tuple[Tensor, Tensor | None, Tensor | None]


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
            end += triton.cdiv(size, 4) * 4  # all are aligned to 16 bytes
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
    scratch: Memory
    counters: int


class Joined(NamedTuple):
    """IterNorm, or group whitening where `of_samples`, of channels on an axis, in groups of so many or so many groups.

    Its methods are for tensors that `polywhiten.torch.fused.kernels.FusedKernels.joined` has looked at.
    """

    of_samples: bool
    axis: int
    groups: int
    eps: float
    iterations: int

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, averages: RunningAverages | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Y, and what holds the statistics; `averages` have taken a step then."""
        y = torch.empty_like(x)
        with_averages = None if averages is None else (averages.momentum, averages.of_covariance)
        types = _types(x, weight, bias, *(averages or ())[:3])
        plan = _kept(_plan_forward)(
            self, tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), with_averages, types
        )
        stats = plan.stats.allocate(x, rank=0)
        cov, whitener, mean = plan.stats.pointers(stats)
        (scratch,) = plan.scratch.allocate(x, rank=3)
        running = (None, None, None) if averages is None else averages[:3]
        of_rows, of_channels = ((None, None), (weight, bias)) if self.of_samples else ((weight, bias), (None, None))
        stream = current_stream(x.device)
        counted = counters(x.device, stream, plan.counters, rank=0)
        plan.sums(stream, x, mean, cov, whitener, scratch, counted, *running, y, *of_channels)
        if plan.map is not None:
            averaged = cov if averages is not None and averages.of_covariance else whitener
            plan.map(stream, y, x, mean, averaged, whitener, scratch, *running, *of_rows, *of_channels)
        if averages is not None:
            _count_changes(averages)
        return y, stats

    def backward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, stats: list[Tensor], dy: Tensor
    ) -> Gradients:
        """Gradients of x, weight and bias."""
        dx = torch.empty_like(x)
        dweight, dbias = (None if each is None else torch.empty_like(each) for each in (weight, bias))
        shape, types = tuple(x.shape), _types(x, weight, bias, dy)
        plan = _kept(_plan_samples_backward if self.of_samples else _plan_channels_backward)(
            self, shape, dy.stride(), x.stride(), dx.stride(), precision(x.dtype), types
        )
        cov, whitener, mean = _blocks(self, shape).statistics().pointers(stats)
        scratch, *parts = plan.scratch.pointers(plan.scratch.allocate(x, rank=4))
        stream = current_stream(x.device)
        counted = counters(x.device, stream, plan.counters, rank=1)
        of_sums = (dweight, dbias)
        of_map: tuple[Pointer, ...] = (None, None, None, None, None)
        if self.of_samples:
            of_weight, of_bias = (
                None if each is None else part for each, part in zip((weight, bias), parts, strict=True)
            )
            of_sums, of_map = (of_weight, of_bias), (weight, of_weight, of_bias, dweight, dbias)
        plan.sums(stream, dy, x, mean, cov, whitener, weight, scratch, counted, *of_sums)
        plan.map(stream, dx, dy, x, mean, scratch, *of_map)
        return dx, dweight, dbias


def map_frozen(
    x: Tensor, mean: Tensor, whitener: Tensor, weight: Tensor | None, bias: Tensor | None, *, axis: int
) -> Tensor:
    """Groups of channels whitened by given statistics (C,) and (groups, d, d)."""
    y = torch.empty_like(x)
    types = _types(x, mean, whitener, weight, bias)
    launch = _kept(_plan_frozen)(
        axis, whitener.shape[-1], tuple(x.shape), x.stride(), y.stride(), precision(x.dtype), types
    )
    none = None, None, None
    launch(current_stream(x.device), y, x, mean, None, whitener, None, *none, weight, bias, None, None)
    return y


def is_laid_out(of_samples: bool, x: Tensor, axis: int) -> bool:
    """Whether the kernels can read x as it lies in memory."""
    strides = sample_strides if of_samples else channel_strides
    return strides(x.shape, x.stride(), axis) is not None


def _kept(plan: Callable[..., Any]) -> Callable[..., Any]:
    """As it is where PyTorch compiles, which follows how plans come about, but not what has been kept."""
    return plan if torch.compiler.is_compiling() else _PLANS[plan]


def _types(*tensors: Tensor | None) -> tuple[Any, ...]:
    """What kernels are compiled for beside numbers."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors) + (tensors[0].device,)


def _count_changes(averages: RunningAverages) -> None:
    """As operations in place do, for those who need the former values."""
    if not torch.compiler.is_compiling():
        for each in averages[:3]:
            if each is not None:
                increment_version(each)


def _blocks(joined: Joined, shape: tuple[int, ...]) -> Blocks:
    if joined.of_samples:
        return Blocks(shape[0], shape[0] * joined.groups, joined.groups)
    channels = shape[joined.axis]
    size = min(joined.groups, channels)
    return Blocks(triton.cdiv(channels, size), channels, size)


def _layout(joined: Joined, shape: tuple[int, ...], *strides: Stride) -> Layout:
    axis, d = joined.axis, _blocks(joined, shape).d
    if joined.of_samples:
        channels = shape[axis]
        positions = _product(shape[1:]) // channels
        return sample_layout(channels // d, positions, [sample_strides(shape, each, axis) for each in strides])
    before, after = _product(shape[:axis]), _product(shape[axis + 1 :])
    return channel_layout(before, after, d, [channel_strides(shape, each, axis) for each in strides])


def _plan_forward(
    joined: Joined,
    shape: tuple[int, ...],
    x_stride: Stride,
    y_stride: Stride,
    x_precision: str,
    averages: tuple[float | None, bool] | None,
    types: tuple[Any, ...],
) -> Forward:
    blocks = _blocks(joined, shape)
    layout = _layout(joined, shape, x_stride, y_stride)
    x, y = layout.strides
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    maps = joined.of_samples and blocks.d * layout.samples <= LARGEST_SAMPLE and layout.samples <= LONGEST
    if maps:
        tiles = tiles._replace(parts=1, chunk=layout.samples)
    clusters = Clusters.of(tiles.parts)
    height = tiles.height
    region = (
        clusters.slots * (height * height + height) + (0 if _fit_registers(height, types[-1]) else SCRATCH) * height**2
    )
    momentum, of_covariance = averages or (None, False)
    of_channels = layout.channels, layout.positions
    sums = PreparedLaunch(
        joined_kernels.whiten_sums,
        (tiles.blocks, tiles.parts, 1),
        (
            *(*x, *y, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, clusters.size, region),
            *(clusters.counters, *of_channels, joined.eps, momentum, joined.iterations),
        ),
        {
            "TRACKS_COVARIANCE": of_covariance,
            "MAPS": maps,
            "LEVELS": clusters.levels,
            "WIDTH": tiles.width,
            "SPREAD": SPREAD,
            "PRECISION": x_precision,
            **_matrix_constants(blocks.d, types),
        },
        num_warps=tiles.warps,
    )
    numbers = *y, *x, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, *of_channels
    mapped = None if maps else _map(joined_kernels.whiten_map, tiles, numbers, x_precision, stages=2)
    scratch = Memory.of(_verdicts(blocks.number) + blocks.number * region)
    return Forward(sums, mapped, blocks.statistics(), scratch, blocks.number * clusters.counters)


def _plan_frozen(
    axis: int,
    group_size: int,
    shape: tuple[int, ...],
    x_stride: Stride,
    y_stride: Stride,
    x_precision: str,
    types: tuple[Any, ...],
) -> PreparedLaunch:
    joined = Joined(False, axis, group_size, 0.0, 0)
    blocks = _blocks(joined, shape)
    layout = _layout(joined, shape, x_stride, y_stride)
    x, y = layout.strides
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    numbers = *y, *x, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, 1, 1
    return _map(joined_kernels.whiten_map, tiles, numbers, x_precision, stages=2)


def _plan_channels_backward(
    joined: Joined,
    shape: tuple[int, ...],
    dy_stride: Stride,
    x_stride: Stride,
    dx_stride: Stride,
    x_precision: str,
    types: tuple[Any, ...],
) -> Backward:
    blocks = _blocks(joined, shape)
    layout = _layout(joined, shape, dy_stride, x_stride, dx_stride)
    dy, x, dx = layout.strides
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    clusters = Clusters.of(tiles.parts)
    region = _gradient_region(tiles.height, clusters, types)
    common = layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk
    sums = PreparedLaunch(
        joined_kernels.channels_gradient_sums,
        (tiles.blocks, tiles.parts, 1),
        (*dy, *x, *common, clusters.size, region, clusters.counters, joined.eps, joined.iterations),
        {
            "LEVELS": clusters.levels,
            "WIDTH": tiles.width,
            "PRECISION": x_precision,
            **_matrix_constants(blocks.d, types),
        },
        num_warps=tiles.warps,
    )
    numbers = *dx, *dy, *x, *common, region, layout.channels, layout.positions, 0, 0
    mapped = _map(joined_kernels.gradient_map, tiles, numbers, x_precision, stages=2)
    return Backward(sums, mapped, Memory.of(blocks.number * region), blocks.number * clusters.counters)


def _plan_samples_backward(
    joined: Joined,
    shape: tuple[int, ...],
    dy_stride: Stride,
    x_stride: Stride,
    dx_stride: Stride,
    x_precision: str,
    types: tuple[Any, ...],
) -> Backward:
    blocks = _blocks(joined, shape)
    layout = _layout(joined, shape, dy_stride, x_stride, dx_stride)
    dy, x, dx = layout.strides
    all_channels = shape[joined.axis]
    channels = all_channels // blocks.d
    positions = layout.samples // channels
    of_x = sample_strides(shape, x_stride, joined.axis)
    parts = ChannelParts.of(blocks.number, blocks.d, channels, positions, side_by_side=of_x.channel < of_x.position)
    clusters = Clusters.of(parts.of_channels * parts.of_positions)
    region = _gradient_region(tile_height(blocks.d), clusters, types)
    by_channel = (
        (sample, channels * channel, channel, position)
        for sample, channel, position in (sample_strides(shape, each, joined.axis) for each in (dy_stride, x_stride))
    )
    sums = PreparedLaunch(
        joined_kernels.samples_gradient_sums,
        (blocks.number, parts.of_channels, parts.of_positions),
        (
            *(number for strides in by_channel for number in strides),
            *(channels, positions, blocks.d, parts.channel_chunk, parts.position_chunk),
            *(clusters.size, region, clusters.counters, joined.eps, joined.iterations),
        ),
        {
            "LEVELS": clusters.levels,
            "CHANNELS": parts.tile_channels,
            "POSITIONS": parts.tile_positions,
            "PRECISION": x_precision,
            **_matrix_constants(blocks.d, types),
        },
        num_stages=2,
    )
    tiles = Tiles.of(blocks.number, blocks.d, layout.samples)
    parameter_parts = blocks.number * parts.of_positions
    numbers = (
        *(*dx, *dy, *x, layout.inner, layout.samples, blocks.rows, blocks.d, tiles.chunk, region),
        *(layout.channels, layout.positions, parameter_parts, all_channels),
    )
    mapped = _map(joined_kernels.gradient_map, tiles, numbers, x_precision, stages=2)
    _, weight_type, bias_type, *_ = types
    of_parameters = (0 if each is None else parameter_parts * all_channels for each in (weight_type, bias_type))
    scratch = Memory.of(blocks.number * region, *of_parameters)
    return Backward(sums, mapped, scratch, blocks.number * clusters.counters)


def _map(kernel: Any, tiles: Tiles, numbers: tuple[int, ...], x_precision: str, stages: int) -> PreparedLaunch:
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
        num_stages=stages if keeps_matrices else 1,  # more need more shared memory than many a device has
    )


def _matrix_constants(d: int, types: tuple[Any, ...]) -> dict[str, Any]:
    """What the iterations are compiled for."""
    given = constants(d)
    return {
        "HEIGHT": given["HEIGHT"],
        "SMALLEST": given["SMALLEST"],
        "TILE": given["TILE"],
        "STEP": given["STEP"],
        "MATRIX_PRECISION": given["PRECISION"],
        "IN_REGISTERS": _fit_registers(given["HEIGHT"], types[-1]),
    }


def _gradient_region(height: int, clusters: Clusters, types: tuple[Any, ...]) -> int:
    """Numbers of a block: A and B, s / M, then the parts' sums, then what the iteration works in."""
    matrices = 2 + (2 if _fit_registers(height, types[-1]) else ADJOINT_SCRATCH)
    return matrices * height**2 + height + clusters.slots * (height**2 + height)


def _fit_registers(height: int, device: torch.device) -> bool:
    """Whether programs of a device iterate in registers: before 9.0, operands of 64 variables alone take most of them."""
    return height <= 32 or (height == _LARGEST_MATRIX and _capability(device) >= (9, 0))


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """9.0, as the newest, where there is no device but Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _verdicts(blocks: int) -> int:
    """Numbers at the start of the forward pass' scratch memory: each block's verdict on the running averages."""
    rounded: int = triton.cdiv(blocks, 16) * 16
    return rounded


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


_PLANS = {
    plan: lru_cache(_KEPT_PLANS)(plan)
    for plan in (_plan_forward, _plan_frozen, _plan_channels_backward, _plan_samples_backward)
}
