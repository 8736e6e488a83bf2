"""Group whitening with its weight and bias, each pass done to a sample while it is in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polywhiten.blocks import SampleGroups
from polywhiten.kernels import Term, outer_square
from polywhiten.torch.cpu.pieces import pieces, workspace
from polywhiten.torch.kernels import TorchKernels, folded
from polywhiten.whitening import Plan, Statistics

_FEWEST, _FEWEST_LAST = 32, 128  # positions, with channels first and with channels last


class WholeGroupWhitening:
    """Of a tensor x, seen as (N, q, g, c, l): q positions before the channels, l after them.

    Each of a group's c channels has a product of its own, (g, g) times (g, positions): a size that products are fast
    for, and weight and bias are then parts of the matrices. Pieces are copied to (n, c, g, positions) for that.
    """

    @classmethod
    def of(cls, kernels: TorchKernels, plan: Plan, blocks: SampleGroups, x: Tensor) -> WholeGroupWhitening | None:
        """None where the positions are too few for it."""
        before, after = math.prod(x.shape[1 : blocks.axis]), math.prod(x.shape[blocks.axis + 1 :])
        fewest = max(blocks.num_groups, _FEWEST if before == 1 else _FEWEST_LAST)
        return cls(kernels, plan, blocks.num_groups, x, before, after) if before * after >= fewest else None

    def __init__(self, kernels: TorchKernels, plan: Plan, groups: int, x: Tensor, before: int, after: int) -> None:
        self._kernels, self._plan = kernels, plan
        self._x = x.reshape(len(x), before, groups, -1, after)
        self._parts = list(pieces(self._x))
        self._count = self._x.numel() // (len(x) * groups)
        self._dtype = kernels.statistics_dtype(x.dtype)

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """Y as (N, q, g, c, l), and the statistics."""
        n, _, g, _, _ = self._x.shape
        mean = self._x.new_empty(n, g, dtype=self._dtype)
        cov = mean.new_empty(n, g, g)
        for part in self._parts:
            x = self._copied(self._x, part, "x")
            torch.mean(x, (1, 3), out=mean[part])
            x -= mean[part][:, None, :, None]
            lost = x.mean((1, 3))  # by the sum over many samples
            mean[part] += lost
            torch.div(_products(x, x).sum(1), self._count, out=cov[part]).sub_(outer_square(lost))
        whitener = self._kernels.inverse_sqrt(self._plan.solver, cov, self._plan.eps)
        scale, shift = self._per_channel(weight), self._per_channel(bias)
        y = torch.empty_like(self._x)
        for part in self._parts:
            x = self._copied(self._x, part, "x")
            x -= mean[part][:, None, :, None]
            result = workspace("result", x.shape, self._dtype)
            result.copy_(mean.new_zeros(()) if shift is None else shift)
            _add_products(result, self._scaled(whitener[part], scale), x)
            self._put(y, part, result)
        return y, Statistics(mean, cov, whitener)

    def backward(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x as (N, q, g, c, l), of weight and of bias."""
        mean, cov, whitener = stats
        dy, scale = dy.reshape(self._x.shape), self._per_channel(weight)
        sums, products = torch.empty_like(mean), torch.empty_like(cov)
        dweight, dbias = mean.new_zeros(()), mean.new_zeros(())
        for part in self._parts:
            gradient, x = self._copied(dy, part, "dy"), self._copied(self._x, part, "x")
            x -= mean[part][:, None, :, None]
            s, k = gradient.sum(3, keepdim=True), _products(gradient, x)  # of every channel
            dbias = dbias + s.sum(0)
            if scale is not None:
                dweight = dweight + (k * whitener[part].unsqueeze(1)).sum((0, 3))
                s, k = s * scale, k * scale
            torch.sum(s.squeeze(3), 1, out=sums[part])
            torch.sum(k, 1, out=products[part])
        ds = self._kernels.inverse_sqrt_adjoint(self._plan.solver, cov, products, self._plan.eps)
        b = (ds + ds.mT) / self._count
        offset = folded([Term(whitener.mT, dy, sums / self._count), Term(b, self._x, mean)], None)
        dx = torch.empty_like(self._x)
        for part in self._parts:
            gradient, x = self._copied(dy, part, "dy"), self._copied(self._x, part, "x")
            result = workspace("result", x.shape, self._dtype)
            result.copy_(offset[part].unsqueeze(1))
            _add_products(result, self._scaled(whitener[part], scale).mT, gradient)
            _add_products(result, self._scaled(b[part], None), x)
            self._put(dx, part, result)
        return dx, _like(dweight, weight), _like(dbias, bias)

    def _copied(self, array: Tensor, part: slice, name: str) -> Tensor:
        """A piece as (n, c, g, positions), in the workspace of that name."""
        piece = array[part].permute(0, 3, 2, 1, 4)
        return workspace(name, piece.shape, self._dtype).copy_(piece).flatten(3)

    def _put(self, array: Tensor, part: slice, result: Tensor) -> None:
        piece = array[part].permute(0, 3, 2, 1, 4)
        piece.copy_(result.view(piece.shape))

    def _per_channel(self, values: Tensor | None) -> Tensor | None:
        """(C,) as (c, g, 1)."""
        _, _, g, c, _ = self._x.shape
        return None if values is None else values.to(self._dtype).reshape(g, c).T.unsqueeze(2)

    def _scaled(self, matrices: Tensor, scale: Tensor | None) -> Tensor:
        """Diag(scale) matrices, (n, c, g, g)."""
        n, g, _ = matrices.shape
        matrices = matrices.unsqueeze(1)
        return matrices.expand(n, self._x.shape[3], g, g) if scale is None else matrices * scale


def _products(a: Tensor, b: Tensor) -> Tensor:
    """A B' of every channel."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1).mT).view(*a.shape[:3], -1)


def _add_products(result: Tensor, matrices: Tensor, array: Tensor) -> None:
    """Add matrices array, of every channel."""
    result.flatten(0, 1).baddbmm_(matrices.flatten(0, 1), array.flatten(0, 1))


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """(c, g) or (c, g, 1) as (C,), in the parameter's dtype."""
    return None if parameter is None else gradient.reshape(*gradient.shape[:2]).T.flatten().to(parameter.dtype)
