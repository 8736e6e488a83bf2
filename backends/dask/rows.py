"""Moments and whitening of the rows of Dask arrays: every chunk is left to the backend of its own library."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from dask.delayed import Delayed, delayed

from polywhiten._types import Array
from polywhiten.dispatch import backend_of
from polywhiten.moments import Float64, Moments
from polywhiten.rows import RowInput, RowMap


def moment_tasks(x: Array, weights: Float64 | None, read: RowInput, fourth: bool) -> list[Delayed]:
    """Return one task for each chunk of rows, which computes the moments of the chunk.

    Chunks of fewer rows than columns are smaller than their moments; they are joined if their sizes are known.
    """
    dimension = x.shape[1]
    x = x.rechunk({0: 4 * dimension, 1: -1} if max(x.chunks[0]) < dimension else {1: -1})
    task = delayed(_chunk_moments, pure=False, traverse=False)
    chunks, parts = x.to_delayed()[:, 0], _parts_of_weights(weights, x)
    return [
        task(chunk, part, replace(read, first_row=first), fourth)
        for chunk, part, first in zip(chunks, parts, _first_rows(x), strict=True)
    ]


def map_chunks(x: Array, row_map: RowMap, read: RowInput) -> Array:
    """Return the lazy outputs of a map for rows, in the chunks of x and of their library."""
    x = x.rechunk({1: -1})
    empty = x._meta.reshape((0, x.shape[1]))
    return x.map_blocks(
        _map_chunk,
        row_map=delayed(row_map, pure=True, traverse=False),  # one task, which a worker fetches once for all chunks
        read=read,
        chunks=(x.chunks[0], (len(row_map.matrix),)),
        meta=backend_of(empty).map_rows(empty, row_map, read),
    )


def _first_rows(x: Array) -> list[int]:
    """Return the number of the first row of every chunk, or 0 if it isn't known before the chunks are computed."""
    return [0 if math.isnan(first) else int(first) for first in accumulate(x.chunks[0][:-1], initial=0)]


def _parts_of_weights(weights: Float64 | None, x: Array) -> list[Float64 | None]:
    """Return the weights of the rows of every chunk."""
    if weights is None:
        return [None] * x.numblocks[0]
    return [weights[first:last] for first, last in pairwise([*_first_rows(x), len(weights)])]


def _chunk_moments(rows: Array, weights: Float64 | None, read: RowInput, fourth: bool) -> Moments:
    return backend_of(rows).moments(rows, weights, read, fourth=fourth)


def _map_chunk(rows: Array, row_map: RowMap, read: RowInput, block_info: Any = None) -> Array:
    first = block_info[0]["array-location"][0][0]
    return backend_of(rows).map_rows(rows, row_map, replace(read, first_row=0 if math.isnan(first) else int(first)))
