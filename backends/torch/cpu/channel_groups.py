"""The kernels for groups of channels over the batch: tensors (p, q, d, l) whose blocks lie along q.

In memory these are rows of channels (l = 1: channels-last pictures, or no pictures), or channels of l positions each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polywhiten.kernels import Term, outer_square
from polywhiten.torch.cpu.pieces import PARTS, pieces, workspace
from polywhiten.torch.kernels import folded

_LONG = 128  # positions that are enough for a product
_SHARE = 8  # of a piece, that the first samples are
_COLUMNS = 16  # of the picture that rows are to a convolution


def moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean (q, d) and covariance (q, d, d), in one pass.

    About the mean of the first samples: if these are one in k, the mean square about it is at most k times the
    variance, and about the variance where samples come in no order.
    """
    order, count = _Order(x), x.shape[0] * x.shape[3]
    about = x[: -(-next(pieces(x)).stop // _SHARE)].mean((0, 3), dtype=dtype)
    sums, products = _Sum(x.shape[1]), _Sum(x.shape[1])
    for part in pieces(x):
        centred = order.centred(x[part], about)
        sums.add(centred.sum(2))
        products.add_product(centred, centred)
    off = sums.of_blocks() / count
    return about + off, products.of_blocks() / count - outer_square(off)


def cross_moments(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """S (q, d) and K (q, d, d), in one pass over both."""
    order = _Order(x)
    sums, products = _Sum(x.shape[1]), _Sum(x.shape[1])
    for part in pieces(x):
        gradient = order.matrices(dy[part], mean.dtype)
        sums.add(gradient.sum(2))
        products.add_product(gradient, order.centred(x[part], mean))
    return sums.of_blocks(), products.of_blocks()


def affine_map(terms: Sequence[Term], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the terms, plus bias (q, d)."""
    offset = folded(terms, bias)
    if terms[0].array.shape[3] == 1 and _convolutions_are_fast(offset.dtype):
        return _convolutions(terms, offset.flatten(), dtype)
    return _products(terms, offset, dtype)


def _products(terms: Sequence[Term], offset: Tensor, dtype: torch.dtype) -> Tensor:
    x = terms[0].array
    y: Tensor = x.new_empty(x.shape, dtype=dtype)
    order = _Order(x)
    factors = [_repeated(term.matrix, order.stacks(next(pieces(x)).stop)) for term in terms]
    for part in pieces(x):
        target = order.ordered(y[part])
        in_place = target.is_contiguous() and dtype == offset.dtype
        written = target if in_place else workspace("result", target.shape, offset.dtype)
        result = order.flat(written)
        for k, (factor, term) in enumerate(zip(factors, terms, strict=True)):
            factor, array = factor[: len(result)], order.matrices(term.array[part], offset.dtype)
            result.baddbmm_(factor, array, beta=0 if k == 0 else 1)
        torch.add(written, order.along(offset), out=target)
    return y


def _convolutions(terms: Sequence[Term], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Of rows, 1 x 1 and in as many groups as there are blocks."""
    first, *others = terms
    result = _convolution(first, bias, slice(None))
    for term in others:
        for part in pieces(result):
            result[part] += _convolution(term, None, part)
    return result.to(dtype)


def _convolution(term: Term, bias: Tensor | None, part: slice) -> Tensor:
    matrix, rows = term.matrix, term.array[part].to(term.matrix.dtype)
    columns = next(k for k in range(_COLUMNS, 0, -1) if len(rows) % k == 0)
    picture = rows.reshape(1, -1, columns, matrix.shape[0] * matrix.shape[1]).permute(0, 3, 1, 2)
    weight = matrix.flatten(0, 1)[..., None, None]
    # by name: with one thread, conv2d takes another way, a slow one
    result = torch.mkldnn_convolution(picture, weight, bias, (0, 0), (1, 1), (1, 1), len(matrix))
    return result.permute(0, 2, 3, 1).reshape(rows.shape)


def _convolutions_are_fast(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


class _Order:
    """How the pieces (n, q, d, l) of a tensor are matrices of d rows: one for each block, or more where l is long."""

    def __init__(self, x: Tensor) -> None:
        _, _, d, self._l = x.shape
        self._long = self._l >= min(2 * d, _LONG)  # products for each of (n, q) are efficient then
        self._short = not self._long and self._l > 1  # and here samples are to lie side by side

    def ordered(self, piece: Tensor) -> Tensor:
        """The axes as they have to lie in memory."""
        return piece.permute(1, 2, 0, 3) if self._short else piece

    def flat(self, ordered: Tensor) -> Tensor:
        """A view as matrices (., d, samples)."""
        if self._long:
            return ordered.flatten(0, 1)
        return ordered.flatten(2) if self._short else ordered.squeeze(3).permute(1, 2, 0)

    def stacks(self, samples: int) -> int:
        """Matrices of a block in a piece."""
        return samples if self._long else 1

    def matrices(self, piece: Tensor, dtype: torch.dtype) -> Tensor:
        """A piece as matrices of that dtype."""
        ordered = self.ordered(piece)
        if self._short or piece.dtype != dtype:
            ordered = workspace("matrices", ordered.shape, dtype).copy_(ordered)
        return self.flat(ordered)

    def centred(self, piece: Tensor, centre: Tensor) -> Tensor:
        """A piece less its centre (q, d), as matrices of the centre's dtype."""
        ordered = self.ordered(piece)
        buffer = workspace("centred", ordered.shape, centre.dtype)
        if self._l == 1:  # without the axis of one: it would be the innermost loop
            torch.sub(piece.squeeze(3), centre, out=buffer.squeeze(3))
        else:
            torch.sub(ordered, self.along(centre.unsqueeze(2)), out=buffer)
        return self.flat(buffer)

    def along(self, values: Tensor) -> Tensor:
        """(q, d, 1) to broadcast with an ordered piece."""
        return values.unsqueeze(3) if self._short else values


def _repeated(values: Tensor, times: int) -> Tensor:
    """(q, ...) as (times q, ...)."""
    return values.expand(times, *values.shape).flatten(0, 1)


def _side_by_side(matrices: Tensor) -> Tensor:
    """A single matrix in parts: one product with so few results is done by one core."""
    if len(matrices) > 1 or matrices.shape[2] % PARTS:
        return matrices
    return matrices.mT.reshape(PARTS, -1, matrices.shape[1]).mT


class _Sum:
    """Of what pieces give for their matrices, over the matrices of a block."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._total: Tensor | None = None

    def add(self, values: Tensor) -> None:
        if self._total is None:
            self._total = values
        else:
            self._total[: len(values)] += values

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """A B'."""
        if self._total is None or len(self._total) >= PARTS:
            a, b = _side_by_side(a), _side_by_side(b)
        if self._total is None:
            self._total = torch.bmm(a, b.mT)
        else:
            self._total[: len(a)].baddbmm_(a, b.mT)

    def of_blocks(self) -> Tensor:
        assert self._total is not None
        return self._total.view(-1, self._blocks, *self._total.shape[1:]).sum(0)
