"""The compiled kernels on a library's arrays, of which they only need the addresses."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np

from polywhiten._types import Array
from polywhiten.compiled import newton
from polywhiten.compiled.affine_map import affine_map, arrange
from polywhiten.compiled.moments import cross_moments, moments, whole_cross_moments, whole_moments
from polywhiten.compiled.panels import APART, COLUMNS, OWN, Channels, Layout, is_interleaved, padded, width
from polywhiten.compiled.parallel import address as memory
from polywhiten.compiled.parallel import bits, run
from polywhiten.kernels import Term
from polywhiten.solvers.newton import Newton

_WORTH = 1 << 18  # operations that are worth another thread
_SHARED = 160  # as large are matrices whose phases are worth a call each
_MOST = 1 << 26  # bytes of memory that is kept for the next call
_NO_CHANNELS = Channels(0, 1)


class Library(Protocol):
    """What is asked of a library of arrays: float32 or float64, in the memory of the CPU."""

    def address(self, array: Array) -> int: ...
    def strides(self, array: Array) -> Sequence[int]:
        """In numbers, not bytes."""

    def dtype(self, array: Array) -> str: ...
    def empty(self, shape: tuple[int, ...], like: Array) -> Array: ...
    def converted(self, array: np.ndarray[Any, Any], like: Array) -> Array:
        """NumPy's array as one of this library."""

    def empty_like(self, array: Array) -> Array:
        """With the array's axes in the same order in memory."""

    def in_order_of(self, array: Array, other: Array) -> Array:
        """A copy with axes in memory as those of the other array."""

    def contiguous(self, array: Array) -> Array: ...
    def threads(self) -> int: ...


class Calls(NamedTuple):
    """The five kernels over a library."""

    library: Library

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Mean (blocks, d) and covariance (blocks, d, d)."""
        layout, address = self._layout(x, block_axis), self.library.address
        blocks, d, dp, dtype = layout.blocks, layout.d, padded(layout.d), self.library.dtype(x)
        mean, cov = self.library.empty((blocks, d), x), self.library.empty((blocks, d, d), x)
        workers, chunks = self._shares(layout)
        scratch, sums = _scratch(workers, d, dtype), _workspace("sums", blocks * chunks * dp * dp, dtype)
        means = _workspace("means", blocks * _panels(layout) * dp, dtype)
        given = workers, chunks, _as_rows(layout, block_axis), address(x), memory(sums), memory(means), *layout
        run(moments, workers, scratch, *given)
        workers = min(workers, blocks, self._workers(blocks * dp * dp * (chunks + _panels(layout))))
        run(whole_moments, workers, scratch, workers, *given[1:], address(mean), address(cov))
        return mean, cov

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S and K."""
        s, k, _ = self._cross_moments(dy, x, mean, block_axis, None, None, _NO_CHANNELS)
        return s, k

    def cross_moments_of_channels(
        self, dy: Array, x: Array, mean: Array, whitener: Array, weight: Array | None, channels: Channels
    ) -> tuple[Array, Array, Array, Array]:
        """S and K of dY times its channels' weights, and the gradients (channels,) of weight and bias."""
        s, k, parameters = self._cross_moments(dy, x, mean, 0, whitener, weight, channels)
        return s, k, parameters[0], parameters[1]

    def _cross_moments(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        block_axis: int,
        whitener: Array | None,
        weight: Array | None,
        channels: Channels,
    ) -> tuple[Array, Array, Array]:
        library, address = self.library, self.library.address
        layout = self._layout(x, block_axis)
        if _order(self._layout(dy, block_axis), block_axis) != _order(layout, block_axis):
            x = library.in_order_of(x, x)  # where it isn't dense, no copy of dy may have its order
            layout = self._layout(x, block_axis)
        dy, dy_layout = self._alike(dy, block_axis, like=x)
        blocks, d, dp, dtype = layout.blocks, layout.d, padded(layout.d), library.dtype(x)
        mean, weight = self._given(mean, blocks, d), self._given(weight, channels.number)
        whitener = self._given(whitener, blocks, d, d)
        s, k = library.empty((blocks, d), x), library.empty((blocks, d, d), x)
        workers, chunks = self._shares(layout)
        scratch, sums = _scratch(workers, d, dtype), _workspace("sums", blocks * chunks * dp * (dp + 1), dtype)
        gradients = np.zeros((workers, 2, channels.number))
        addresses = *map(address, (dy, x, mean)), memory(sums), self._address(whitener), self._address(weight)
        as_rows = _as_rows(layout, block_axis)
        run(
            cross_moments,
            workers,
            scratch,
            workers,
            chunks,
            as_rows,
            *addresses,
            memory(gradients),
            *channels,
            *dy_layout,
            *layout,
        )
        workers = min(workers, blocks, self._workers(blocks * dp * dp * chunks))
        run(whole_cross_moments, workers, scratch, workers, chunks, blocks, d, memory(sums), address(s), address(k))
        return s, k, library.converted(gradients.sum(0), x)

    def affine_map(
        self,
        terms: Sequence[Term],
        shift: Array | None,
        block_axis: int,
        channels: Channels = _NO_CHANNELS,
        before: Array | None = None,
        after: Array | None = None,
        bias: Array | None = None,
    ) -> Array:
        """The sum of the terms, plus shift (blocks, d).

        The channels' values, where there are any: the first term's array is multiplied with `before`, the result with
        `after`, and then `bias` is added.
        """
        library, address = self.library, self.library.address
        x = terms[-1].array  # of two, that which is no gradient
        y = library.empty_like(x)
        layout = self._layout(y, block_axis)
        blocks, d = layout.blocks, layout.d
        shift = self._given(shift, blocks, d)
        before, after, bias = (self._given(values, channels.number) for values in (before, after, bias))
        numbers, kept = [], []
        for term in terms:
            array, own = self._alike(term.array, block_axis, like=y)
            kept += [array, self._given(term.matrix, blocks, d, d), self._given(term.centre, blocks, d)]
            numbers += [*map(address, kept[-3:]), *own]
        if len(terms) == 1:
            numbers += [0, 0, 0, *layout]
        dp, dtype = padded(d), library.dtype(x)
        workers, _ = self._shares(layout, len(terms))
        scratch = _scratch(workers, d, dtype)
        arranged = _workspace("matrices", blocks * len(terms) * dp * dp, dtype)
        values = map(self._address, (shift, before, after, bias))
        as_rows = _as_rows(layout, block_axis)
        given = len(terms), as_rows, memory(arranged), address(y), *values, channels.positions, *numbers, *layout
        few = min(blocks, self._workers(blocks * len(terms) * dp * dp))
        run(arrange, few, scratch, few, *given)
        run(affine_map, workers, scratch, workers, *given)
        return y

    def inverse_sqrt(self, solver: Newton, cov: Array, eps: float) -> Array:
        """W."""
        cov = self.library.contiguous(cov)
        w = self.library.empty(tuple(cov.shape), cov)
        self._solve(newton.inverse_sqrt, False, solver, cov, eps, w)
        return w

    def inverse_sqrt_adjoint(self, solver: Newton, cov: Array, grad: Array, eps: float) -> Array:
        """Gradient with respect to cov."""
        cov, grad = self.library.contiguous(cov), self.library.contiguous(grad)
        result = self.library.empty(tuple(cov.shape), cov)
        self._solve(newton.inverse_sqrt_adjoint, True, solver, cov, eps, grad, result)
        return result

    def _solve(
        self, kernel: Callable[..., None], derivative: bool, solver: Newton, cov: Array, eps: float, *others: Array
    ) -> None:
        """Matrices of their own for each worker; or, where large matrices are few, a phase of all at a time."""
        *blocks, d, _ = cov.shape
        number, dtype, dp = math.prod(blocks), self.library.dtype(cov), padded(d)
        workers = self._workers(number * dp**3 * solver.iterations)
        shared = number < workers and d >= _SHARED
        if not shared:
            workers = min(workers, number)
        reals = bits(eps), bits(float(np.finfo(dtype).smallest_normal))
        given = *reals, *map(self.library.address, (cov, *others))
        if shared:
            matrices = _workspace("matrices", number * newton.memory(d, derivative), dtype)
            scratch = _workspaces("scratch", workers, 1, dtype)
            for phase in range(newton.phases(solver.iterations, derivative)):
                run(kernel, workers, scratch, workers, phase, number, d, solver.iterations, memory(matrices), *given)
        else:
            scratch = _workspaces("scratch", workers, newton.memory(d, derivative), dtype)
            run(kernel, workers, scratch, workers, -1, number, d, solver.iterations, 0, *given)

    def _given(self, array: Array | None, *shape: int) -> Array | None:
        """An array, as kernels read it."""
        if array is None:
            return None
        if tuple(array.shape) != shape:
            raise ValueError(f"statistics or values of channels have shape {tuple(array.shape)}: they need {shape}")
        return self.library.contiguous(array)

    def _address(self, array: Array | None) -> int:
        return 0 if array is None else self.library.address(array)

    def _layout(self, x: Array, block_axis: int) -> Layout:
        shape, strides = x.shape, list(self.library.strides(x))
        if shape[2] == 1:
            strides[2] = shape[3]  # any number stands for an array of one, but it decides on the order of samples
        blocks, outer = block_axis, 1 - block_axis
        if shape[3] == 1 and block_axis == 1:  # rows
            return Layout(shape[1], 1, shape[2], shape[0], strides[1], 0, strides[2], strides[0])
        return Layout(*(shape[i] for i in (blocks, outer, 2, 3)), *(strides[i] for i in (blocks, outer, 2, 3)))

    def _alike(self, array: Array, block_axis: int, like: Array) -> tuple[Array, Layout]:
        """An array whose panels have their samples in the order of those of a new array, and its layout."""
        layout = self._layout(array, block_axis)
        if _order(layout, block_axis) == _order(self._layout(like, block_axis), block_axis):
            return array, layout
        array = self.library.in_order_of(array, like)
        return array, self._layout(array, block_axis)

    def _shares(self, layout: Layout, terms: int = 1) -> tuple[int, int]:
        """Threads, and in how many parts they share a block."""
        count = layout.outer * layout.inner
        workers = self._workers(terms * layout.blocks * count * padded(layout.d) ** 2)
        chunks, most = 1, _panels(layout)
        while layout.blocks * chunks % workers and layout.blocks * chunks < 8 * workers and chunks < most:
            chunks += 1
        return workers, chunks

    def _workers(self, operations: int) -> int:
        return int(min(self.library.threads(), numba.config.NUMBA_NUM_THREADS, 1 + operations // _WORTH))


def _panels(layout: Layout) -> int:
    return int(-(-layout.outer * layout.inner // width(layout)))


def _as_rows(layout: Layout, block_axis: int) -> bool:
    return block_axis == 1 and layout.d_stride == 1 and layout.inner_stride != 1


def _order(layout: Layout, block_axis: int) -> tuple[bool, bool]:
    """In which a panel's samples are counted."""
    return _as_rows(layout, block_axis), is_interleaved(layout)


class _Kept(threading.local):
    """A thread's memory, as large as it had to be so far: new memory costs more than a small kernel."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, str], np.ndarray[Any, Any]] = {}


_KEPT = _Kept()


def _workspace(name: str, count: int, dtype: str) -> np.ndarray[Any, Any]:
    kept = _KEPT.arrays.get((name, dtype))
    if kept is None or kept.size < count:
        kept = np.empty(count, dtype)
        if kept.nbytes <= _MOST:
            _KEPT.arrays[name, dtype] = kept
    return kept


def _scratch(workers: int, d: int, dtype: str) -> np.ndarray[Any, Any]:
    """For each worker, what the largest of the kernels needs."""
    dp = padded(d)
    panel = COLUMNS * (dp + APART) + dp * (COLUMNS + APART)
    return _workspaces("scratch", workers, 3 * panel + dp * dp + 4 * COLUMNS + 4 * dp + OWN, dtype)


def _workspaces(name: str, number: int, size: int, dtype: str) -> np.ndarray[Any, Any]:
    return _workspace(name, number * size, dtype)[: number * size].reshape(number, size)
