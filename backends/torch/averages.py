"""The running averages of a layer, and a step of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polywhiten.torch import cpu


class RunningAverages(NamedTuple):
    """What a training step changes in place, unless an average in its own dtype would then not be finite any more.

    Attributes
    ----------
    mean : Tensor, shape (C,)
    matrices : Tensor, shape (groups, d, d)
    batches : Tensor, shape (), or None
        How many there have been, an integer.
    momentum : float or None
        Weight of the newest batch; None for the plain average of all batches, by their number.
    of_covariance : bool
        Whether the matrices average covariances; else whiteners. The whiteners of the batch have to be finite too.
    """

    mean: Tensor
    matrices: Tensor
    batches: Tensor | None
    momentum: float | None
    of_covariance: bool


def update_averages(
    averages: Sequence[Tensor],
    statistics: Sequence[Tensor],
    judged: Sequence[Tensor],
    count: Tensor | None,
    momentum: float | None,
) -> Tensor | bool:
    """Update running averages in place by a batch's statistics, and return whether that was done.

    It isn't if an average in its own dtype would then not be finite any more, or if one of `judged`, other statistics,
    isn't finite. The plain average of all batches, for `momentum` None, needs their count.
    """
    compiled = cpu.update_averages(averages, statistics, judged, count, momentum)
    if compiled is not None:
        return compiled
    newest = []
    for running, batch in zip(averages, statistics, strict=True):
        if momentum is not None:
            factor: Any = momentum
        else:
            factor = 0.0 if count is None else 1 / (count + 1).to(batch.dtype)
        newest.append(torch.lerp(running.to(batch.dtype), batch, factor).to(running.dtype))
    finite = _are_finite(*judged, *newest)
    for running, new in zip(averages, newest, strict=True):
        running.copy_(torch.where(finite, new, running))
    if count is not None:
        count.add_(finite)
    return finite


def _are_finite(*tensors: Tensor) -> Tensor:
    """Return whether all numbers of all tensors are finite, as a tensor."""
    largest = reduce(torch.maximum, (torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors))
    result: Tensor = largest < math.inf
    return result
