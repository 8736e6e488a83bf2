"""The launches of the joined kernels, and their memory: all that follows from shapes, strides and dtypes."""

from __future__ import annotations

from typing import Any, NamedTuple

from polywhiten.torch.triton.affine_map import map_constants, map_grid
from polywhiten.torch.triton.joined_cross_moments import joined_cross_moments
from polywhiten.torch.triton.joined_gradient_map import joined_gradient_map
from polywhiten.torch.triton.joined_map import joined_map
from polywhiten.torch.triton.joined_problem import BlockSizes, JoinedProblem, Shape, Stride
from polywhiten.torch.triton.joined_sample_cross_moments import joined_sample_cross_moments
from polywhiten.torch.triton.joined_statistics import joined_statistics
from polywhiten.torch.triton.joined_tiles import (
    SUM_STAGES,
    alignment,
    channels_of_tiles,
    joined_precision,
    map_stages,
    parts_of_sums,
    sample_alignment,
    tiles_of_map,
    tiles_of_sums,
)
from polywhiten.torch.triton.last_program import Clusters
from polywhiten.torch.triton.layouts import Layout
from polywhiten.torch.triton.memory_regions import MemoryRegions
from polywhiten.torch.triton.newton_in_memory import ADJOINT_MATRICES, NEWTON_MATRICES, newton_constants
from polywhiten.torch.triton.newton_in_registers import num_iterates
from polywhiten.torch.triton.partial_moments import SHIFT_SAMPLES
from polywhiten.torch.triton.prepared_launch import PreparedLaunch
from polywhiten.torch.triton.register_iteration import fits_registers
from polywhiten.torch.triton.sample_parts import GroupStrides, is_small_sample
from polywhiten.torch.triton.tiles import Tiles

Types = tuple[Any, ...]  # the dtypes of the tensors, None for those that are None, and the device last


class JoinedForward(NamedTuple):
    """Launches and memory of a forward pass. `map` is None if the first launch whitens the samples too."""

    statistics: PreparedLaunch
    map: PreparedLaunch | None
    saved: MemoryRegions
    workspace: MemoryRegions
    num_counters: int


class JoinedBackward(NamedTuple):
    """Launches and memory of a backward pass."""

    cross_moments: PreparedLaunch
    map: PreparedLaunch
    saved: MemoryRegions
    workspace: MemoryRegions
    num_counters: int


def plan_forward(
    problem: JoinedProblem,
    shape: Shape,
    x_stride: Stride,
    y_stride: Stride,
    x_precision: str,
    averaging: tuple[float | None, bool] | None,
    types: Types,
) -> JoinedForward:
    """Plan a forward pass; `averaging` is the momentum, and whether covariances are averaged instead of whiteners."""
    sizes, layout = problem.sizes(shape), problem.layout(shape, x_stride, y_stride)
    dtype, *_, device = types
    tiles = tiles_of_sums(sizes.num_blocks, sizes.d, layout.samples, dtype, device)
    maps_samples = problem.of_samples and is_small_sample(sizes.d, layout.samples)
    if maps_samples:
        tiles = tiles._replace(num_parts=1, part_size=layout.samples)
    clusters = Clusters.of(tiles.num_parts)
    constants = _newton_constants(sizes.d, types)
    matrices_offset = _slots_size(tiles.height, clusters)
    num_matrices = 0 if constants["IN_REGISTERS"] else NEWTON_MATRICES
    workspace_per_block = matrices_offset + num_matrices * tiles.height**2
    momentum, tracks_covariance = averaging or (None, False)
    statistics = PreparedLaunch(
        joined_statistics,
        (tiles.num_blocks, tiles.num_parts, 1),
        {
            **_forward_scalars(sizes, layout, tiles),
            **_block_scalars(problem, clusters, workspace_per_block, matrices_offset),
            "momentum": momentum,
        },
        {
            "TRACKS_COVARIANCE": tracks_covariance,
            "MAPS_SAMPLES": maps_samples,
            "LEVELS": clusters.levels,
            "SHIFT_SAMPLES": SHIFT_SAMPLES,
            "CHANNELS": channels_of_tiles(layout, tiles.width),
            **_sum_constants(sizes, layout, tiles, x_precision, types),
            **constants,
            "num_warps": tiles.num_warps,
        },
    )
    map_launch = None if maps_samples else _map_launch(sizes, layout, x_precision, types)
    # each block has an averaging factor besides
    workspace = MemoryRegions.of(sizes.num_blocks * workspace_per_block, sizes.num_blocks)
    num_counters = sizes.num_blocks * clusters.num_counters
    return JoinedForward(statistics, map_launch, sizes.statistics(), workspace, num_counters)


def plan_frozen(
    problem: JoinedProblem, shape: Shape, x_stride: Stride, y_stride: Stride, x_precision: str, types: Types
) -> PreparedLaunch:
    """Plan the whitening of groups of channels by frozen statistics."""
    return _map_launch(problem.sizes(shape), problem.layout(shape, x_stride, y_stride), x_precision, types)


def plan_channels_backward(
    problem: JoinedProblem,
    shape: Shape,
    dy_stride: Stride,
    x_stride: Stride,
    dx_stride: Stride,
    x_precision: str,
    types: Types,
) -> JoinedBackward:
    """Plan IterNorm's backward pass; the types are those of x, weight, bias and dy."""
    sizes, layout = problem.sizes(shape), problem.layout(shape, dy_stride, x_stride, dx_stride)
    dy, x, _ = layout.strides
    dtype, *_, device = types
    constants = _newton_constants(sizes.d, types)
    tiles = tiles_of_sums(
        sizes.num_blocks, sizes.d, layout.samples, dtype, device, other_programs=int(constants["IN_REGISTERS"])
    )
    clusters = Clusters.of(tiles.num_parts)
    has_iterates = int(constants["IN_REGISTERS"] and clusters.levels > 0)  # by a program that has no part of the sums
    matrices_offset = _gradient_matrices_offset(tiles.height, clusters)
    workspace_per_block = matrices_offset + _adjoint_matrices(problem, constants) * tiles.height**2
    cross_moments = PreparedLaunch(
        joined_cross_moments,
        (tiles.num_blocks, tiles.num_parts + has_iterates, 1),
        {
            **_sample_scalars(sizes, layout, tiles),
            **_block_scalars(problem, clusters, workspace_per_block, matrices_offset),
            **dy.named("dy"),
            **x.named("x"),
        },
        {
            "LEVELS": clusters.levels,
            **_sum_constants(sizes, layout, tiles, x_precision, types),
            **constants,
            "HAS_ITERATES": has_iterates,
            "num_warps": tiles.num_warps,
        },
    )
    map_launch = _gradient_map_launch(sizes, layout, workspace_per_block, x_precision, types)
    workspace = MemoryRegions.of(sizes.num_blocks * workspace_per_block)
    num_counters = sizes.num_blocks * clusters.num_counters
    return JoinedBackward(cross_moments, map_launch, sizes.statistics(), workspace, num_counters)


def plan_samples_backward(
    problem: JoinedProblem,
    shape: Shape,
    dy_stride: Stride,
    x_stride: Stride,
    dx_stride: Stride,
    x_precision: str,
    types: Types,
) -> JoinedBackward:
    """Plan group whitening's backward pass; the types are those of x, weight, bias and dy."""
    sizes, layout = problem.sizes(shape), problem.layout(shape, dy_stride, x_stride, dx_stride)
    total_channels = shape[problem.axis]
    channels = total_channels // sizes.d
    positions = layout.samples // channels
    dy, x = (
        GroupStrides(sample, channels * channel, channel, position)
        for sample, channel, position in (problem.sample_strides(shape, each) for each in (dy_stride, x_stride))
    )
    dtype, *_, device = types
    parts = parts_of_sums(sizes.num_blocks, sizes.d, channels, positions, x, dtype, device)
    clusters = Clusters.of(parts.num_parts)
    constants = _newton_constants(sizes.d, types)
    matrices_offset = _gradient_matrices_offset(constants["HEIGHT"], clusters)
    workspace_per_block = matrices_offset + _adjoint_matrices(problem, constants) * constants["HEIGHT"] ** 2
    cross_moments = PreparedLaunch(
        joined_sample_cross_moments,
        (sizes.num_blocks, parts.num_channel_parts, parts.num_position_parts),
        {
            "channels": channels,
            "positions": positions,
            "d": sizes.d,
            "part_channels": parts.part_channels,
            "part_positions": parts.part_positions,
            **_block_scalars(problem, clusters, workspace_per_block, matrices_offset),
            **dy.named("dy"),
            **x.named("x"),
        },
        {
            "LEVELS": clusters.levels,
            "CHANNELS": parts.tile_channels,
            "POSITIONS": parts.tile_positions,
            "WHOLE_TILES": channels % parts.tile_channels == 0,
            "STAGES": SUM_STAGES,
            "ALIGNMENT": sample_alignment(parts.tile_channels, positions, (dy, x)),
            "PRECISION": joined_precision(x_precision, sizes.d, dtype, device),
            **constants,
        },
    )
    num_parts = sizes.num_blocks * parts.num_position_parts
    map_launch = _gradient_map_launch(sizes, layout, workspace_per_block, x_precision, types, num_parts, total_channels)
    _, weight_type, bias_type, *_ = types
    parameter_sizes = (0 if each is None else num_parts * total_channels for each in (weight_type, bias_type))
    workspace = MemoryRegions.of(sizes.num_blocks * workspace_per_block, *parameter_sizes)
    num_counters = sizes.num_blocks * clusters.num_counters
    return JoinedBackward(cross_moments, map_launch, sizes.statistics(), workspace, num_counters)


def _sample_scalars(sizes: BlockSizes, layout: Layout, tiles: Tiles) -> dict[str, Any]:
    return {
        "inner": layout.inner,
        "samples": layout.samples,
        "total_rows": sizes.total_rows,
        "d": sizes.d,
        "part_size": tiles.part_size,
    }


def _forward_scalars(sizes: BlockSizes, layout: Layout, tiles: Tiles) -> dict[str, Any]:
    x, y = layout.strides
    return {**_sample_scalars(sizes, layout, tiles), **_channel_scalars(layout), **x.named("x"), **y.named("y")}


def _channel_scalars(layout: Layout) -> dict[str, Any]:
    return {"channels": layout.channels, "positions": layout.positions}


def _block_scalars(
    problem: JoinedProblem, clusters: Clusters, workspace_per_block: int, matrices_offset: int
) -> dict[str, Any]:
    return {
        "cluster_size": clusters.cluster_size,
        "workspace_per_block": workspace_per_block,
        "matrices_offset": matrices_offset,
        "counters_per_block": clusters.num_counters,
        "eps": problem.eps,
        "iterations": problem.iterations,
    }


def _layout_constants(sizes: BlockSizes, layout: Layout) -> dict[str, Any]:
    """Return what kernels know of blocks and of memory when they are compiled, to load several numbers at a time."""
    return {"HAS_SMALLER_BLOCK": sizes.total_rows % sizes.d != 0, "ALIGNMENT": alignment(layout)}


def _sum_constants(sizes: BlockSizes, layout: Layout, tiles: Tiles, x_precision: str, types: Types) -> dict[str, Any]:
    dtype, *_, device = types
    return {
        "WIDTH": tiles.width,
        "STAGES": SUM_STAGES,
        "PRECISION": joined_precision(x_precision, sizes.d, dtype, device),
        **_layout_constants(sizes, layout),
    }


def _map_constants(sizes: BlockSizes, layout: Layout, tiles: Tiles, x_precision: str, types: Types) -> dict[str, Any]:
    dtype, *_, device = types
    precision = joined_precision(x_precision, sizes.d, dtype, device)
    constants = map_constants(tiles, precision) | _layout_constants(sizes, layout)
    constants["CHANNELS"] = channels_of_tiles(layout, constants["WIDTH"])
    return constants | ({"num_stages": map_stages(device)} if constants["num_stages"] > 1 else {})


def _map_launch(sizes: BlockSizes, layout: Layout, x_precision: str, types: Types) -> PreparedLaunch:
    dtype, *_, device = types
    tiles = tiles_of_map(sizes.num_blocks, sizes.d, layout.samples, dtype, device)
    return PreparedLaunch(
        joined_map,
        map_grid(tiles),
        _forward_scalars(sizes, layout, tiles),
        _map_constants(sizes, layout, tiles, x_precision, types),
    )


def _gradient_map_launch(
    sizes: BlockSizes,
    layout: Layout,
    workspace_per_block: int,
    x_precision: str,
    types: Types,
    num_parameter_parts: int = 0,
    total_channels: int = 0,
) -> PreparedLaunch:
    dy, x, dx = layout.strides
    dtype, *_, device = types
    tiles = tiles_of_map(sizes.num_blocks, sizes.d, layout.samples, dtype, device, of_gradient=True)
    scalars = {
        **_sample_scalars(sizes, layout, tiles),
        **_channel_scalars(layout),
        "workspace_per_block": workspace_per_block,
        "num_parameter_parts": num_parameter_parts,
        "total_channels": total_channels,
        **dx.named("dx"),
        **dy.named("dy"),
        **x.named("x"),
    }
    constants = _map_constants(sizes, layout, tiles, x_precision, types)
    return PreparedLaunch(joined_gradient_map, map_grid(tiles), scalars, constants)


def _newton_constants(d: int, types: Types) -> dict[str, Any]:
    """Return what the iteration is compiled for, and whether programs iterate in registers or in memory."""
    constants = newton_constants(d)
    return {
        "HEIGHT": constants["HEIGHT"],
        "SMALLEST": constants["SMALLEST"],
        "TILE": constants["TILE"],
        "STEP": constants["STEP"],
        "MATRIX_PRECISION": constants["PRECISION"],
        "IN_REGISTERS": fits_registers(constants["HEIGHT"], types[-1]),
    }


def _adjoint_matrices(problem: JoinedProblem, constants: dict[str, Any]) -> int:
    """Return how many matrices the iteration's adjoint has in the workspace of a block."""
    return num_iterates(problem.iterations) if constants["IN_REGISTERS"] else ADJOINT_MATRICES


def _slots_size(height: int, clusters: Clusters) -> int:
    """Return how many numbers the sums of a block's parts and clusters are."""
    return clusters.num_slots * (height**2 + height)


def _gradient_matrices_offset(height: int, clusters: Clusters) -> int:
    """Return how many numbers A', B and s / M and the slots are; the iteration's matrices come after them."""
    return 2 * height**2 + height + _slots_size(height, clusters)
