"""Group whitening with its weight and bias, each pass done to a sample while it is in the cache."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from polywhiten.blocks import SampleGroups, divisors
from polywhiten.kernels import Term, outer_square
from polywhiten.torch.cpu.pieces import pieces, workspace
from polywhiten.torch.kernels import TorchKernels, folded
from polywhiten.whitening import Plan, Statistics

_SMALLEST, _LARGEST = 256, 2048  # columns of a tile
_UNITS = {16: torch.complex128, 8: torch.int64}  # bytes of what is copied as one number


class WholeGroupWhitening:
    """Of a tensor x, seen as (N, q, g, r): q positions before the channels; a group's channels and what follows them.

    A sample's columns, q r, are cut into tiles of a size that products of (g, g) and (g, columns) are fast for. Pieces
    are (n, tiles, g, columns): as they lie in memory where a sample is one tile and q is 1, else copies that keep
    neighbours together.
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
        _, self._q, self._g, self._r = self._x.shape
        self._samples = self._q * self._r
        self._l = math.prod(x.shape[blocks.axis + 1 :])  # positions after the channels
        channels = self._r // self._l
        if self._q > 1:
            self._columns = _largest_tile(self._q, self._r) * self._r
        elif self._l > _LARGEST:
            self._columns = _largest_tile(self._l, 1)
        else:
            self._columns = _largest_tile(channels, self._l) * self._l
        self._tile_channels = max(self._columns // self._l, 1)  # where q is 1, as the next
        self._channel_tiles = max(self._l // self._columns, 1)

    def forward(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Statistics]:
        """Y as (N, q, g, r), and the statistics."""
        mean = self._x.new_empty(len(self._x), self._g, dtype=self._dtype)
        cov = mean.new_empty(len(mean), self._g, self._g)
        for part in self._parts:
            x = self._read(self._x, part, "x")
            torch.mean(x, (1, 3), out=mean[part])
            x = self._centred(x, mean[part])
            lost = x.mean((1, 3))  # by the sum over many samples
            mean[part] += lost
            torch.div(_products(x, x).sum(1), self._samples, out=cov[part]).sub_(outer_square(lost))
        whitener = self._kernels.inverse_sqrt(self._plan.solver, cov, self._plan.eps)
        scale, shift = self._along_columns(weight), self._along_columns(bias)
        y = self._x.new_empty(self._x.shape)
        for part in self._parts:
            x = self._centred(self._read(self._x, part, "x"), mean[part])
            result = self._target(y, part)
            torch.bmm(_every(whitener[part], x), x.flatten(0, 1), out=result.flatten(0, 1))
            if scale is not None:
                self._by_channel(result).mul_(scale)
            if shift is not None:
                self._by_channel(result).add_(shift)
            self._write(y, part, result)
        return y, Statistics(mean, cov, whitener)

    def backward(
        self, weight: Tensor | None, bias: Tensor | None, stats: Statistics, dy: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x as (N, q, g, r), of weight and of bias."""
        mean, cov, whitener = stats
        scale = self._along_columns(weight)
        sums, products = torch.empty_like(mean), torch.empty_like(cov)
        dweight = dbias = mean.new_zeros(())
        for part in self._parts:
            gradient, x = self._read(dy, part, "dy"), self._centred(self._read(self._x, part, "x"), mean[part])
            if bias is not None:
                dbias = dbias + self._per_channel(gradient)
            if scale is not None:
                white = workspace("result", x.shape, self._dtype)
                torch.bmm(_every(whitener[part], x), x.flatten(0, 1), out=white.flatten(0, 1))
                dweight = dweight + self._per_channel(white.mul_(gradient))
            gradient = self._scaled(gradient, scale)
            torch.sum(gradient, (1, 3), out=sums[part])
            torch.sum(_products(gradient, x), 1, out=products[part])
        ds = self._kernels.inverse_sqrt_adjoint(self._plan.solver, cov, products, self._plan.eps)
        b = (ds + ds.mT) / self._samples
        offset = folded([Term(whitener.mT, dy, sums / self._samples), Term(b, self._x, mean)], None)
        dx = self._x.new_empty(self._x.shape)
        for part in self._parts:
            gradient = self._scaled(self._read(dy, part, "dy"), scale)
            x = self._dense(self._read(self._x, part, "x"), "x")
            result = self._target(dx, part)
            flat = result.flatten(0, 1)
            torch.baddbmm(_every(offset[part], x), _every(whitener[part].mT, x), gradient.flatten(0, 1), out=flat)
            flat.baddbmm_(_every(b[part], x), x.flatten(0, 1))
            self._write(dx, part, result)
        return dx, _like(dweight, weight), _like(dbias, bias)

    def _tiles(self, array: Tensor, part: slice) -> Tensor:
        """A piece as (n, tiles, g, columns); where q isn't 1, as (n, tiles, g, positions, r)."""
        piece = array[part]
        if self._q == 1:
            return piece.view(len(piece), self._g, -1, self._columns).transpose(1, 2)
        return piece.view(len(piece), -1, self._columns // self._r, self._g, self._r).transpose(2, 3)

    def _read(self, array: Tensor, part: slice, name: str) -> Tensor:
        """A piece: not to be written to, and perhaps not dense, or in the workspace of that name."""
        piece = self._tiles(array, part)
        if self._q == 1 and array.dtype == self._dtype:
            return piece
        return _copy(workspace(name, piece.shape, self._dtype), piece).flatten(3)

    def _dense(self, piece: Tensor, name: str) -> Tensor:
        return piece if piece.is_contiguous() else _copy(workspace(name, piece.shape, self._dtype), piece)

    def _centred(self, x: Tensor, mean: Tensor) -> Tensor:
        return torch.sub(x, mean[:, None, :, None], out=workspace("x", x.shape, self._dtype))

    def _scaled(self, gradient: Tensor, scale: Tensor | None) -> Tensor:
        if scale is None:
            return self._dense(gradient, "dy")
        result = workspace("dy", gradient.shape, self._dtype)
        torch.mul(self._by_channel(gradient), scale, out=self._by_channel(result))
        return result

    def _target(self, array: Tensor, part: slice) -> Tensor:
        """Where to compute what is then to be given to `_write`: (n, tiles, g, columns), dense."""
        piece = self._tiles(array, part)
        if self._q == 1 and piece.is_contiguous() and array.dtype == self._dtype:
            return piece
        return workspace("result", piece.shape, self._dtype).flatten(3)

    def _write(self, array: Tensor, part: slice, result: Tensor) -> None:
        piece = self._tiles(array, part)
        if result.data_ptr() != piece.data_ptr():
            _copy(piece, result.view(piece.shape))

    def _by_channel(self, tiles: Tensor) -> Tensor:
        """(n, tiles, g, columns) as what `_along_columns` broadcasts to."""
        return tiles.unflatten(3, (self._tile_channels, -1)) if self._q == 1 else tiles

    def _along_columns(self, values: Tensor | None) -> Tensor | None:
        """(C,) of every channel, to be broadcast."""
        if values is None:
            return None
        values = values.to(self._dtype)
        if self._q == 1:
            values = values.reshape(self._g, -1, 1, self._tile_channels).expand(-1, -1, self._channel_tiles, -1)
            return values.reshape(self._g, -1, self._tile_channels, 1).transpose(0, 1)
        values = values.reshape(self._g, 1, -1, 1).expand(-1, self._columns // self._r, -1, self._l)
        return values.reshape(self._g, -1)  # a long inner loop

    def _per_channel(self, tiles: Tensor) -> Tensor:
        """(n, tiles, g, columns) summed to (C,)."""
        if self._q > 1:
            return tiles.sum((0, 1)).view(self._g, -1, self._r // self._l, self._l).sum((1, 3)).flatten()
        sums = tiles.sum(0) if self._l == 1 else self._by_channel(tiles).sum(4).sum(0)  # (tiles, g, channels)
        return sums.reshape(-1, self._channel_tiles, *sums.shape[1:]).sum(1).transpose(0, 1).flatten()


@lru_cache
def _largest_tile(count: int, size: int) -> int:
    """How many of `count` parts of so many columns make a tile; all, where no divisor gives a good one."""
    return max((n for n in divisors(count) if _SMALLEST <= n * size <= _LARGEST), default=count)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """A B' of every tile."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1).mT).view(*a.shape[:3], -1)


def _every(matrices: Tensor, tiles: Tensor) -> Tensor:
    """A sample's matrix for each of its tiles."""
    return matrices.unsqueeze(1).expand(-1, tiles.shape[1], -1, -1).flatten(0, 1)


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
