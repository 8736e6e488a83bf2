"""The five kernels that the algorithm is made of, in array API calls alone.

A backend subclasses `Kernels` and overrides what its framework does faster; tests hold every override against these.
Arrays are (p, q, d, l), see `polywhiten.blocks`; means are (blocks, d), matrices (blocks, d, d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from polywhiten._types import Array, Namespace, Shape
from polywhiten.blocks import Blocks
from polywhiten.solvers import Solver
from polywhiten.solvers.iteration import identity_like

if TYPE_CHECKING:
    from polywhiten.whitening import Plan, Whole


class Term(NamedTuple):
    """matrix (array - centre), a part of an affine map."""

    matrix: Array
    array: Array
    centre: Array


@dataclass(frozen=True)
class Kernels:
    """The kernels over an array API namespace `xp`."""

    xp: Namespace
    # whether both q and l may be long without a cost: else samples are whitened with their channels first
    reads_any_order: ClassVar[bool] = False

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Mean and covariance (divided by M) of every block, in the statistics' dtype."""
        xp, axes = self.xp, (1 - block_axis, 3)
        count = self.sample_count(x, block_axis, least=1)  # a worker's share of a batch may be empty
        x = self.for_statistics(x)
        mean = xp.sum(x, axis=axes) / count
        centred = x - along(mean, block_axis)
        # what a naive sum over many samples has lost; it is about the spread's rounding now, no longer the mean's
        lost = xp.sum(centred, axis=axes) / count
        cov = self._products(centred, centred, block_axis) / count - outer_square(lost)
        return mean + lost, cov

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """W = (cov + eps I)^(-1/2) of matrices (..., d, d)."""
        return solver.inverse_sqrt(self.xp, regularized(self.xp, cov, eps))

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Gradient of a loss with respect to cov, of its gradient with respect to W."""
        return solver.adjoint(self.xp, regularized(self.xp, cov, eps), grad)

    def affine_map(self, terms: Sequence[Term], bias: Array | None, block_axis: int, dtype: Any) -> Array:
        """Sum of matrix (array - centre) over the terms, plus bias (blocks, d); (p, q, d, l) of `dtype`."""
        result = None
        for matrix, array, centre in terms:
            centred = self.for_statistics(array) - along(centre, block_axis)
            product = self._apply(matrix, centred, block_axis)
            if result is None:
                result = product
            else:
                result += product
        if bias is not None:
            result += along(bias, block_axis)
        return self.xp.astype(result, dtype, copy=False)

    def scaled_map(self, weight: Array | None, term: Term, bias: Array | None, block_axis: int, dtype: Any) -> Array:
        """The affine map of one term, times the weight (blocks, d) of its rows where there is one, plus bias."""
        if weight is not None:
            term = term._replace(matrix=term.matrix * weight[..., None])
        return self.affine_map([term], bias, block_axis, dtype)

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S = dY 1 (blocks, d) and K = dY (X - mean)' (blocks, d, d)."""
        dy = self.for_statistics(dy)
        centred = self.for_statistics(x) - along(mean, block_axis)
        return self.xp.sum(dy, axis=(1 - block_axis, 3)), self._products(dy, centred, block_axis)

    def whole(self, plan: Plan, x: Array, *others: Array | None) -> Whole | None:
        """What does all of forward and backward, where there is that; asked for only with all of the batch at hand."""
        return None

    def for_statistics(self, x: Array) -> Array:
        """X in the dtype that statistics are computed in."""
        return self.xp.astype(x, self.statistics_dtype(x.dtype), copy=False)

    def statistics_dtype(self, dtype: Any) -> Any:
        """Float32 for half precision, else the dtype itself."""
        return self.xp.float32 if self.xp.finfo(dtype).bits < 32 else dtype

    def shape(self, x: Array) -> Shape:
        """The sizes of x, to reshape by."""
        shape: Shape = x.shape
        return shape

    def split(self, blocks: Blocks, x: Array) -> Array:
        """X as (p, q, d, l)."""
        return self.xp.reshape(x, blocks.split(self.shape(x)))

    def sample_count(self, x: Array, block_axis: int, least: int = 0) -> Any:
        """M of the (p, q, d, l) array's blocks, or `least`: a number that statistics can be divided by."""
        shape = self.shape(x)
        return max(shape[1 - block_axis] * shape[3], least)

    def is_wide(self, x: Array) -> bool:
        """Whether a product for each of (p, q) is efficient: not a long row of small ones."""
        d, l = x.shape[2:]
        return bool(l > 1 and l >= d)

    def _products(self, a: Array, b: Array, block_axis: int) -> Array:
        """A B' of every block."""
        xp = self.xp
        if self.is_wide(a):
            return xp.sum(a @ xp.matrix_transpose(b), axis=1 - block_axis)
        return xp.matrix_transpose(self._rows(a, block_axis)) @ self._rows(b, block_axis)

    def _apply(self, matrix: Array, x: Array, block_axis: int) -> Array:
        """A X of every block."""
        xp = self.xp
        if self.is_wide(x):
            return xp.expand_dims(matrix, axis=1 - block_axis) @ x
        return self._from_rows(self._rows(x, block_axis) @ xp.matrix_transpose(matrix), self.shape(x), block_axis)

    def _rows(self, x: Array, block_axis: int) -> Array:
        """(blocks, M, d); without a copy where l is 1."""
        x = self.xp.permute_dims(x, (0, 1, 3, 2) if block_axis == 0 else (1, 0, 3, 2))
        blocks, samples, l, d = self.shape(x)
        return self.xp.reshape(x, (blocks, samples * l, d))

    def _from_rows(self, rows: Array, shape: Shape, block_axis: int) -> Array:
        """(blocks, M, d) back as (p, q, d, l)."""
        p, q, d, l = shape
        rows = self.xp.reshape(rows, (p, q, l, d) if block_axis == 0 else (q, p, l, d))
        return self.xp.permute_dims(rows, (0, 1, 3, 2) if block_axis == 0 else (1, 0, 3, 2))


def regularized(xp: Namespace, cov: Array, eps: float) -> Array:
    """Cov + eps I."""
    return cov + eps * identity_like(xp, cov) if eps else cov


def outer_square(v: Array) -> Array:
    """V v' of vectors (..., d)."""
    return v[..., :, None] * v[..., None, :]


def along(values: Array, block_axis: int) -> Array:
    """(blocks, d) laid along the axes of a (p, q, d, l) array."""
    return values[:, None, :, None] if block_axis == 0 else values[None, :, :, None]
