"""NumPy's kernels: compiled, where arrays are float32 or float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polywhiten._types import Array
from polywhiten.cpu.launches import Calls
from polywhiten.cpu.runtime.parallel import address, num_threads
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import Solver


class _NumPy:
    """What compiled kernels need to know of NumPy's arrays."""

    def address(self, array: Array) -> int:
        return address(array)

    def strides(self, array: Array) -> list[int]:
        return [n // array.itemsize for n in array.strides]

    def dtype(self, array: Array) -> str:
        return str(array.dtype)

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return np.empty(shape, like.dtype)

    def converted(self, array: Array, like: Array) -> Array:
        return array.astype(like.dtype)

    def in_order_of(self, array: Array, other: Array) -> Array:
        result = np.empty_like(other, order="K")
        result[...] = array
        return result

    def empty_like(self, array: Array) -> Array:
        return np.empty_like(array, order="K")

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def threads(self) -> int:
        return num_threads()


_CALLS = Calls(_NumPy())
_DTYPES = (np.float32, np.float64)


class NumPyKernels(Kernels):
    """Compiled kernels; the plain ones for half precision, and for arrays that are odd or empty."""

    reads_any_order = True

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Mean and covariance, in one pass over x."""
        return _CALLS.moments(x, block_axis) if _serves(x) else super().moments(x, block_axis)

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S and K, in one pass over both."""
        if not _serves(x, dy, mean):
            return super().cross_moments(dy, x, mean, block_axis)
        return _CALLS.cross_moments(dy, x, mean, block_axis)

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Array | None,
        block_axis: int,
        dtype: Any,
        *,
        row_scale: Array | None = None,
    ) -> Array:
        """The sum of the terms, in one pass."""
        others = [array for term in terms for array in (term.array, term.matrix, term.centre)]
        if not _serves(terms[-1].array, *others, bias, row_scale):
            return super().affine_map(terms, bias, block_axis, dtype, row_scale=row_scale)
        return _CALLS.affine_map(terms, bias, block_axis, row_scale).astype(dtype, copy=False)

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """W, every matrix in the cache."""
        if not (solver.newton_steps(cov.itemsize) is not None and _serves(cov)):
            return super().inverse_sqrt(solver, cov, eps)
        return _CALLS.inverse_sqrt(solver, cov, eps)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Gradient with respect to cov, every matrix in the cache."""
        if not (solver.newton_steps(cov.itemsize) is not None and _serves(cov, grad)):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        return _CALLS.inverse_sqrt_adjoint(solver, cov, grad, eps)


def _serves(x: Array, *others: Array | None) -> bool:
    """Whether x, and all that there is beside it, are arrays of one dtype that kernels are compiled for."""
    arrays = [x, *(array for array in others if array is not None)]
    return (
        x.size > 0
        and x.dtype.type in _DTYPES
        and all(type(a) is np.ndarray and a.dtype == x.dtype and a.dtype.isnative and a.flags.aligned for a in arrays)
        and all(n % a.itemsize == 0 for a in arrays for n in a.strides)
    )
