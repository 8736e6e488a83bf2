"""The statistics that backward needs: which ones to save, and how to store half of a symmetric matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics
from polywhiten.torch._internals import can_bypass_autograd, is_transforming
from polywhiten.torch.cpu import recomputes_cheaply

_SMALL_FRACTION = 0.01  # of the input's elements, which are saved anyway


def saved_statistics(spec: WhiteningSpec, x: Tensor, stats: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the statistics to save for backward, which computes the others again.

    If recomputing is cheap, save only statistics that are small beside x, or half of the covariance if the full matrix
    is too large. Save everything if recomputing is expensive or needs communication, or if a compiler or transform
    decides what is saved.
    """
    if torch.compiler.is_compiling() or is_transforming() or spec.all_reduce is not None:
        return stats
    if not recomputes_cheaply(spec, x):
        return stats
    limit = _SMALL_FRACTION * x.numel()
    number = sum(size <= limit for size in accumulate(each.numel() for each in stats))
    if number > 1:
        return stats[:number]
    mean, cov, _ = stats
    fits = (cov.numel() + 3 * mean.numel()) / 2 <= limit
    if fits and can_bypass_autograd([cov]):  # a tracer's tensors can't be indexed by ordinary ones
        return mean, pack_upper(cov)
    return ()  # the mean alone saves no work


def restored_statistics(saved: Sequence[Tensor]) -> Statistics:
    """Return the saved statistics, and None for the others."""
    unpacked = list(saved)
    if len(saved) == 2 and saved[1].ndim == 2:
        unpacked[1] = unpack_upper(saved[1])
    return Statistics(*unpacked, *[None] * (3 - len(saved)))


def pack_upper(cov: Tensor) -> Tensor:
    """Return the upper triangles (blocks, d (d + 1) / 2) of symmetric matrices (blocks, d, d)."""
    upper, _ = _triangle(cov.shape[-1])
    return cov.reshape(len(cov), -1).index_select(1, upper)


def unpack_upper(packed: Tensor) -> Tensor:
    """Return the symmetric matrices (blocks, d, d) of upper triangles (blocks, d (d + 1) / 2)."""
    d = math.isqrt(2 * packed.shape[1])
    _, positions = _triangle(d)
    return packed.index_select(1, positions).reshape(-1, d, d)


@lru_cache(maxsize=8)
def _triangle(d: int) -> tuple[Tensor, Tensor]:
    """Return the flat indices of an upper triangle, and for every element of the matrix its position among these."""
    options: dict[str, Any] = {"dtype": torch.int32, "device": "cpu"}  # whatever the default device is
    rows, columns = torch.triu_indices(d, d, **options)
    positions = torch.empty(d, d, **options)
    positions[rows, columns] = positions[columns, rows] = torch.arange(len(rows), **options)
    return rows * d + columns, positions.reshape(-1)
