"""IterNorm with weight and bias: four launches forward, and four backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from polywhiten.kernels import Term
from polywhiten.statistics import Statistics
from polywhiten.torch.triton.affine_map import affine_map
from polywhiten.torch.triton.moments import cross_moments, moments
from polywhiten.torch.triton.newton import inverse_sqrt, inverse_sqrt_adjoint


class WholeIterNorm(NamedTuple):
    """Forward and backward of (p, blocks, d, l)."""

    x: Tensor
    eps: float
    iterations: int

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """As `polywhiten.reference.Reference.forward`."""
        mean, cov = moments(self.x, 1)
        stats = Statistics(mean, cov, inverse_sqrt(cov, self.eps, self.iterations))
        scale, shift = (_by_block(values, mean) for values in (weight, bias))
        return affine_map([Term(stats.whitener, self.x, mean)], shift, 1, self.x.dtype, scale=scale), stats

    def backward(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `polywhiten.reference.Reference.backward`, of dy in the shape of x."""
        x, mean = self.x, stats.mean
        scale = _by_block(weight, mean)
        crossed = cross_moments(dy, x, mean, 1, scale, stats.whitener)
        samples = x.shape[0] * x.shape[3]
        b = inverse_sqrt_adjoint(stats.covariance, crossed.k, self.eps, self.iterations, samples)
        matrix = stats.whitener if crossed.matrix is None else crossed.matrix
        terms = [Term(matrix.mT, dy, crossed.s_per_sample), Term(b, x, mean)]
        dx = affine_map(terms, None, 1, x.dtype)
        return dx, _of_channels(crossed.weight_gradient, weight), _of_channels(crossed.s, bias)


def _by_block(values: Tensor | None, mean: Tensor) -> Tensor | None:
    return None if values is None else values.reshape(mean.shape)


def _of_channels(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else gradient.reshape(-1).to(parameter.dtype)
