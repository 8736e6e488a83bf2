"""The kernels as CUDA: which of their variants fits an array, and how many programs of it.

A program is a CUDA block. Each reads its part of an array once, at any strides, so no array is copied or centred.
More than 64 variables, other solvers than Newton's, and whatever else is rare have the inherited kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polywhiten._types import Array
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import Solver
from polywhiten.solvers.newton import Newton, is_iterated_in

TYPES = {"float16": "half", "float32": "float", "float64": "double"}  # by the dtype's name, in CUDA
SIZES = (4, 16, 32, 64)  # variables that a variant is made for; it serves fewer too

# These are the sources' own numbers, needed for a launch.
_PRODUCT_THREADS = 256
_AFFINE_THREADS = _AFFINE_TILE = 128
_NEWTON_THREADS = {4: 4, 16: 64, 32: 256, 64: 256}
_PACK = 16  # bytes
_STATIC = 4096  # bytes of shared memory that a kernel has at most beside what it is given at its launch

_LIMIT = 2**30  # samples of a block, and programs: the kernels count both in 32 bits


class Launcher(Protocol):
    """What runs a kernel: `CudaLauncher`, but for tests."""

    @property
    def processors(self) -> int: ...

    @property
    def shared_memory(self) -> int: ...

    def __call__(
        self, file: str, name: str, programs: int, threads: int, arguments: tuple[Any, ...], shared: int = 0
    ) -> None: ...


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
        size = _variant(d)
        programs, stretch = self._stretches(blocks, count, min(2048 // size, 256))
        shifts, mean, cov = (self._empty(x, blocks, *shape) for shape in ((d,), (d,), (d, d)))
        products, sums = (self._empty(x, blocks * programs, *shape) for shape in ((d, d), (d,)))
        self.launch(
            "moments.cu",
            f"moments<{_type(x)}, {size}>",
            blocks * programs,
            _PRODUCT_THREADS,
            (*_view(x, block_axis), d, x.shape[3], count, programs, stretch, shifts, products, sums),
        )
        self.launch(
            "moments.cu",
            f"finish_moments<{_type(mean)}, {size}>",
            blocks * d,
            _PRODUCT_THREADS,
            (shifts, products, sums, programs, d, float(count), mean, cov),
        )
        return mean, cov

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S = dY 1 (blocks, d) and K = dY (X - mean)' (blocks, d, d)."""
        if not (_is_served(x, block_axis) and _is_served(dy, block_axis) and self._are_statistics([mean], [dy, x])):
            return super().cross_moments(dy, x, mean, block_axis)
        blocks, count, d = _sizes(x, block_axis)
        size = _variant(d)
        programs, stretch = self._stretches(blocks, count, min(1024 // size, 256))
        products, sums = (self._empty(x, blocks * programs, *shape) for shape in ((d, d), (d,)))
        s, k = (self._empty(x, blocks, *shape) for shape in ((d,), (d, d)))
        views = *_view(dy, block_axis), *_view(x, block_axis)
        self.launch(
            "cross_moments.cu",
            f"cross_moments<{_type(dy)}, {_type(x)}, {size}>",
            blocks * programs,
            _PRODUCT_THREADS,
            (*views, self._in_order(mean), d, x.shape[3], count, programs, stretch, products, sums),
        )
        self.launch(
            "cross_moments.cu",
            f"finish_cross_moments<{_type(s)}, {size}>",
            blocks * d,
            _PRODUCT_THREADS,
            (products, sums, programs, d, s, k),
        )
        return s, k

    def affine_map(self, terms: Sequence[Term], bias: Array | None, block_axis: int, dtype: Any) -> Array:
        """Sum of matrix (array - centre) over one or two terms, plus bias (blocks, d); (p, q, d, l) of `dtype`."""
        arrays = [term.array for term in terms]
        values = [value for matrix, _, centre in terms for value in (matrix, centre)] + [bias] * (bias is not None)
        x = arrays[0]
        blocks, count, d = _sizes(x, block_axis)
        size, itemsize = _variant(d), values[0].dtype.itemsize
        pack = _PACK // itemsize
        shared = itemsize * size * (_AFFINE_TILE + pack + len(terms) * (size + pack))
        if not (
            len(terms) <= 2
            and all(_is_served(array, block_axis) for array in arrays)
            and self._are_statistics(values, arrays)
            and self._fits(shared)
        ):
            return super().affine_map(terms, bias, block_axis, dtype)
        y = self.xp.empty(x.shape, dtype=dtype)
        # three programs at a time on a multiprocessor, as far as registers allow
        programs = self._programs(blocks, -(-count // _AFFINE_TILE), 3)
        given: list[Any] = []
        for matrix, array, centre in terms:
            strides = (stride // matrix.itemsize for stride in matrix.strides)
            given += [*_view(array, block_axis), matrix, *strides, self._in_order(centre)]
        none = [0] * len(given) if len(terms) == 1 else []
        rest = 0 if bias is None else self._in_order(bias), d, x.shape[3], count, programs
        self.launch(
            "affine_map.cu",
            f"affine_map<{_type(x)}, {_type(arrays[-1])}, {_type(y)}, {size}>",
            blocks * programs,
            _AFFINE_THREADS,
            (*given, *none, *_view(y, block_axis), *rest),
            shared,
        )
        return y

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """W = (cov + eps I)^(-1/2); of Newton's iteration in one launch."""
        if not (is_iterated_in(solver, cov.itemsize) and self._is_iterated(cov, matrices=3)):
            return super().inverse_sqrt(solver, cov, eps)
        return self._newton("newton", solver, [cov], eps, matrices=3)

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Gradient of a loss with respect to cov; of Newton's iteration in one launch."""
        alike = grad.dtype == cov.dtype and grad.shape == cov.shape
        if not (is_iterated_in(solver, cov.itemsize) and alike and self._is_iterated(cov, matrices=6)):
            return super().inverse_sqrt_adjoint(solver, cov, grad, eps)
        return self._newton("newton_adjoint", solver, [cov, grad], eps, matrices=6)

    def _is_iterated(self, cov: Array, matrices: int) -> bool:
        return (
            cov.dtype.name in ("float32", "float64")
            and cov.shape[-1] <= SIZES[-1]
            and 0 < cov.size < _LIMIT
            and self._fits(_newton_memory(cov, matrices))
        )

    def _newton(self, kernel: str, solver: Newton, given: list[Array], eps: float, matrices: int) -> Array:
        cov, d = given[0], given[0].shape[-1]
        size = _variant(d)
        result = self.xp.empty(cov.shape, dtype=cov.dtype)
        self.launch(
            "newton.cu",
            f"{kernel}<{_type(cov)}, {size}>",
            cov.size // d**2,
            _NEWTON_THREADS[size],
            (*map(self._in_order, given), float(eps), solver.iterations, d, result),
            _newton_memory(cov, matrices),
        )
        return result

    def _stretches(self, blocks: int, count: int, tile: int) -> tuple[int, int]:
        """Programs for each block, and the samples that each adds up: 8 tiles or more, for what is left of them."""
        programs = self._programs(blocks, -(-count // (8 * tile)), 2)
        stretch = -(-count // (programs * tile)) * tile
        return -(-count // stretch), stretch

    def _programs(self, blocks: int, parts: int, at_once: int) -> int:
        """Programs for each block, which can be cut in `parts`, where a multiprocessor runs some at once.

        One round of programs where that fills the multiprocessors; else four, as the last may leave most of them idle.
        """
        places = self.launch.processors * at_once
        rounds = 1 if 4 * blocks <= places else 4
        return max(1, min(parts, rounds * places // blocks))

    def _empty(self, x: Array, *shape: int) -> Array:
        return self.xp.empty(shape, dtype=self.statistics_dtype(x.dtype))

    def _in_order(self, array: Array) -> Array:
        """The array itself, or where it is a view at other strides than those of its shape, a copy."""
        ordered: Array = self.xp.ascontiguousarray(array)
        return ordered

    def _are_statistics(self, values: Sequence[Array], arrays: Sequence[Array]) -> bool:
        """Whether `values` have the dtype that statistics of each of the arrays are computed in."""
        return all(value.dtype == self.statistics_dtype(array.dtype) for value in values for array in arrays)

    def _fits(self, shared: int) -> bool:
        return shared + _STATIC <= self.launch.shared_memory


def _is_served(x: Array, block_axis: int) -> bool:
    blocks, count, d = _sizes(x, block_axis)
    return x.dtype.name in TYPES and 0 < d <= SIZES[-1] and 0 < count < _LIMIT and 0 < blocks * SIZES[-1] < _LIMIT


def _sizes(x: Array, block_axis: int) -> tuple[int, int, int]:
    """Blocks, samples of each, and variables."""
    return x.shape[block_axis], x.shape[1 - block_axis] * x.shape[3], x.shape[2]


def _variant(d: int) -> int:
    return next((size for size in SIZES if d <= size), SIZES[-1])


def _type(array: Array) -> str:
    return TYPES[array.dtype.name]


def _view(x: Array, block_axis: int) -> tuple[Any, ...]:
    """An array as kernels take it: strides of block, outer axis, variable and inner axis, in elements.

    Lastly, whether neighbouring threads should take neighbouring samples rather than variables.
    """
    block, outer, variable, inner = (x.strides[axis] // x.itemsize for axis in (block_axis, 1 - block_axis, 2, 3))
    between_samples = inner if x.shape[3] > 1 else outer
    return x, block, outer, variable, inner, int(x.shape[2] == 1 or abs(between_samples) < abs(variable))


def _newton_memory(cov: Array, matrices: int) -> int:
    size, itemsize = _variant(cov.shape[-1]), int(cov.itemsize)
    return matrices * size * (size * itemsize + _PACK)
