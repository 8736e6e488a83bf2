"""The mean and covariance of all samples that a layer has seen, from those of one batch after the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from polywhiten.kernels import outer_square


class StreamingMoments:
    """Mean and covariance of groups of d channels, merged from batches by the formula of Chan, Golub and LeVeque.

    They are kept in double precision if the device has it. A batch whose statistics aren't finite is counted, and
    otherwise left out. Nothing here waits for the device.

    Parameters
    ----------
    mean : Tensor, shape (C,)
        Has the number of channels and the device.
    matrices : Tensor, shape (groups, d, d)
        Has the size of the groups.

    Attributes
    ----------
    covariance : Tensor, shape (groups, d, d)
        Divided by the number of samples. If the last group is smaller, the identity fills the rest.
    count, batches, left_out : Tensor, shape ()
        Number of samples, of the batches that have them, and of the batches that were left out.
    """

    def __init__(self, mean: Tensor, matrices: Tensor) -> None:
        device = mean.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no other
        self._channels = len(mean)
        self._mean = torch.zeros(matrices.shape[:2], dtype=dtype, device=device)
        self.covariance = torch.zeros(matrices.shape, dtype=dtype, device=device)
        self.count = torch.zeros((), dtype=dtype, device=device)
        self.batches, self.left_out = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))

    @property
    def mean(self) -> Tensor:
        """The mean of all samples, shape (C,)."""
        return self._mean.flatten()[: self._channels]

    def add(self, count: Tensor, mean: Tensor, covariance: Tensor, whitener: Tensor) -> Tensor:
        """Add a batch of `count` samples, and return whether its statistics are finite, its whitener too."""
        finite = torch.stack([torch.isfinite(values).all() for values in (mean, covariance, whitener)]).all()
        added = torch.where(finite, count.to(self.count), 0)
        self.count += added
        weight = added / self.count.clamp(min=1)
        mean = pad(mean.to(self._mean), (0, self._mean.numel() - len(mean))).reshape(self._mean.shape)
        difference = torch.where(finite, mean - self._mean, 0)
        self.covariance += weight * torch.where(finite, covariance.to(self.covariance) - self.covariance, 0)
        self.covariance += (weight * (1 - weight)) * outer_square(difference)
        self._mean += weight * difference
        self.batches += added > 0
        self.left_out += ~finite
        return finite
