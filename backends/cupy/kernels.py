"""The kernels as CUDA: which of their variants fits an array, and how many programs of it.

A program is a CUDA block. Each reads its part of an array once, at any strides, so no array is copied or centred.
More than 64 variables, other solvers than Newton's, and whatever else is rare have the inherited kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polywhiten._types import Array
from polywhiten.cupy.variants import (
    ADJOINT_MATRICES,
    AFFINE_THREADS,
    LIMIT,
    NEWTON_THREADS,
    PRODUCT_THREADS,
    ROOT_MATRICES,
    SIZES,
    STATIC,
    TYPES,
    Launcher,
    along_samples,
    is_sized,
    map_memory,
    map_programs,
    newton_memory,
    stretches,
    variant,
)
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import Solver
from polywhiten.solvers.newton import Newton


@dataclass(frozen=True)
class CupyKernels(Kernels):
    """Kernels on CuPy's arrays, on their stream: nothing waits for the device, and nothing leaves it."""

    reads_any_order = True

    launch: Launcher

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Mean and covariance of every block."""
        if not _is_served(x, block_axis):
            return super().moments(x, block_axis)
        blocks, count, d = _sizes(x, block_axis)
        size = variant(d)
        programs, stretch = stretches(self.launch.processors, blocks, count, min(2048 // size, 256))
        shifts, mean, cov = (self._empty(x, blocks, *shape) for shape in ((d,), (d,), (d, d)))
        products, sums = (self._empty(x, blocks * programs, *shape) for shape in ((d, d), (d,)))
        self.launch(
            "moments.cu",
            f"partial_moments<{_type(x)}, {size}>",
            blocks * programs,
            PRODUCT_THREADS,
            (*_view(x, block_axis), d, x.shape[3], count, programs, stretch, shifts, products, sums),
        )
        self.launch(
            "moments.cu",
            f"combine_moments<{_type(mean)}, {size}>",
            blocks * d,
            PRODUCT_THREADS,
            (shifts, products, sums, programs, d, float(count), mean, cov),
        )
        return mean, cov

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S = dY 1 (blocks, d) and K = dY (X - mean)' (blocks, d, d)."""
        if not (_is_served(x, block_axis) and _is_served(dy, block_axis) and self._are_statistics([mean], [dy, x])):
            return super().cross_moments(dy, x, mean, block_axis)
        blocks, count, d = _sizes(x, block_axis)
        size = variant(d)
        programs, stretch = stretches(self.launch.processors, blocks, count, min(1024 // size, 256))
        products, sums = (self._empty(x, blocks * programs, *shape) for shape in ((d, d), (d,)))
        s, k = (self._empty(x, blocks, *shape) for shape in ((d,), (d, d)))
        views = *_view(dy, block_axis), *_view(x, block_axis)
        self.launch(
            "cross_moments.cu",
            f"partial_cross_moments<{_type(dy)}, {_type(x)}, {size}>",
            blocks * programs,
            PRODUCT_THREADS,
            (*views, self.in_order(mean), d, x.shape[3], count, programs, stretch, products, sums),
        )
        self.launch(
            "cross_moments.cu",
            f"combine_cross_moments<{_type(s)}, {size}>",
            blocks * d,
            PRODUCT_THREADS,
            (products, sums, programs, d, s, k),
        )
        return s, k

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Array | None,
        block_axis: int,
        dtype: Any,
        *,
        row_scale: Array | None = None,
    ) -> Array:
        """Sum of matrix (array - centre) over one or two terms, plus bias (blocks, d); (p, q, d, l) of `dtype`."""
        terms = self.scaled(terms, row_scale)
        arrays = [term.array for term in terms]
        values = [value for matrix, _, centre in terms for value in (matrix, centre)] + [bias] * (bias is not None)
        x = arrays[0]
        blocks, count, d = _sizes(x, block_axis)
        size, itemsize = variant(d), values[0].dtype.itemsize
        shared = map_memory(size, itemsize, len(terms))
        if not (
            len(terms) <= 2
            and all(_is_served(array, block_axis) for array in arrays)
            and self._are_statistics(values, arrays)
            and self._fits(shared)
        ):
            return super().affine_map(terms, bias, block_axis, dtype)
        y = self.xp.empty(x.shape, dtype=dtype)
        programs = map_programs(self.launch.processors, blocks, count)
        given: list[Any] = []
        for matrix, array, centre in terms:
            strides = (stride // matrix.itemsize for stride in matrix.strides)
            given += [*_view(array, block_axis), matrix, *strides, self.in_order(centre)]
        none = [0] * len(given) if len(terms) == 1 else []
        rest = 0 if bias is None else self.in_order(bias), d, x.shape[3], count, programs
        self.launch(
            "affine_map.cu",
            f"affine_map<{_type(x)}, {_type(arrays[-1])}, {_type(y)}, {size}>",
            blocks * programs,
            AFFINE_THREADS,
            (*given, *none, *_view(y, block_axis), *rest),
            shared,
        )
        return y

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """W = (cov + eps I)^(-1/2); of Newton's iteration in one launch."""
        if not (solver.newton_steps(cov.itemsize) is not None and self._is_iterated(cov, ROOT_MATRICES)):
            return super().inverse_sqrt(solver, cov, eps)
        return self._newton("newton", solver, [cov], eps, ROOT_MATRICES)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Gradient of a loss with respect to cov; of Newton's iteration in one launch."""
        alike = grad.dtype == cov.dtype and grad.shape == cov.shape
        if not (solver.newton_steps(cov.itemsize) is not None and alike and self._is_iterated(cov, ADJOINT_MATRICES)):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        return self._newton("newton_adjoint", solver, [cov, grad], eps, ADJOINT_MATRICES)

    def accumulation_dtype(self, dtype: Any) -> Any:
        """As inherited; without a look at what NumPy knows of the dtype, which takes longer than a launch."""
        return dtype if dtype.char in "fd" else super().accumulation_dtype(dtype)

    def _is_iterated(self, cov: Array, matrices: int) -> bool:
        return (
            cov.dtype.char in "fd"
            and cov.shape[-1] <= SIZES[-1]
            and 0 < cov.size < LIMIT
            and self._fits(newton_memory(variant(cov.shape[-1]), cov.itemsize, matrices))
        )

    def _newton(self, kernel: str, solver: Newton, given: list[Array], eps: float, matrices: int) -> Array:
        cov, d = given[0], given[0].shape[-1]
        size = variant(d)
        result = self.xp.empty(cov.shape, dtype=cov.dtype)
        self.launch(
            "newton.cu",
            f"{kernel}<{_type(cov)}, {size}>",
            cov.size // d**2,
            NEWTON_THREADS[size],
            (*map(self.in_order, given), float(eps), solver.iterations, d, result),
            newton_memory(size, cov.itemsize, matrices),
        )
        return result

    def _empty(self, x: Array, *shape: int) -> Array:
        return self.xp.empty(shape, dtype=self.accumulation_dtype(x.dtype))

    def in_order(self, array: Array) -> Array:
        """The array itself, or where it is a view at other strides than those of its shape, a copy."""
        ordered: Array = self.xp.ascontiguousarray(array)
        return ordered

    def _are_statistics(self, values: Sequence[Array], arrays: Sequence[Array]) -> bool:
        """Whether `values` have the dtype that statistics of each of the arrays are computed in."""
        return all(value.dtype == self.accumulation_dtype(array.dtype) for value in values for array in arrays)

    def _fits(self, shared: int) -> bool:
        return shared + STATIC <= self.launch.shared_memory


def _is_served(x: Array, block_axis: int) -> bool:
    return x.dtype.char in TYPES and is_sized(x, block_axis)


def _sizes(x: Array, block_axis: int) -> tuple[int, int, int]:
    """Blocks, samples of each, and variables."""
    return x.shape[block_axis], x.shape[1 - block_axis] * x.shape[3], x.shape[2]


def _type(array: Array) -> str:
    return TYPES[array.dtype.char]


def _view(x: Array, block_axis: int) -> tuple[Any, ...]:
    """An array as kernels take it: strides of block, outer axis, variable and inner axis, in elements.

    Lastly, whether neighbouring threads should take neighbouring samples rather than variables.
    """
    block, outer, variable, inner = (x.strides[axis] // x.itemsize for axis in (block_axis, 1 - block_axis, 2, 3))
    between_samples = inner if x.shape[3] > 1 else outer
    return x, block, outer, variable, inner, along_samples(x.shape, between_samples, variable)
