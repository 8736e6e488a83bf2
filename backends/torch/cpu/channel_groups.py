"""The kernels for groups of channels over the batch: tensors (p, q, d, l) whose blocks lie along q.

In memory these are rows of channels (l = 1: channels-last pictures, or no pictures), or channels of l positions each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from polywhiten.kernels import Term, outer_square
from polywhiten.torch.cpu.pieces import PARTS, pieces
from polywhiten.torch.kernels import folded

_COLUMNS = 16  # of the picture that rows are to a convolution


def moments(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean (q, d) and covariance (q, d, d), in one pass.

    About the mean of the first piece: the mean square about it is at most as many times the variance as there are
    pieces.
    """
    count = x.shape[0] * x.shape[3]
    about = x[next(pieces(x))].mean((0, 3), dtype=dtype)
    sums, products = _Sum(x.shape[1]), _Sum(x.shape[1])
    for part in pieces(x):
        centred = _matrices(x[part], about)
        sums.add(centred.sum(2))
        products.add_product(centred, centred)
    off = sums.of_blocks() / count
    return about + off, products.of_blocks() / count - outer_square(off)


def cross_moments(dy: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """S (q, d) and K (q, d, d), in one pass over both."""
    sums, products = _Sum(x.shape[1]), _Sum(x.shape[1])
    for part in pieces(x):
        gradient = _matrices(dy[part].to(mean.dtype))
        sums.add(gradient.sum(2))
        products.add_product(gradient, _matrices(x[part], mean))
    return sums.of_blocks(), products.of_blocks()


def affine_map(terms: Sequence[Term], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the terms, plus bias (q, d)."""
    offset = folded(terms, bias)
    if terms[0].array.shape[3] == 1 and _convolutions_are_fast(offset.dtype):
        return _convolutions(terms, offset.flatten(), dtype)
    return _products(terms, offset, dtype)


def _products(terms: Sequence[Term], offset: Tensor, dtype: torch.dtype) -> Tensor:
    x = terms[0].array
    y = x.new_empty(x.shape, dtype=dtype)
    first = next(pieces(x))
    many = first.stop if _is_long(x) else 1
    offset, *matrices = (_repeated(each, many) for each in (offset, *(term.matrix for term in terms)))
    for part in pieces(x):
        result = offset
        for matrix, term in zip(matrices, terms, strict=True):
            arrays = _matrices(term.array[part].to(offset.dtype))
            result = torch.baddbmm(result[: len(arrays)], matrix[: len(arrays)], arrays)
        y[part] = _as_piece(result, y[part].shape)
    return y


def _convolutions(terms: Sequence[Term], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Of rows, 1 x 1 and in as many groups as there are blocks."""
    first, *others = terms
    if not others:
        return _convolution(first, bias, slice(None)).to(dtype)
    y = first.array.new_empty(first.array.shape, dtype=dtype)
    for part in pieces(y):
        result = _convolution(first, bias, part)
        for term in others:
            result += _convolution(term, None, part)
        y[part] = result
    return y


def _convolution(term: Term, bias: Tensor | None, part: slice) -> Tensor:
    matrix, rows = term.matrix, term.array[part].to(term.matrix.dtype)
    columns = next(k for k in range(_COLUMNS, 0, -1) if len(rows) % k == 0)
    picture = rows.reshape(1, -1, columns, matrix.shape[0] * matrix.shape[1]).permute(0, 3, 1, 2)
    result = conv2d(picture, matrix.flatten(0, 1)[..., None, None], bias, groups=len(matrix))
    return result.permute(0, 2, 3, 1).reshape(rows.shape)


def _convolutions_are_fast(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def _is_long(x: Tensor) -> bool:
    """Whether a product for each of (p, q) is efficient."""
    return x.shape[3] >= 2 * x.shape[2]


def _matrices(piece: Tensor, centre: Tensor | None = None) -> Tensor:
    """A piece, less its centre (q, d), as matrices (., d, samples): one for every block, or several."""
    matrices = piece.flatten(0, 1) if _is_long(piece) else piece.permute(1, 2, 0, 3).flatten(2)
    return matrices if centre is None else matrices - _repeated(centre.unsqueeze(-1), len(matrices) // len(centre))


def _as_piece(matrices: Tensor, shape: torch.Size) -> Tensor:
    """`_matrices` back as a piece of `shape`."""
    samples, blocks, _, l = shape
    if len(matrices) == samples * blocks:
        return matrices.view(shape)
    return matrices.unflatten(2, (samples, l)).permute(2, 0, 1, 3)


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
        a, b = _side_by_side(a), _side_by_side(b).mT
        if self._total is None:
            self._total = torch.bmm(a, b)
        else:
            self._total[: len(a)].baddbmm_(a, b)

    def of_blocks(self) -> Tensor:
        assert self._total is not None
        return self._total.unflatten(0, (-1, self._blocks)).sum(0)
