"""Products of packed panels, which prefetch the next panels meanwhile."""

from numba import njit

from polywhiten.cpu.device.gemm_microkernel import (
    TILE_PAIR,
    Matrix,
    PrefetchList,
    StridedMatrix,
    blocks_per_tile,
    gemm_microkernel,
)
from polywhiten.cpu.device.pointers import at
from polywhiten.cpu.device.prefetch import list_lines
from polywhiten.cpu.tuning import PREFETCH_INTERVAL, TILE


@njit
def multiply_add(c, base, a, b, m, n, k, upper, panels, num_panels, addresses):
    """Compute C = base + A B of padded sizes; if `upper`, only the tiles on the diagonal and above it.

    The lines of the first `num_panels` panels are prefetched meanwhile; `addresses` has room for their list.
    """
    tiles = m // TILE * (n // TILE)
    if upper:
        tiles = (tiles + m // TILE) // 2
    end, per_interval = list_lines(addresses, tiles * intervals_per_tile(c.data, k), panels, num_panels)
    multiply_add_listed(c, base, a, b, m, n, k, upper, False, PrefetchList(addresses, 0, end, per_interval))


@njit
def multiply_add_listed(c, base, a, b, m, n, k, upper, nontemporal, prefetch):
    """Compute `multiply_add` with an existing prefetch list and optional non-temporal stores.

    Return the index in the list that the product has come to.
    """
    begin, intervals = prefetch.begin, intervals_per_tile(c.data, k)
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
                PrefetchList(prefetch.addresses, begin, prefetch.end, prefetch.per_interval),
            )
            begin += prefetch.per_interval * intervals * (columns // TILE)
    return begin


@njit
def intervals_per_tile(like, k):
    """Return how often a product of k steps prefetches while it computes TILE columns of a tile."""
    return blocks_per_tile(like) * ((k + PREFETCH_INTERVAL - 1) // PREFETCH_INTERVAL)
