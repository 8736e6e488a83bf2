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

_UNITS = {16: torch.complex128, 8: torch.int64}  # bytes of what is copied as one number


class WholeGroupWhitening:
    """Of a tensor x, seen as (N, q, g, r): q positions before the channels; a group's channels and what follows them.

    A sample is a matrix (g, q r): as it lies in memory where q is 1, else a copy that keeps the r neighbours together.
    """

    @classmethod
    def of(cls, kernels: TorchKernels, plan: Plan, blocks: SampleGroups, x: Tensor) -> WholeGroupWhitening | None:
        """None where a sample has fewer columns than rows."""
        _, q, g, r = blocks.split(x.shape)
        return cls(kernels, plan, blocks, x) if q * r >= g else None

    def __init__(self, kernels: TorchKernels, plan: Plan, blocks: SampleGroups, x: Tensor) -> None:
        self._kernels, self._plan = kernels, plan
        self._x = x.reshape(blocks.split(x.shape))
        self._parts = list(pieces(self._x))
        self._dtype = kernels.statistics_dtype(x.dtype)
        _, self._q, self._g, r = self._x.shape
        self._columns = self._q * r
        self._positions = math.prod(x.shape[blocks.axis + 1 :])  # after the channels

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """Y as (N, q, g, r), and the statistics."""
        mean = self._x.new_empty(len(self._x), self._g, 1, dtype=self._dtype)
        cov = mean.new_empty(len(mean), self._g, self._g)
        for part in self._parts:
            x = self._read(self._x, part, "x")
            torch.mean(x, 2, keepdim=True, out=mean[part])
            x = self._centred(x, mean[part])
            lost = x.mean(2, keepdim=True)  # by the sum over many samples
            mean[part] += lost
            torch.div(torch.bmm(x, x.mT), self._columns, out=cov[part]).sub_(outer_square(lost.squeeze(2)))
        whitener = self._kernels.inverse_sqrt(self._plan.solver, cov, self._plan.eps)
        scale, shift = self._along_columns(weight), self._along_columns(bias)
        y = self._x.new_empty(self._x.shape)
        for part in self._parts:
            x = self._centred(self._read(self._x, part, "x"), mean[part])
            result = self._target(y, part)
            torch.bmm(whitener[part], x, out=result)
            if scale is not None:
                self._by_channel(result).mul_(scale)
            if shift is not None:
                self._by_channel(result).add_(shift)
            self._write(y, part, result)
        return y, Statistics(mean.squeeze(2), cov, whitener)

    def backward(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x as (N, q, g, r), of weight and of bias."""
        (mean, cov, whitener), centre = stats, stats.mean.unsqueeze(2)
        scale = self._along_columns(weight)
        sums, products = torch.empty_like(mean), torch.empty_like(cov)
        dweight = dbias = mean.new_zeros(())
        for part in self._parts:
            gradient, x = self._read(dy, part, "dy"), self._centred(self._read(self._x, part, "x"), centre[part])
            if bias is not None:
                dbias = dbias + self._per_channel(gradient)
            if scale is not None:
                white = torch.bmm(whitener[part], x, out=workspace("result", x.shape, self._dtype))
                dweight = dweight + self._per_channel(white.mul_(gradient))
            gradient = self._scaled(gradient, scale)
            torch.sum(gradient, 2, out=sums[part])
            torch.bmm(gradient, x.mT, out=products[part])
        ds = self._kernels.inverse_sqrt_adjoint(self._plan.solver, cov, products, self._plan.eps)
        b = (ds + ds.mT) / self._columns
        offset = folded([Term(whitener.mT, dy, sums / self._columns), Term(b, self._x, mean)], None)
        dx = self._x.new_empty(self._x.shape)
        for part in self._parts:
            gradient, x = self._scaled(self._read(dy, part, "dy"), scale), self._read(self._x, part, "x")
            result = self._target(dx, part)
            torch.baddbmm(offset[part], whitener[part].mT, gradient, out=result)
            self._write(dx, part, result.baddbmm_(b[part], x))
        return dx, _like(dweight, weight), _like(dbias, bias)

    def _lies_ready(self, array: Tensor) -> bool:
        """Whether its samples are matrices without a copy."""
        return self._q == 1 and array.dtype == self._dtype

    def _read(self, array: Tensor, part: slice, name: str) -> Tensor:
        """A piece as (n, g, columns): not to be written to, or in the workspace of that name."""
        piece = array[part].transpose(1, 2)
        if not self._lies_ready(array):
            piece = _copy(workspace(name, piece.shape, self._dtype), piece)
        return piece.flatten(2)

    def _target(self, array: Tensor, part: slice) -> Tensor:
        """(n, g, columns) to compute what is then to be given to `_write`."""
        piece = array[part].transpose(1, 2)
        return (piece if self._lies_ready(array) else workspace("result", piece.shape, self._dtype)).flatten(2)

    def _write(self, array: Tensor, part: slice, result: Tensor) -> None:
        if not self._lies_ready(array):
            piece = array[part].transpose(1, 2)
            _copy(piece, result.view(piece.shape))

    def _centred(self, x: Tensor, mean: Tensor) -> Tensor:
        return torch.sub(x, mean, out=workspace("x", x.shape, self._dtype))

    def _scaled(self, gradient: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            product = self._by_channel(workspace("dy", gradient.shape, self._dtype))
            gradient = torch.mul(self._by_channel(gradient), scale, out=product).view(gradient.shape)
        return gradient

    def _by_channel(self, matrices: Tensor) -> Tensor:
        """(n, g, columns) as what `_along_columns` broadcasts to."""
        return matrices.unflatten(2, (-1, self._positions)) if self._q == 1 else matrices

    def _along_columns(self, values: Tensor | None) -> Tensor | None:
        """(C,) of every channel, to be broadcast."""
        if values is None:
            return None
        values = values.to(self._dtype).reshape(self._g, 1, -1, 1)
        if self._q == 1:
            return values.squeeze(1)
        return values.expand(-1, self._q, -1, self._positions).reshape(self._g, -1)  # a long inner loop

    def _per_channel(self, matrices: Tensor) -> Tensor:
        """(n, g, columns) summed to (C,)."""
        grid = matrices.unflatten(2, (self._q, -1, self._positions))
        first = 0 if self._positions == 1 else 4  # one axis at a time is fast
        return grid.sum(first, keepdim=True).sum((0, 2, 4)).flatten()


def _like(gradient: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else gradient.to(parameter.dtype)


def _copy(to: Tensor, array: Tensor) -> Tensor:
    """To, filled; neighbours as one number where that is possible: a copy's time is that of its inner loops."""
    if to.dtype == array.dtype:
        for size, dtype in _UNITS.items():
            unit = size // to.element_size()
            if all(_is_made_of(unit, tensor) for tensor in (to, array)):
                to.view(dtype).copy_(array.view(dtype))
                return to
    return to.copy_(array)


def _is_made_of(unit: int, tensor: Tensor) -> bool:
    """Whether a tensor's last axis can be seen as such of `unit` numbers."""
    return (
        unit > 1
        and tensor.stride(-1) == 1
        and not any(number % unit for number in (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1]))
    )
