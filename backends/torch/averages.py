"""The running averages of a layer, and how a batch updates them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polywhiten.torch import cpu


class RunningAverages(NamedTuple):
    """What a training step updates in place, unless an average would no longer be finite in its own dtype.

    Attributes
    ----------
    mean : Tensor, shape (C,)
    matrices : Tensor, shape (groups, d, d)
    batches : Tensor, shape (), or None
        Number of batches so far, an integer.
    momentum : float or None
        Weight of the newest batch. None takes the plain average of all batches, using their number.
    of_covariance : bool
        Whether the matrices are averages of covariances; else they are averages of whiteners. In both cases the batch's
        whiteners have to be finite.
    """

    mean: Tensor
    matrices: Tensor
    batches: Tensor | None
    momentum: float | None
    of_covariance: bool


def update_averages(
    averages: Sequence[Tensor],
    statistics: Sequence[Tensor],
    checked: Sequence[Tensor],
    count: Tensor | None,
    momentum: float | None,
) -> Tensor | bool:
    """Update running averages in place with a batch's statistics, and return whether they were updated.

    They are not if an average would no longer be finite in its own dtype, or if one of the `checked` statistics, which
    aren't averaged, isn't finite. If `momentum` is None, the average of all batches needs their count.
    """
    updated = cpu.update_averages(averages, statistics, checked, count, momentum)
    if updated is not None:
        return updated
    newest = []
    for running, batch in zip(averages, statistics, strict=True):
        if momentum is not None:
            factor: Any = momentum
        else:
            factor = 0.0 if count is None else 1 / (count + 1).to(batch.dtype)
        newest.append(torch.lerp(running.to(batch.dtype), batch, factor).to(running.dtype))
    finite = _are_finite(*checked, *newest)
    for running, new in zip(averages, newest, strict=True):
        running.copy_(torch.where(finite, new, running))
    if count is not None:
        count.add_(finite)
    return finite


def _are_finite(*tensors: Tensor) -> Tensor:
    """Return whether all elements of all tensors are finite, as a tensor."""
    largest: Tensor = reduce(torch.maximum, (torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors))
    return largest < math.inf
