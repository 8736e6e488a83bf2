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


class WholeGroupWhitening:
    """Of a tensor x, seen as (N, q, g, c, l): q positions before the channels, l after them.

    A piece's samples are matrices (n, g, q c l): a view where q is 1, channels first, else written in that order into
    a buffer, by an operation that had to read and write them anyway.
    """

    def __init__(self, kernels: TorchKernels, plan: Plan, blocks: SampleGroups, x: Tensor) -> None:
        self._kernels, self._plan = kernels, plan
        axis, groups = blocks.axis, blocks.num_groups
        before, after = math.prod(x.shape[1:axis]), math.prod(x.shape[axis + 1 :])
        self._x = x.reshape(len(x), before, groups, x.shape[axis] // groups, after)
        self._parts = list(pieces(self._x))
        self._dtype = kernels.statistics_dtype(x.dtype)

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """Y as (N, q, g, c, l), and the statistics."""
        n, g = self._x.shape[0], self._x.shape[2]
        mean = self._x.mean((1, 3, 4), dtype=self._dtype)
        cov = mean.new_empty(n, g, g)
        for part in self._parts:
            centred = self._centred(part, mean)
            lost = centred.mean(2)  # by the sum over many samples
            mean[part] += lost
            torch.baddbmm(outer_square(lost), centred, centred.mT, beta=-1, alpha=1 / centred.shape[2], out=cov[part])
        whitener = self._kernels.inverse_sqrt(self._plan.solver, cov, self._plan.eps)
        offset = folded([Term(whitener, self._x, mean)], None)
        scale, shift = self._per_channel(weight), self._per_channel(bias)
        y = torch.empty_like(self._x)
        for part in self._parts:
            result = self._buffer("result", part)
            torch.baddbmm(offset[part], whitener[part], self._matrices(self._x, part), out=result.flatten(2))
            target = y[part].transpose(1, 2)
            if scale is None:
                torch.add(result, 0 if shift is None else shift, out=target)
            elif shift is None:
                torch.mul(result, scale, out=target)
            else:
                torch.addcmul(shift, result, scale, out=target)
        return y, Statistics(mean, cov, whitener)

    def backward(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x as (N, q, g, c, l), of weight and of bias."""
        mean, cov, whitener = stats
        _, q, g, c, l = self._x.shape
        dy, scale = dy.reshape(self._x.shape), self._per_channel(weight)
        sums, products = torch.empty_like(mean), torch.empty_like(cov)
        dweight, dbias = mean.new_zeros(g, c), mean.new_zeros(g, c)
        for part in self._parts:
            gradient, centred = self._matrices(dy, part), self._centred(part, mean)
            per_channel = gradient.unflatten(2, (q, c, l)).sum((2, 4))
            dbias += per_channel.sum(0)
            if scale is not None:
                result = self._buffer("result", part)
                torch.bmm(whitener[part], centred, out=result.flatten(2))
                result *= dy[part].transpose(1, 2)
                dweight += result.sum((0, 2, 4))
                gradient = torch.mul(gradient.unflatten(2, (q, c, l)), scale, out=result).flatten(2)
                per_channel = per_channel * scale[:, 0, :, 0]
            torch.sum(per_channel, 2, out=sums[part])
            torch.bmm(gradient, centred.mT, out=products[part])
        ds = self._kernels.inverse_sqrt_adjoint(self._plan.solver, cov, products, self._plan.eps)
        count = q * c * l
        a, b = whitener.mT, (ds + ds.mT) / count
        offset = folded([Term(a, dy, sums / count), Term(b, self._x, mean)], None)
        dx = torch.empty_like(self._x)
        for part in self._parts:
            gradient = self._matrices(dy, part) if scale is None else self._scaled(dy, part, scale)
            target = dx[part].transpose(1, 2)
            result = target if q == 1 and target.dtype == self._dtype else self._buffer("result", part)
            both = torch.baddbmm(offset[part], a[part], gradient, out=result.flatten(2))
            both.baddbmm_(b[part], self._matrices(self._x, part))
            if result is not target:
                target.copy_(result)
        return dx, _like(dweight, weight), _like(dbias, bias)

    def _buffer(self, name: str, part: slice) -> Tensor:
        """For a piece as (n, g, q, c, l)."""
        _, q, g, c, l = self._x.shape
        return workspace(name, (part.stop - part.start, g, q, c, l), self._dtype)

    def _matrices(self, array: Tensor, part: slice) -> Tensor:
        """A piece as matrices."""
        piece = array[part].transpose(1, 2)
        if piece.shape[2] > 1 or piece.dtype != self._dtype:
            piece = self._buffer("matrices", part).copy_(piece)
        return piece.flatten(2)

    def _centred(self, part: slice, mean: Tensor) -> Tensor:
        """X of a piece less its mean, as matrices."""
        centre = mean[part][:, :, None, None, None]
        return torch.sub(self._x[part].transpose(1, 2), centre, out=self._buffer("centred", part)).flatten(2)

    def _scaled(self, array: Tensor, part: slice, scale: Tensor) -> Tensor:
        return torch.mul(array[part].transpose(1, 2), scale, out=self._buffer("centred", part)).flatten(2)

    def _per_channel(self, values: Tensor | None) -> Tensor | None:
        """(C,) to broadcast with (n, g, q, c, l)."""
        _, _, g, c, _ = self._x.shape
        return None if values is None else values.to(self._dtype).reshape(g, 1, c, 1)


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    """(g, c) in shape and dtype of the parameter."""
    return None if parameter is None else gradient.flatten().to(parameter.dtype)
