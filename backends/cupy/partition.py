"""How many thread blocks share a block of the array, and which samples each of them takes: its part."""

from __future__ import annotations

from polywhiten.cupy.variants import MAP_TILE


def sum_parts(multiprocessors: int, blocks: int, count: int, tile: int, resident: int = 2) -> tuple[int, int]:
    """Return the number of parts of a block's `count` samples for sums, and the samples of each part.

    A part has at least 8 tiles if there are so many, because combining the parts takes time too.
    """
    return split_evenly(count, tile, parts_per_block(multiprocessors, blocks, -(-count // (8 * tile)), resident))


def map_parts(multiprocessors: int, blocks: int, count: int, resident: int = 3) -> int:
    """Return the number of parts of a block's `count` samples for an affine map."""
    return parts_per_block(multiprocessors, blocks, -(-count // MAP_TILE), resident)


def parts_per_block(multiprocessors: int, blocks: int, most: int, resident: int) -> int:
    """Return the number of parts for each block, at most `most`, if `resident` thread blocks fit a multiprocessor.

    There are as many parts as run at once if these are at least four for each block. Otherwise there are four times as
    many, because the last round of thread blocks may leave most multiprocessors idle.
    """
    at_once = multiprocessors * resident
    rounds = 1 if 4 * blocks <= at_once else 4
    return max(1, min(most, rounds * at_once // blocks))


def split_evenly(count: int, tile: int, parts: int) -> tuple[int, int]:
    """Return a number of parts, at most `parts`, and the samples of each, which are a multiple of the tile."""
    samples = -(-count // (parts * tile)) * tile
    return -(-count // samples), samples
