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
    STATIC,
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
    *("num_parts", "fan_in", "num_counters", "channels_per_part", "position_parts", "samples_per_part"),
    *("map_parts", "parameter_thread_blocks", "gradient_rows", "half_weight", "half_bias"),
)
PASS = np.dtype([*((name, _STRIDES) for name in ("x", "dy", "result")), *((name, np.int64) for name in _NUMBERS)])

# Shared memory in KiB that the sums have in float32 at most, by their variant, beside what they are given; in float64,
# twice as much.
STATISTICS_STATIC, GRADIENT_STATIC = {4: 14, 16: 15, 32: 13, 64: 12}, {4: 26, 16: 14, 32: 12, 64: 11}
_RESERVED = 1024  # bytes that every program takes from a multiprocessor beside its own, which has as many more
_ADDED_AT_ONCE = 16  # programs that are no cluster yet
_CHANNELS_AT_ONCE = 32  # of a program that adds up gradients of weight and bias

Strides = tuple[int, int, int, int]
Structure = np.ndarray[tuple[int, ...], np.dtype[np.void]]  # of one element, which CuPy passes by value


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
    numbers: Structure  # of both launches
    counters: int
    memory: int  # elements that it works in


@lru_cache(maxsize=1024)
def needed_memory(d: int, itemsize: int, backward: bool) -> int:
    """Bytes of shared memory that the programs of a pass have at most, of statistics of so many bytes a number."""
    size = variant(d)
    return max(_memory_of_sums(size, itemsize, backward)[1], map_memory(size, itemsize, 1 + backward) + STATIC)


@lru_cache(maxsize=1024)
def forward_pass(arrays: Arrays, processors: int, shared_memory: int) -> Pass:
    """Sums, and the map of x."""
    blocks, count, d, size, itemsize = _sizes(arrays)
    given, at_once = _programs_of_sums(size, itemsize, shared_memory, backward=False)
    programs, stretch = stretches(processors, blocks, count, min(2048 // size, 256), at_once)
    maps = map_programs(processors, blocks, count)
    numbers = _numbers(arrays, num_parts=programs, position_parts=programs, samples_per_part=stretch, channels_per_part=1, map_parts=maps)
    kind = f"<{TYPES[arrays.dtype]}, {size}>"
    return Pass(
        blocks,
        d,
        Launch("joined_statistics.cu", f"joined_statistics{kind}", blocks * programs, PRODUCT_THREADS, given),
        Launch("joined_maps.cu", f"whiten{kind}", blocks * maps, AFFINE_THREADS, map_memory(size, itemsize, 1)),
        _structure(numbers, x=_strides(arrays, arrays.strides), result=_strides(arrays, _ordered(arrays))),
        blocks * numbers["num_counters"],
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
    given, at_once = _programs_of_sums(size, itemsize, shared_memory, backward=True)
    tile = min(1024 // size, 256)
    programs, _ = stretches(processors, blocks, count, tile, at_once)
    channel_chunk = -(-arrays.channels // programs)
    channel_parts = -(-arrays.channels // channel_chunk)
    position_parts, stretch = cut(count // arrays.channels, tile, max(1, programs // channel_parts))
    programs = channel_parts * position_parts
    maps = map_programs(processors, blocks, count)
    numbers = _numbers(
        arrays,
        num_parts=programs,
        position_parts=position_parts,
        samples_per_part=stretch,
        channels_per_part=channel_chunk,
        map_parts=maps,
    )
    if has_parameters:
        numbers["gradient_rows"] = position_parts * (1 if numbers["block_channels"] else blocks)
        numbers["parameter_thread_blocks"] = -(-numbers["all_channels"] // _CHANNELS_AT_ONCE)
    all_maps = numbers["parameter_thread_blocks"] + blocks * maps
    kind = f"<{TYPES[arrays.dtype]}, {size}>"
    strides = {"x": arrays.strides, "dy": dy_strides, "result": _ordered(arrays)}
    return Pass(
        blocks,
        d,
        Launch("joined_gradient.cu", f"joined_gradient{kind}", blocks * programs, PRODUCT_THREADS, given),
        Launch("joined_maps.cu", f"input_gradient{kind}", all_maps, AFFINE_THREADS, map_memory(size, itemsize, 2)),
        _structure(numbers, **{name: _strides(arrays, each) for name, each in strides.items()}),
        blocks * numbers["num_counters"],
        blocks * (programs + 1) * (d * d + d) + 2 * numbers["gradient_rows"] * numbers["all_channels"],
    )


def _sizes(arrays: Arrays) -> tuple[int, int, int, int, int]:
    """Blocks, samples of each, variables, the variant's size, and bytes of a number of the statistics."""
    shape, block_axis = arrays.shape, arrays.block_axis
    itemsize = 8 if arrays.dtype == "d" else 4
    return shape[block_axis], shape[1 - block_axis] * shape[3], shape[2], variant(shape[2]), itemsize


def _memory_of_sums(size: int, itemsize: int, backward: bool) -> tuple[int, int]:
    """Bytes of shared memory that a program of the sums is given, and that it has in all."""
    given = newton_memory(size, itemsize, ADJOINT_MATRICES if backward else ROOT_MATRICES)
    static = GRADIENT_STATIC if backward else STATISTICS_STATIC
    return given, given + static[size] * 1024 * itemsize // 4


def _programs_of_sums(size: int, itemsize: int, shared_memory: int, backward: bool) -> tuple[int, int]:
    """Shared memory that a program of the sums is given, and how many a multiprocessor runs at once."""
    given, whole = _memory_of_sums(size, itemsize, backward)
    return given, min(2, (shared_memory + _RESERVED) // (whole + _RESERVED))


def _numbers(arrays: Arrays, num_parts: int, **others: int) -> dict[str, int]:
    """Those of pass.cuh but for strides; for weight and bias there are no programs and rows yet."""
    blocks, _, d, _, _ = _sizes(arrays)
    fan_in = num_parts if num_parts <= _ADDED_AT_ONCE else math.isqrt(num_parts - 1) + 1
    by_variable = arrays.block_axis == 1  # every block has channels of its own, which are its variables
    return {
        "blocks": blocks,
        "d": d,
        "outer": arrays.shape[1 - arrays.block_axis],
        "channels": arrays.channels,
        "positions": arrays.shape[3] // arrays.channels,
        "block_channels": d if by_variable else 0,
        "all_channels": d * (blocks if by_variable else arrays.channels),
        "num_parts": num_parts,
        "fan_in": fan_in,
        "num_counters": 1 + -(-num_parts // fan_in) if num_parts > 1 else 0,
        "parameter_thread_blocks": 0,
        "gradient_rows": 0,
        "half_weight": arrays.half_weight,
        "half_bias": arrays.half_bias,
        **others,
    }


def _structure(numbers: dict[str, int], **strides: tuple[int, ...]) -> Structure:
    structure = np.zeros(1, PASS)
    for name, value in (numbers | strides).items():
        structure[name] = value
    return structure


def _strides(arrays: Arrays, strides: Strides) -> tuple[int, ...]:
    """As pass.cuh has them, in elements."""
    itemsize = np.dtype(arrays.dtype).itemsize
    axes = (arrays.block_axis, 1 - arrays.block_axis, 2, 3)
    block, outer, variable, inner = (strides[axis] // itemsize for axis in axes)
    samples = inner if arrays.shape[3] > 1 else outer
    return block, outer, variable, inner, along_samples(arrays.shape, samples, variable)


def _ordered(arrays: Arrays) -> Strides:
    """Strides of a new array."""
    _, q, d, l = arrays.shape
    itemsize = np.dtype(arrays.dtype).itemsize
    return q * d * l * itemsize, d * l * itemsize, l * itemsize, itemsize
