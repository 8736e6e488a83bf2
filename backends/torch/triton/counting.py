"""The last program to finish its part adds up the parts of all: no launch of its own, and nobody waits.

Every block has a counter in memory for its parts, and where these are many one for each cluster of them: the last of a
cluster adds up the cluster, the last cluster all clusters. The order of the summands is fixed, so results don't depend
on which program is the last one. Who is last sets the counter back to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 8  # parts that one program adds up about as fast as two programs do one after the other
_CLUSTER = 16  # parts: a large GPU's programs make some 20 clusters


class Clusters(NamedTuple):
    """How the parts of a block are added up.

    `levels` is 0 for one part, which is the sum; 1 where one program adds all parts; 2 with clusters in between.
    """

    levels: int
    size: int  # parts of a cluster
    slots: int  # that hold sums of parts and of clusters
    counters: int

    @classmethod
    def of(cls, parts: int) -> Clusters:
        if parts == 1:
            return cls(0, 1, 0, 0)
        if parts <= _FEW:
            return cls(1, parts, parts, 1)
        size = max(_CLUSTER, triton.cdiv(parts, 2 * _CLUSTER))
        clusters = triton.cdiv(parts, size)
        return cls(2, size, parts + clusters, 1 + clusters)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, stream: int, number: int, rank: int) -> Tensor | None:
    """So many counters, all 0, that no kernel on another stream uses; None for none.

    Those of a graph belong to it, as its kernels may run on any stream. In what PyTorch compiles they have `rank` more
    dimensions, as it takes zeros of one shape for the same ones.
    """
    if number == 0:
        return None
    if torch.compiler.is_compiling():
        return torch.zeros((1,) * rank + (number,), dtype=torch.int32, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(number, dtype=torch.int32, device=device)
    kept = _counters.get((device, stream))
    if kept is None or kept.numel() < number:
        kept = torch.zeros(max(1024, triton.next_power_of_2(number)), dtype=torch.int32, device=device)
        _counters[device, stream] = kept
    return kept


@triton.jit
def is_last(counter, programs):
    # whether all others have passed here; what they stored before can then be loaded
    tl.debug_barrier()  # the count of one thread stands for the stores of all
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def store_slot(slots, number, vector, matrix, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    slot = slots + number * (HEIGHT * HEIGHT + HEIGHT)
    tl.store(slot + rows[:, None] * HEIGHT + rows[None, :], matrix)
    tl.store(slot + HEIGHT * HEIGHT + rows, vector)


@triton.jit
def add_slots(slots, first, end, HEIGHT: tl.constexpr):
    rows = tl.arange(0, HEIGHT)
    vector = tl.zeros((HEIGHT,), tl.float32)
    matrix = tl.zeros((HEIGHT, HEIGHT), tl.float32)
    for number in range(first, end):
        slot = slots + number * (HEIGHT * HEIGHT + HEIGHT)
        matrix += tl.load(slot + rows[:, None] * HEIGHT + rows[None, :])
        vector += tl.load(slot + HEIGHT * HEIGHT + rows)
    return vector, matrix


@triton.jit
def gathered(vector, matrix, slots, counters, part, parts, cluster, LEVELS: tl.constexpr, HEIGHT: tl.constexpr):
    # sums over all parts of a block, complete in the program for which the third value is true. The block's counters
    # are as many as its clusters and one; there are none, nor slots, where LEVELS is 0.
    if LEVELS == 0:
        last = part == 0
    else:
        store_slot(slots, part, vector, matrix, HEIGHT)
        if LEVELS == 1:
            last = is_last(counters, parts)
            if last:
                vector, matrix = add_slots(slots, 0, parts, HEIGHT)
        else:
            number = part // cluster
            first, end = number * cluster, tl.minimum(parts, (number + 1) * cluster)
            last = is_last(counters + 1 + number, end - first)
            if last:
                vector, matrix = add_slots(slots, first, end, HEIGHT)
                store_slot(slots, parts + number, vector, matrix, HEIGHT)
                clusters = tl.cdiv(parts, cluster)
                last = is_last(counters, clusters)
                if last:
                    vector, matrix = add_slots(slots, parts, parts + clusters, HEIGHT)
    return vector, matrix, last
