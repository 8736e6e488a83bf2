"""The running averages of a layer, for kernels that take a step of theirs on the way."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
