"""The launches of a joined pass, forward or backward, computed once for all arrays of a shape, strides and dtype."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from polywhiten.cupy.partition import map_parts, split_evenly, sum_parts
from polywhiten.cupy.variants import (
    ADJOINT_MATRICES,
    MAP_THREADS,
    PRODUCT_THREADS,
    ROOT_MATRICES,
    SIZES,
    STATIC_BYTES,
    TYPES,
    along_samples,
    map_bytes,
    newton_bytes,
    variant_size,
)

# The structures in pass.cuh, with the same fields.
_STRIDES = np.dtype([(name, np.int64) for name in ("block", "outer", "variable", "inner", "along_samples")])
_COUNTS = (
    *("blocks", "d", "outer", "channels", "positions", "block_channels", "all_channels"),
    *("num_parts", "fan_in", "num_counters", "channels_per_part", "position_parts", "samples_per_part"),
    *("map_parts", "parameter_thread_blocks", "gradient_rows"),
)
PASS_ARGS = np.dtype([*((name, _STRIDES) for name in ("x", "dy", "result")), *((name, np.int64) for name in _COUNTS)])

# Bounds in KiB of the static shared memory of the sums, by the item size of statistics and the variant's size.
STATISTICS_STATIC = {4: {4: 14, 16: 15, 32: 19, 64: 36}, 8: {4: 28, 16: 30, 32: 26, 64: 24}}
GRADIENT_STATIC = {4: {4: 26, 16: 14, 32: 18, 64: 35}, 8: {4: 52, 16: 28, 32: 24, 64: 22}}
_RESERVED_BYTES = 1024  # of each thread block, beside its own shared memory
_MAX_FLAT_PARTS = 16  # that one level of the tree adds up
_CHANNELS_PER_THREAD_BLOCK = 32  # of those that complete the gradients of weight and bias

Strides = tuple[int, int, int, int]
Structure = np.ndarray[tuple[int, ...], np.dtype[np.void]]  # with one element, which CuPy passes by value


class Arrays(NamedTuple):
    """The properties of x (p, q, d, l) that a pass depends on."""

    block_axis: int
    channels: int  # of each variable
    shape: tuple[int, int, int, int]
    strides: Strides  # in bytes
    dtype: str  # NumPy's letter


class Launch(NamedTuple):
    """Everything about a launch except its arguments."""

    file: str
    name: str
    thread_blocks: int
    threads: int
    shared: int


class Pass(NamedTuple):
    """A forward or backward pass: a launch that sums over the samples, and one that maps them."""

    blocks: int
    d: int
    sums: Launch
    maps: Launch
    args: Structure  # of both launches
    num_counters: int
    workspace: int  # elements


@lru_cache(maxsize=1024)
def needed_shared_memory(d: int, itemsize: int, backward: bool) -> int:
    """Return the most shared memory that a thread block of a pass has, for statistics of this item size."""
    size = variant_size(d)
    return max(_sum_bytes(size, itemsize, backward)[1], map_bytes(size, itemsize, 1 + backward) + STATIC_BYTES)


@lru_cache(maxsize=1024)
def forward_pass(arrays: Arrays, multiprocessors: int, max_shared_memory: int) -> Pass:
    """Return the launches that compute the statistics and map x."""
    blocks, count, d, size, itemsize = _sizes(arrays)
    shared, resident = _sum_residency(size, itemsize, max_shared_memory, backward=False)
    num_parts, samples_per_part = sum_parts(multiprocessors, blocks, count, min(2048 // size, 256), resident)
    maps = map_parts(multiprocessors, blocks, count, _map_residency(size))
    counts = _counts(
        arrays,
        num_parts=num_parts,
        position_parts=num_parts,
        samples_per_part=samples_per_part,
        channels_per_part=1,
        map_parts=maps,
    )
    variant = f"<{TYPES[arrays.dtype]}, {size}>"
    return Pass(
        blocks=blocks,
        d=d,
        sums=Launch("joined_statistics.cu", f"joined_statistics{variant}", blocks * num_parts, PRODUCT_THREADS, shared),
        maps=Launch("joined_maps.cu", f"whiten{variant}", blocks * maps, MAP_THREADS, map_bytes(size, itemsize, 1)),
        args=_structure(counts, x=_strides(arrays, arrays.strides), result=_strides(arrays, _dense_strides(arrays))),
        num_counters=blocks * counts["num_counters"],
        workspace=blocks * num_parts * (d * d + d),
    )


@lru_cache(maxsize=1024)
def backward_pass(
    arrays: Arrays,
    dy_strides: Strides,
    has_parameters: bool,
    newton_steps: int,
    multiprocessors: int,
    max_shared_memory: int,
) -> Pass:
    """Return the launches that compute the cross moments and map dy and x.

    With a weight or a bias the channels of a variable are summed one by one. Otherwise they count as one channel.
    """
    if not has_parameters:
        arrays = arrays._replace(channels=1)
    blocks, count, d, size, itemsize = _sizes(arrays)
    shared, resident = _sum_residency(size, itemsize, max_shared_memory, backward=True)
    tile = min(1024 // size, 256)
    wanted_parts, _ = sum_parts(multiprocessors, blocks, count, tile, resident)
    keeps_iterates = size == SIZES[-1] and itemsize == 4
    at_once = multiprocessors * resident // blocks  # thread blocks for each block
    iterates_apart = keeps_iterates and at_once >= 4
    if iterates_apart:
        wanted_parts = min(wanted_parts, at_once - 1)
    channels_per_part = -(-arrays.channels // wanted_parts)
    channel_parts = -(-arrays.channels // channels_per_part)
    position_parts, samples_per_part = split_evenly(
        count // arrays.channels, tile, max(1, wanted_parts // channel_parts)
    )
    num_parts = channel_parts * position_parts + iterates_apart
    maps = map_parts(multiprocessors, blocks, count, _map_residency(size))
    counts = _counts(
        arrays,
        num_parts=num_parts,
        position_parts=position_parts,
        samples_per_part=samples_per_part,
        channels_per_part=channels_per_part,
        map_parts=maps,
    )
    if has_parameters:
        counts["gradient_rows"] = position_parts * (1 if counts["block_channels"] else blocks)
        counts["parameter_thread_blocks"] = -(-counts["all_channels"] // _CHANNELS_PER_THREAD_BLOCK)
    map_thread_blocks = counts["parameter_thread_blocks"] + blocks * maps
    variant = f"<{TYPES[arrays.dtype]}, {size}>"
    strides = {"x": arrays.strides, "dy": dy_strides, "result": _dense_strides(arrays)}
    iterates = 2 * newton_steps * size**2 if keeps_iterates else 0  # two matrices a step
    return Pass(
        blocks=blocks,
        d=d,
        sums=Launch("joined_gradient.cu", f"joined_gradient{variant}", blocks * num_parts, PRODUCT_THREADS, shared),
        maps=Launch(
            "joined_maps.cu",
            f"input_gradient{variant}",
            map_thread_blocks,
            MAP_THREADS,
            map_bytes(size, itemsize, 2),
        ),
        args=_structure(counts, **{name: _strides(arrays, values) for name, values in strides.items()}),
        num_counters=blocks * counts["num_counters"],
        workspace=blocks * ((num_parts + 1) * (d * d + d) + iterates)
        + 2 * counts["gradient_rows"] * counts["all_channels"],
    )


def _sizes(arrays: Arrays) -> tuple[int, int, int, int, int]:
    """Return the blocks, samples of each, variables, the variant's size, and the item size of statistics."""
    shape, block_axis = arrays.shape, arrays.block_axis
    itemsize = 8 if arrays.dtype == "d" else 4
    return shape[block_axis], shape[1 - block_axis] * shape[3], shape[2], variant_size(shape[2]), itemsize


def _sum_bytes(size: int, itemsize: int, backward: bool) -> tuple[int, int]:
    """Return the dynamic shared memory of a thread block of the sums, and all of its shared memory."""
    dynamic = newton_bytes(size, itemsize, ADJOINT_MATRICES if backward else ROOT_MATRICES)
    static = GRADIENT_STATIC if backward else STATISTICS_STATIC
    return dynamic, dynamic + static[itemsize][size] * 1024


def _sum_residency(size: int, itemsize: int, max_shared_memory: int, backward: bool) -> tuple[int, int]:
    """Return the dynamic shared memory of the sums, and how many thread blocks of them fit a multiprocessor."""
    dynamic, total = _sum_bytes(size, itemsize, backward)
    most = 1 if size == SIZES[-1] and itemsize == 4 else 2  # as registers allow
    return dynamic, min(most, (max_shared_memory + _RESERVED_BYTES) // (total + _RESERVED_BYTES))


def _map_residency(size: int) -> int:
    """Return how many thread blocks of a map fit a multiprocessor, as registers allow."""
    return 2 if size == SIZES[-1] else 3


def _counts(arrays: Arrays, num_parts: int, **others: int) -> dict[str, int]:
    """Return the fields of PASS_ARGS that aren't strides, without thread blocks and rows for weight and bias."""
    blocks, _, d, _, _ = _sizes(arrays)
    fan_in = num_parts if num_parts <= _MAX_FLAT_PARTS else math.isqrt(num_parts - 1) + 1
    variables_are_channels = arrays.block_axis == 1  # so that each block has channels of its own
    return {
        "blocks": blocks,
        "d": d,
        "outer": arrays.shape[1 - arrays.block_axis],
        "channels": arrays.channels,
        "positions": arrays.shape[3] // arrays.channels,
        "block_channels": d if variables_are_channels else 0,
        "all_channels": d * (blocks if variables_are_channels else arrays.channels),
        "num_parts": num_parts,
        "fan_in": fan_in,
        "num_counters": 1 + -(-num_parts // fan_in) if num_parts > 1 else 0,
        "parameter_thread_blocks": 0,
        "gradient_rows": 0,
        **others,
    }


def _structure(counts: dict[str, int], **strides: tuple[int, ...]) -> Structure:
    structure = np.zeros(1, PASS_ARGS)
    for name, value in (counts | strides).items():
        structure[name] = value
    return structure


def _strides(arrays: Arrays, strides: Strides) -> tuple[int, ...]:
    """Return the fields of a `Strides` in pass.cuh."""
    itemsize = np.dtype(arrays.dtype).itemsize
    axes = (arrays.block_axis, 1 - arrays.block_axis, 2, 3)
    block, outer, variable, inner = (strides[axis] // itemsize for axis in axes)
    between_samples = inner if arrays.shape[3] > 1 else outer
    return block, outer, variable, inner, along_samples(arrays.shape, between_samples, variable)


def _dense_strides(arrays: Arrays) -> Strides:
    """Return the strides of a new array of the same shape."""
    _, q, d, l = arrays.shape
    itemsize = np.dtype(arrays.dtype).itemsize
    return q * d * l * itemsize, d * l * itemsize, l * itemsize, itemsize
