"""The numbers of the joined kernels' launches, found once for all arrays of a shape, strides and dtype."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from polywhiten.cupy.variants import (
    ADJOINT_MATRICES,
    AFFINE_THREADS,
    PRODUCT_THREADS,
    ROOT_MATRICES,
    TYPES,
    along_samples,
    cut,
    map_memory,
    map_programs,
    newton_memory,
    stretches,
    variant,
)

# The fields of pass.cuh.
_STRIDES = np.dtype([(name, np.int64) for name in ("block", "outer", "variable", "inner", "along_samples")])
_NUMBERS = (
    *("blocks", "d", "outer", "channels", "positions", "block_channels", "all_channels"),
    *("programs", "cluster", "counters", "channel_chunk", "position_parts", "stretch"),
    *("maps", "gradients", "rows", "half_weight", "half_bias"),
)
PASS = np.dtype([*((name, _STRIDES) for name in ("x", "dy", "result")), *((name, np.int64) for name in _NUMBERS)])

# Shared memory in KiB that the sums have in float32 at most, by their variant, beside what they are given; in float64,
# twice as much.
STATISTICS_STATIC, GRADIENT_STATIC = {4: 14, 16: 15, 32: 13, 64: 12}, {4: 26, 16: 14, 32: 12, 64: 11}
_RESERVED = 1024  # bytes that every program takes from a multiprocessor beside its own, which has as many more
_ADDED_AT_ONCE = 16  # programs that are no cluster yet
_CHANNELS_AT_ONCE = 32  # of a program that adds up gradients of weight and bias

Strides = tuple[int, int, int, int]


class Arrays(NamedTuple):
    """What a pass depends on: of x as (p, q, d, l), and of the weight and the bias of each of its channels."""

    block_axis: int
    channels: int  # of a variable
    shape: tuple[int, int, int, int]
    strides: Strides  # in bytes, as all strides of arrays
    dtype: str  # NumPy's letter
    half_weight: bool
    half_bias: bool


class Launch(NamedTuple):
    """All of a launch but its arguments."""

    file: str
    name: str
    programs: int
    threads: int
    shared: int


class Pass(NamedTuple):
    """A pass forward or backward."""

    blocks: int
    d: int
    sums: Launch
    maps: Launch
    numbers: np.ndarray[tuple[int, ...], np.dtype[np.void]]  # of both launches, as a structure that goes by value
    counters: int
    memory: int  # elements that it works in


def memory_of_sums(size: int, itemsize: int, backward: bool) -> tuple[int, int]:
    """Bytes of shared memory that a program of the sums is given, and that it has in all."""
    given = newton_memory(size, itemsize, ADJOINT_MATRICES if backward else ROOT_MATRICES)
    static = GRADIENT_STATIC if backward else STATISTICS_STATIC
    return given, given + static[size] * 1024 * itemsize // 4


@lru_cache(maxsize=1024)
def forward_pass(arrays: Arrays, processors: int, shared_memory: int) -> Pass:
    """Sums, and the map of x."""
    blocks, count, d, size, itemsize = _sizes(arrays)
    tile = min(2048 // size, 256)
    given, at_once = _program(arrays, shared_memory, backward=False)
    programs, stretch = stretches(processors, blocks, count, tile, at_once)
    numbers = _numbers(arrays, programs=programs, position_parts=programs, stretch=stretch)
    numbers["maps"] = maps = map_programs(processors, blocks, count)
    variant_name = f"<{TYPES[arrays.dtype]}, {size}>"
    return Pass(
        blocks,
        d,
        Launch("joined_statistics.cu", "find_statistics" + variant_name, blocks * programs, PRODUCT_THREADS, given),
        Launch("joined_maps.cu", "whiten" + variant_name, blocks * maps, AFFINE_THREADS, map_memory(size, itemsize, 1)),
        numbers,
        blocks * int(numbers["counters"]),
        blocks * programs * (d * d + d),
    )


@lru_cache(maxsize=1024)
def backward_pass(
    arrays: Arrays, dy_strides: Strides, has_parameters: bool, processors: int, shared_memory: int
) -> Pass:
    """Cross moments, and the map of dy and x.

    Channels are summed each by itself where they have a weight or a bias; else they are one.
    """
    if not has_parameters:
        arrays = arrays._replace(channels=1)
    blocks, count, d, size, itemsize = _sizes(arrays)
    tile = min(1024 // size, 256)
    given, at_once = _program(arrays, shared_memory, backward=True)
    wanted, _ = stretches(processors, blocks, count, tile, at_once)
    channel_chunk = -(-arrays.channels // wanted)
    channel_parts = -(-arrays.channels // channel_chunk)
    position_parts, stretch = cut(count // arrays.channels, tile, max(1, wanted // channel_parts))
    programs = channel_parts * position_parts
    numbers = _numbers(
        arrays, programs=programs, position_parts=position_parts, stretch=stretch, channel_chunk=channel_chunk
    )
    numbers["dy"] = _strides(arrays, dy_strides)
    numbers["maps"] = maps = map_programs(processors, blocks, count)
    if has_parameters:
        numbers["rows"] = position_parts * (1 if numbers["block_channels"] else blocks)
        numbers["gradients"] = -(-int(numbers["all_channels"]) // _CHANNELS_AT_ONCE)
    variant_name = f"<{TYPES[arrays.dtype]}, {size}>"
    parts_of_parameters = 2 * int(numbers["rows"]) * int(numbers["all_channels"])
    map_launch = Launch(
        "joined_maps.cu",
        "pull_back" + variant_name,
        int(numbers["gradients"]) + blocks * maps,
        AFFINE_THREADS,
        map_memory(size, itemsize, 2),
    )
    return Pass(
        blocks,
        d,
        Launch("joined_gradient.cu", "find_gradient" + variant_name, blocks * programs, PRODUCT_THREADS, given),
        map_launch,
        numbers,
        blocks * int(numbers["counters"]),
        blocks * (programs + 1) * (d * d + d) + parts_of_parameters,
    )


def _sizes(arrays: Arrays) -> tuple[int, int, int, int, int]:
    """Blocks, samples of each, variables, the variant's size, and bytes of a number of the statistics."""
    shape, block_axis = arrays.shape, arrays.block_axis
    itemsize = 8 if arrays.dtype == "d" else 4
    return shape[block_axis], shape[1 - block_axis] * shape[3], shape[2], variant(shape[2]), itemsize


def _program(arrays: Arrays, shared_memory: int, backward: bool) -> tuple[int, int]:
    """Shared memory that a program of the sums is given, and how many a multiprocessor runs at once."""
    _, _, _, size, itemsize = _sizes(arrays)
    given, whole = memory_of_sums(size, itemsize, backward)
    return given, min(2, (shared_memory + _RESERVED) // (whole + _RESERVED))


def _numbers(arrays: Arrays, programs: int, position_parts: int, stretch: int, channel_chunk: int = 1) -> np.ndarray:
    blocks, _, d, _, _ = _sizes(arrays)
    cluster = programs if programs <= _ADDED_AT_ONCE else math.isqrt(programs - 1) + 1
    by_variable = arrays.block_axis == 1  # every block has channels of its own, which are its variables
    channels = 1 if by_variable else arrays.channels
    numbers = np.zeros((), PASS)
    numbers["x"] = _strides(arrays, arrays.strides)
    numbers["result"] = _strides(arrays, _ordered(arrays.shape, np.dtype(arrays.dtype).itemsize))
    for name, number in {
        "blocks": blocks,
        "d": d,
        "outer": arrays.shape[1 - arrays.block_axis],
        "channels": channels,
        "positions": arrays.shape[3] // channels,
        "block_channels": d if by_variable else 0,
        "all_channels": blocks * d if by_variable else d * channels,
        "programs": programs,
        "cluster": cluster,
        "counters": 1 + -(-programs // cluster) if programs > 1 else 0,
        "channel_chunk": channel_chunk,
        "position_parts": position_parts,
        "stretch": stretch,
        "half_weight": arrays.half_weight,
        "half_bias": arrays.half_bias,
    }.items():
        numbers[name] = number
    return numbers


def _strides(arrays: Arrays, strides: Strides) -> tuple[int, int, int, int, int]:
    itemsize = np.dtype(arrays.dtype).itemsize
    axes = (arrays.block_axis, 1 - arrays.block_axis, 2, 3)
    block, outer, variable, inner = (strides[axis] // itemsize for axis in axes)
    samples = inner if arrays.shape[3] > 1 else outer
    return block, outer, variable, inner, along_samples(arrays.shape, samples, variable)


def _ordered(shape: tuple[int, int, int, int], itemsize: int) -> Strides:
    """Strides of a new array."""
    _, q, d, l = shape
    return q * d * l * itemsize, d * l * itemsize, l * itemsize, itemsize
