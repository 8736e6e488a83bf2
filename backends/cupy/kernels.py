"""The five kernels in CUDA. They read arrays at any strides, once each, so that no array is copied or centred.

`polywhiten.cupy.implementation` calls them only with arrays that fit a variant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polywhiten._types import Array
from polywhiten.cupy.partition import map_parts, sum_parts
from polywhiten.cupy.variants import (
    ADJOINT_MATRICES,
    MAP_THREADS,
    MAX_COUNT,
    NEWTON_THREADS,
    PRODUCT_THREADS,
    ROOT_MATRICES,
    SIZES,
    STATIC_BYTES,
    TYPES,
    along_samples,
    map_bytes,
    newton_bytes,
    variant_size,
)
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import Solver


class Launcher(Protocol):
    """Launches kernels: a `CudaLauncher`, except in tests."""

    @property
    def multiprocessors(self) -> int: ...

    @property
    def max_shared_memory(self) -> int: ...

    def counters(self, count: int) -> Array:
        """Return at least `count` 32-bit counters, all 0, for launches on the current stream that leave them 0."""

    def __call__(
        self, file: str, name: str, thread_blocks: int, threads: int, args: tuple[Any, ...], shared: int = 0
    ) -> None: ...


@dataclass(frozen=True)
class CupyKernels(Kernels):
    """Kernels on CuPy's arrays, on the current stream. They never wait for the device."""

    reads_any_order = True

    launch: Launcher

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Return mean and covariance of every block, by two launches."""
        blocks, count, d = _sizes(x, block_axis)
        size = variant_size(d)
        num_parts, samples_per_part = sum_parts(self.launch.multiprocessors, blocks, count, min(2048 // size, 256))
        dtype = self.accumulation_dtype(x.dtype)
        shifts, mean, cov = (self.xp.empty((blocks, *shape), dtype=dtype) for shape in ((d,), (d,), (d, d)))
        products, sums = (self.xp.empty((blocks * num_parts, *shape), dtype=dtype) for shape in ((d, d), (d,)))
        inner = x.shape[3]
        self.launch(
            "moments.cu",
            f"partial_moments<{_type(x)}, {size}>",
            blocks * num_parts,
            PRODUCT_THREADS,
            (*_view(x, block_axis), d, inner, count, num_parts, samples_per_part, shifts, products, sums),
        )
        self.launch(
            "moments.cu",
            f"combine_moments<{_type(mean)}, {size}>",
            blocks * d,
            PRODUCT_THREADS,
            (shifts, products, sums, num_parts, d, float(count), mean, cov),
        )
        return mean, cov

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """Return s = dY 1 (blocks, d) and K = dY (X - mean)' (blocks, d, d), by two launches."""
        blocks, count, d = _sizes(x, block_axis)
        size = variant_size(d)
        num_parts, samples_per_part = sum_parts(self.launch.multiprocessors, blocks, count, min(1024 // size, 256))
        dtype = self.accumulation_dtype(x.dtype)
        products, sums = (self.xp.empty((blocks * num_parts, *shape), dtype=dtype) for shape in ((d, d), (d,)))
        s, k = (self.xp.empty((blocks, *shape), dtype=dtype) for shape in ((d,), (d, d)))
        views = *_view(dy, block_axis), *_view(x, block_axis)
        mean, inner = self.contiguous(mean, dtype), x.shape[3]
        self.launch(
            "cross_moments.cu",
            f"partial_cross_moments<{_type(dy)}, {_type(x)}, {size}>",
            blocks * num_parts,
            PRODUCT_THREADS,
            (*views, mean, d, inner, count, num_parts, samples_per_part, products, sums),
        )
        self.launch(
            "cross_moments.cu",
            f"combine_cross_moments<{_type(s)}, {size}>",
            blocks * d,
            PRODUCT_THREADS,
            (products, sums, num_parts, d, s, k),
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
        """Return the sum of one or two terms plus bias, by one launch if its matrices fit in shared memory."""
        terms = self.scaled(terms, row_scale)
        x, last_x = terms[0].array, terms[-1].array
        blocks, count, d = _sizes(x, block_axis)
        size, accumulation_dtype = variant_size(d), self.accumulation_dtype(x.dtype)
        shared = map_bytes(size, 8 if x.itemsize == 8 else 4, len(terms))
        if not self._fits(shared):
            return super().affine_map(terms, bias, block_axis, dtype)
        y = self.xp.empty(x.shape, dtype=dtype)
        num_parts = map_parts(self.launch.multiprocessors, blocks, count)
        inputs = [arg for term in terms for arg in self._term(term, block_axis, accumulation_dtype)]
        absent = [0] * len(inputs) if len(terms) == 1 else []
        bias, inner = 0 if bias is None else self.contiguous(bias, accumulation_dtype), x.shape[3]
        self.launch(
            "affine_map.cu",
            f"affine_map<{_type(x)}, {_type(last_x)}, {_type(y)}, {size}>",
            blocks * num_parts,
            MAP_THREADS,
            (*inputs, *absent, *_view(y, block_axis), bias, d, inner, count, num_parts),
            shared,
        )
        return y

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return W = (cov + eps I)^(-1/2), by one launch if the solver is Newton's iteration."""
        steps = self._newton_steps(solver, cov, ROOT_MATRICES)
        if steps is None:
            return super().inverse_sqrt(solver, cov, eps)
        return self._newton("newton", (cov,), eps, steps, ROOT_MATRICES)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Return the gradient with respect to cov, by one launch if the solver is Newton's iteration."""
        steps = self._newton_steps(solver, cov, ADJOINT_MATRICES)
        if steps is None or grad.dtype != cov.dtype or grad.shape != cov.shape:
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        return self._newton("newton_adjoint", (cov, grad), eps, steps, ADJOINT_MATRICES)

    def accumulation_dtype(self, dtype: Any) -> Any:
        """Return the dtype of statistics, without `finfo`, which takes longer than a launch."""
        return dtype if dtype.char in "fd" else super().accumulation_dtype(dtype)

    def contiguous(self, array: Array, dtype: Any) -> Array:
        """Return the array itself if it is contiguous and of this dtype, else a copy that is.

        What an `all_reduce` returns may have another dtype, which would make a kernel read past the array's end.
        """
        result: Array = self.xp.ascontiguousarray(array, dtype)
        return result

    def _newton_steps(self, solver: Solver, cov: Array, matrices: int) -> int | None:
        """Return the steps for a launch of Newton's iteration, or None if there is no kernel for the solver or cov."""
        steps = solver.newton_steps(cov.itemsize)
        d = cov.shape[-1]
        is_supported = (
            steps is not None
            and cov.dtype.char in "fd"
            and d <= SIZES[-1]
            and 0 < cov.size < MAX_COUNT
            and self._fits(newton_bytes(variant_size(d), cov.itemsize, matrices))
        )
        return steps if is_supported else None

    def _newton(self, kernel: str, inputs: tuple[Array, ...], eps: float, steps: int, matrices: int) -> Array:
        cov, d = inputs[0], inputs[0].shape[-1]
        size = variant_size(d)
        result = self.xp.empty(cov.shape, dtype=cov.dtype)
        self.launch(
            "newton.cu",
            f"{kernel}<{_type(cov)}, {size}>",
            cov.size // d**2,
            NEWTON_THREADS[size],
            (*(self.contiguous(matrices, cov.dtype) for matrices in inputs), float(eps), steps, d, result),
            newton_bytes(size, cov.itemsize, matrices),
        )
        return result

    def _term(self, term: Term, block_axis: int, dtype: Any) -> tuple[Any, ...]:
        """Return the arguments for a term: the view of its array, the matrix with its strides, and the centre."""
        matrix, array, centre = term
        if matrix.dtype != dtype:
            matrix = matrix.astype(dtype)
        block, row, column = (stride // matrix.itemsize for stride in matrix.strides)
        return *_view(array, block_axis), matrix, block, row, column, self.contiguous(centre, dtype)

    def _fits(self, shared: int) -> bool:
        """Return whether the device has this much dynamic shared memory for a map or for Newton's iteration."""
        return shared + STATIC_BYTES <= self.launch.max_shared_memory


def _sizes(x: Array, block_axis: int) -> tuple[int, int, int]:
    """Return the number of blocks, of samples in each, and of variables."""
    return x.shape[block_axis], x.shape[1 - block_axis] * x.shape[3], x.shape[2]


def _type(array: Array) -> str:
    return TYPES[array.dtype.char]


def _view(x: Array, block_axis: int) -> tuple[Any, ...]:
    """Return the arguments for an array: itself, its strides in elements, and `along_samples`."""
    block, outer, variable, inner = (x.strides[axis] // x.itemsize for axis in (block_axis, 1 - block_axis, 2, 3))
    between_samples = inner if x.shape[3] > 1 else outer
    return x, block, outer, variable, inner, along_samples(x.shape, between_samples, variable)
