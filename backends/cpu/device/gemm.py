"""Products of packed panels, which prefetch the next panels meanwhile."""

from typing import NamedTuple

from polywhiten.cpu.device.device_function import device_function
from polywhiten.cpu.device.gemm_microkernel import (
    TILE_PAIR,
    Matrix,
    StridedMatrix,
    blocks_per_tile,
    gemm_microkernel,
)
from polywhiten.cpu.device.pointers import at
from polywhiten.cpu.device.prefetch import PrefetchList, list_lines
from polywhiten.cpu.tuning import PREFETCH_INTERVAL, TILE


class Sizes(NamedTuple):
    """C is (m, n) and A is (m, k); all are multiples of a tile, but k of any size."""

    m: int
    n: int
    k: int


@device_function
def multiply_add(c, base, a, b, sizes, upper, prefetch):
    """Compute C = base + A B, prefetching panels meanwhile; if `upper`, only the tiles on and above the diagonal."""
    tiles = sizes.m // TILE * (sizes.n // TILE)
    if upper:
        tiles = (tiles + sizes.m // TILE) // 2
    prefetch_list = list_lines(prefetch, tiles * intervals_per_tile(c.data, sizes.k))
    multiply_add_listed(c, base, a, b, sizes, upper, False, prefetch_list)


@device_function
def multiply_add_listed(c, base, a, b, sizes, upper, nontemporal, prefetch_list):
    """Compute `multiply_add` with an existing prefetch list and optional non-temporal stores.

    Return the index in the list that the product has come to.
    """
    m, n, k = sizes
    begin, per_interval, intervals = prefetch_list.begin, prefetch_list.per_interval, intervals_per_tile(c.data, k)
    for left in range(0, n, TILE_PAIR):
        for i in range(0, min(m, left + TILE_PAIR) if upper else m, TILE):
            j = left + TILE if upper and i > left else left
            columns = min(n, left + TILE_PAIR) - j
            gemm_microkernel(
                Matrix(at(c.data, i * c.ld + j), c.ld),
                1.0,
                Matrix(at(base.data, i * base.ld + j), base.ld),
                1.0,
                StridedMatrix(at(a.data, i * a.row_stride), a.row_stride, a.column_stride),
                Matrix(at(b.data, j), b.ld),
                k,
                columns,
                nontemporal,
                PrefetchList(prefetch_list.addresses, begin, prefetch_list.end, per_interval),
            )
            begin += per_interval * intervals * (columns // TILE)
    return begin


@device_function
def intervals_per_tile(like, k):
    """Return how often a product of k steps prefetches while it computes TILE columns of a tile."""
    return blocks_per_tile(like) * ((k + PREFETCH_INTERVAL - 1) // PREFETCH_INTERVAL)
