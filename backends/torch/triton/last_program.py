"""How the last program to finish adds up the partial sums of all: without another launch, and without waiting.

Every block has a counter in memory for its parts. If there are many parts, every cluster of them has one too: the last
program of a cluster adds up the cluster, and the last cluster's program adds up all clusters. The order of the summands
is fixed, so results don't depend on which program is the last. That program resets the counter to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from polywhiten.torch.triton.tiles import ceil_div

_MAX_PARTS_WITHOUT_CLUSTERS = 8  # one program adds up so many about as fast as two programs in succession
_MIN_CLUSTER_SIZE = 16  # the parts that fill a large GPU make some 20 clusters


class Clusters(NamedTuple):
    """How the parts of a block are added up.

    Attributes
    ----------
    levels : int
        0 for a single part, 1 if one program adds up all parts, and 2 if clusters of parts are added up before.
    cluster_size : int
        The number of parts of a cluster.
    num_slots : int
        The number of sums, of parts and of clusters, that memory has to hold.
    num_counters : int
    """

    levels: int
    cluster_size: int
    num_slots: int
    num_counters: int

    @classmethod
    def of(cls, num_parts: int) -> Clusters:
        if num_parts == 1:
            return cls(0, 1, 0, 0)
        if num_parts <= _MAX_PARTS_WITHOUT_CLUSTERS:
            return cls(1, num_parts, num_parts, 1)
        cluster_size = max(_MIN_CLUSTER_SIZE, ceil_div(num_parts, 2 * _MIN_CLUSTER_SIZE))
        num_clusters = ceil_div(num_parts, cluster_size)
        return cls(2, cluster_size, num_parts + num_clusters, 1 + num_clusters)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def get_counters(device: torch.device, stream: int, number: int, rank: int) -> Tensor | None:
    """Return counters, all 0, that no kernel on another stream uses; None for none.

    A CUDA graph has counters of its own, because its kernels may run on any stream. While PyTorch compiles, counters
    have `rank` more dimensions, because it would merge tensors of zeros of the same shape.
    """
    if number == 0:
        return None
    if torch.compiler.is_compiling():
        return torch.zeros((1,) * rank + (number,), dtype=torch.int32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(number, dtype=torch.int32, device=device)
    counters = _counters.get((device, stream))
    if counters is None or counters.numel() < number:
        counters = torch.zeros(max(1024, triton.next_power_of_2(number)), dtype=torch.int32, device=device)
        _counters[device, stream] = counters
    return counters


@triton.jit
def is_last_program(counter, num_programs):
    # Return whether all other programs have called this. If so, what they stored before can be loaded.
    tl.debug_barrier()  # one thread counts for all of its program, whose stores have to come before
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_programs - 1
    if is_last:
        tl.store(counter, 0)
    return is_last


@triton.jit
def _store_slot(slots, slot, vector, matrix, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    pointer = slots + slot * (HEIGHT * HEIGHT + HEIGHT)
    tl.store(pointer + rows[:, None] * HEIGHT + rows[None, :], matrix)
    tl.store(pointer + HEIGHT * HEIGHT + rows, vector)


@triton.jit
def _add_slots(slots, first, end, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    vector = tl.zeros((HEIGHT,), tl.float32)
    matrix = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for slot in range(first, end):
        pointer = slots + slot * (HEIGHT * HEIGHT + HEIGHT)
        matrix += tl.load(pointer + rows[:, None] * HEIGHT + rows[None, :])
        vector += tl.load(pointer + HEIGHT * HEIGHT + rows)
    return vector, matrix


@triton.jit
def combine_parts(
    vector, matrix, slots, counters, part, num_parts, cluster_size,
    LEVELS: tl.constexpr, OTHER_PROGRAMS: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    # Return the sums over all parts of a block, and whether this is the program that has them. The block has one
    # counter and one for each of its clusters; with LEVELS 0 it has neither counters nor slots. OTHER_PROGRAMS of the
    # block have no part of it, which is negative then, but the last program needs what they have stored.
    if LEVELS == 0:
        is_last = part == 0
    else:
        arrives = part < num_parts  # always
        first_slot, num_slots = 0, num_parts
        if part >= 0:
            _store_slot(slots, part, vector, matrix, HEIGHT)
        if LEVELS == 2:
            first_slot, num_slots = num_parts, tl.cdiv(num_parts, cluster_size)
            if part >= 0:
                cluster = part // cluster_size
                first, end = cluster * cluster_size, tl.minimum(num_parts, (cluster + 1) * cluster_size)
                arrives = is_last_program(counters + 1 + cluster, end - first)
                if arrives:
                    vector, matrix = _add_slots(slots, first, end, HEIGHT)
                    _store_slot(slots, num_parts + cluster, vector, matrix, HEIGHT)
        is_last = part >= num_parts  # never
        if arrives:
            is_last = is_last_program(counters, num_slots + OTHER_PROGRAMS)
            if is_last:
                vector, matrix = _add_slots(slots, first_slot, first_slot + num_slots, HEIGHT)
    return vector, matrix, is_last
