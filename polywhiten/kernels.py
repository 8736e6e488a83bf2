"""The five kernels that the algorithm is made of, in array API calls alone.

A backend subclasses `Kernels` and overrides what its framework does faster; tests compare every override with these.
Arrays are (p, q, d, l), see `polywhiten.blocks`; means are (blocks, d), matrices (blocks, d, d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from polywhiten._types import Array, Namespace, Shape
from polywhiten.blocks import Blocks
from polywhiten.solvers import Solver
from polywhiten.solvers.iteration import identity_like


class Term(NamedTuple):
    """One term of an affine map: matrix (array - centre)."""

    matrix: Array
    array: Array
    centre: Array


@dataclass(frozen=True)
class Kernels:
    """The kernels over an array API namespace `xp`."""

    xp: Namespace
    # whether it costs nothing if both q and l are long; otherwise the channels of samples are moved to the front first
    reads_any_order: ClassVar[bool] = False

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Return mean and covariance (divided by M) of every block, in the accumulation dtype."""
        count = self.sample_count(x, block_axis, least=1)  # a worker's part of a batch may be empty
        x = self.to_accumulation_dtype(x)
        mean = self._sums(x, block_axis) / count
        centred = x - along(mean, block_axis)
        # What a plain sum over many samples has lost. It is about the rounding of the spread now, not of the mean.
        residual = self._sums(centred, block_axis) / count
        cov = self._products(centred, centred, block_axis) / count - outer_square(residual)
        return mean + residual, cov

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return W = (cov + eps I)^(-1/2) of matrices (..., d, d)."""
        return solver.inverse_sqrt(self.xp, regularized(self.xp, cov, eps))

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Return the gradient of a loss with respect to cov from its gradient with respect to W."""
        return solver.adjoint(self.xp, regularized(self.xp, cov, eps), grad)

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Array | None,
        block_axis: int,
        dtype: Any,
        *,
        row_scale: Array | None = None,
    ) -> Array:
        """Return the sum of the terms plus bias (blocks, d), as (p, q, d, l) of `dtype`.

        `row_scale` (blocks, d) multiplies the rows of the matrix of a single term.
        """
        result = None
        for matrix, array, centre in self.scaled(terms, row_scale):
            centred = self.to_accumulation_dtype(array) - along(centre, block_axis)
            product = self._apply(matrix, centred, block_axis)
            if result is None:
                result = product
            else:
                result += product
        if bias is not None:
            result += along(bias, block_axis)
        return self.xp.astype(result, dtype, copy=False)

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """Return s = dY 1 (blocks, d) and K = dY (X - mean)' (blocks, d, d)."""
        dy = self.to_accumulation_dtype(dy)
        centred = self.to_accumulation_dtype(x) - along(mean, block_axis)
        return self._sums(dy, block_axis), self._products(dy, centred, block_axis)

    def scaled(self, terms: Sequence[Term], row_scale: Array | None) -> Sequence[Term]:
        """Return the terms with the rows of a single one's matrix multiplied by `row_scale`, if there is one."""
        if row_scale is None:
            return terms
        (term,) = terms
        return [term._replace(matrix=term.matrix * row_scale[..., None])]

    def to_accumulation_dtype(self, x: Array) -> Array:
        """Return x in the dtype that its statistics are computed in."""
        return self.xp.astype(x, self.accumulation_dtype(x.dtype), copy=False)

    def accumulation_dtype(self, dtype: Any) -> Any:
        """Return the dtype of statistics: float32 for half precision, else the dtype itself."""
        return self.xp.float32 if self.xp.finfo(dtype).bits < 32 else dtype

    def shape(self, x: Array) -> Shape:
        """Return the sizes of x, for reshaping."""
        shape: Shape = x.shape
        return shape

    def split(self, blocks: Blocks, x: Array) -> Array:
        """Return x as (p, q, d, l)."""
        return self.xp.reshape(x, blocks.split(self.shape(x)))

    def sample_count(self, x: Array, block_axis: int, least: int = 0) -> Any:
        """Return M for the blocks of a (p, q, d, l) array, or `least` if that is more, to divide statistics by."""
        shape = self.shape(x)
        return max(shape[1 - block_axis] * shape[3], least)

    def is_wide(self, x: Array) -> bool:
        """Return whether one product for each of (p, q) is efficient, which a long row of small products isn't."""
        d, l = x.shape[2:]
        return bool(l > 1 and l >= d)

    def _sums(self, x: Array, block_axis: int) -> Array:
        """Return the sum of every block's samples, (blocks, d)."""
        return self.xp.sum(x, axis=(1 - block_axis, 3))

    def _products(self, a: Array, b: Array, block_axis: int) -> Array:
        """Return A B' of every block."""
        xp = self.xp
        if self.is_wide(a):
            return xp.sum(a @ xp.matrix_transpose(b), axis=1 - block_axis)
        return xp.matrix_transpose(self._rows(a, block_axis)) @ self._rows(b, block_axis)

    def _apply(self, matrix: Array, x: Array, block_axis: int) -> Array:
        """Return A X of every block."""
        xp = self.xp
        if self.is_wide(x):
            return xp.expand_dims(matrix, axis=1 - block_axis) @ x
        return self._from_rows(self._rows(x, block_axis) @ xp.matrix_transpose(matrix), self.shape(x), block_axis)

    def _rows(self, x: Array, block_axis: int) -> Array:
        """Return x as (blocks, M, d), without a copy if l is 1."""
        x = self.xp.permute_dims(x, (0, 1, 3, 2) if block_axis == 0 else (1, 0, 3, 2))
        blocks, samples, l, d = self.shape(x)
        return self.xp.reshape(x, (blocks, samples * l, d))

    def _from_rows(self, rows: Array, shape: Shape, block_axis: int) -> Array:
        """Return rows (blocks, M, d) as (p, q, d, l)."""
        p, q, d, l = shape
        rows = self.xp.reshape(rows, (p, q, l, d) if block_axis == 0 else (q, p, l, d))
        return self.xp.permute_dims(rows, (0, 1, 3, 2) if block_axis == 0 else (1, 0, 3, 2))


def regularized(xp: Namespace, cov: Array, eps: float) -> Array:
    """Return cov + eps I."""
    return cov + eps * identity_like(xp, cov) if eps else cov


def outer_square(v: Array) -> Array:
    """Return the outer product v v' of each vector (..., d)."""
    return v[..., :, None] * v[..., None, :]


def along(values: Array, block_axis: int) -> Array:
    """Return values (blocks, d) with the dimensions of a (p, q, d, l) array."""
    return values[:, None, :, None] if block_axis == 0 else values[None, :, :, None]
