"""The compiled kernels with a library's arrays: addresses and layouts as the numbers that they are called with.

Each method gives results that are yet to be computed, and the steps that compute them. Every step can be shared by
workers in any number of parts, up to the number of blocks or panels; where that is the number of blocks and there is
one chunk, a part of any of them is one block, and all of a block's steps can follow each other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from polywhiten._types import Array
from polywhiten.cpu.arguments import (
    AffineMapArgs,
    CrossMomentsArgs,
    FinishCrossMomentsArgs,
    FinishMomentsArgs,
    GradientTermsArgs,
    InverseSqrtArgs,
    MomentsArgs,
    ScaleWhitenerArgs,
    TermArgs,
)
from polywhiten.cpu.device import newton
from polywhiten.cpu.device.affine_map import affine_map, pack_matrices
from polywhiten.cpu.device.cross_moments import cross_moments, finish_cross_moments
from polywhiten.cpu.device.gemm import list_memory
from polywhiten.cpu.device.gradients import gradient_terms, scale_whitener
from polywhiten.cpu.device.moments import finish_moments, moments
from polywhiten.cpu.device.packing import (
    Channels,
    Layout,
    is_interleaved,
    padded,
    panels_memory,
    width_of_runs,
)
from polywhiten.cpu.device.simd import LINE
from polywhiten.cpu.runtime.parallel import Launch
from polywhiten.cpu.runtime.parallel import address as memory
from polywhiten.kernels import Term
from polywhiten.solvers.newton import Newton

_MOST = 1 << 26  # bytes of memory that is kept for the next call
_LARGE = 1 << 22  # bytes of a result whose next reader is no slower where it has to fetch it from memory
NO_CHANNELS = Channels(0, 1)


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


class Steps(NamedTuple):
    """Over a library, for arrays (p, q, d, l) with blocks along an axis."""

    library: Library
    block_axis: int

    def moments(self, x: Array, chunks: int = 1) -> tuple[tuple[Array, Array], Launch, Launch]:
        """Mean (blocks, d) and covariance (blocks, d, d): sums, each block's in so many chunks, and these together."""
        layout, address = self.layout(x), self.library.address
        blocks, d, dp, dtype = layout.blocks, layout.d, padded(layout.d), self.library.dtype(x)
        mean, cov = self.library.empty((blocks, d), x), self.library.empty((blocks, d, d), x)
        sums = _workspace("sums", blocks * chunks * dp * dp, dtype)
        means = _workspace("means", blocks * panels(layout) * dp, dtype)
        args = MomentsArgs(
            num_chunks=chunks,
            as_rows=self._as_rows(layout),
            x=address(x),
            products=memory(sums),
            panel_means=memory(means),
            layout=layout,
        )
        kept = x, mean, cov, sums, means
        finish = FinishMomentsArgs(args, address(mean), address(cov))
        return (mean, cov), Launch(moments, args, kept), Launch(finish_moments, finish, kept)

    def cross_moments(
        self,
        dy: Array,
        x: Array,
        mean: Array,
        chunks: int = 1,
        channels: Channels = NO_CHANNELS,
        whitener: Array | None = None,
        weight: Array | None = None,
        place: int = 0,
    ) -> tuple[tuple[Array, Array], Launch, Launch]:
        """S and K: sums, and these together.

        Where there is a whitener: of dY times the weight of its channels; what workers add to the gradients of weight
        and bias (2, channels), as float64, comes at that place in their scratch memory.
        """
        library, address = self.library, self.library.address
        layout, dy_layout = self.layout(x), self.layout(dy)
        if self._order(dy_layout) != self._order(layout):
            x = library.in_order_of(x, x)  # where it isn't dense, no copy of dy may have its order
            dy, layout = library.in_order_of(dy, x), self.layout(x)
            dy_layout = self.layout(dy)
        blocks, d, dp, dtype = layout.blocks, layout.d, padded(layout.d), library.dtype(x)
        mean, weight = self._given(mean, blocks, d), self._given(weight, channels.number)
        whitener = self._given(whitener, blocks, d, d)
        s, k = library.empty((blocks, d), x), library.empty((blocks, d, d), x)
        sums = _workspace("cross sums", blocks * chunks * dp * (dp + 1), dtype)
        args = CrossMomentsArgs(
            num_chunks=chunks,
            as_rows=self._as_rows(layout),
            dy=address(dy),
            x=address(x),
            mean=address(mean),
            sums=memory(sums),
            whitener=self._address(whitener),
            weight=self._address(weight),
            parameter_sums=place,
            channels=channels,
            dy_layout=dy_layout,
            x_layout=layout,
        )
        finish = FinishCrossMomentsArgs(chunks, blocks, d, memory(sums), address(s), address(k))
        return (
            (s, k),
            Launch(cross_moments, args, (dy, x, mean, weight, whitener, sums)),
            Launch(finish_cross_moments, finish, (s, k, sums)),
        )

    def affine_map(
        self,
        terms: Sequence[Term],
        shift: Array | None,
        by_block: bool,
        channels: Channels = NO_CHANNELS,
        before: Array | None = None,
        after: Array | None = None,
        bias: Array | None = None,
        weight: Array | None = None,
    ) -> tuple[Array, Launch, Launch]:
        """The sum of the terms, plus shift (blocks, d): matrices as panels are multiplied with them, and the map.

        The rows of the first term's matrices are multiplied with the weight (blocks, d), if any. The channels' values,
        where there are any: the first term's array is multiplied with `before`, or the result with `after`, and `bias`
        is added to it. Parts of the map are whole blocks, one after another, if `by_block`.
        """
        library, address = self.library, self.library.address
        x = terms[-1].array  # of two, that which is no gradient
        y = library.empty_like(x)
        layout = self.layout(y)
        blocks, d, dp = layout.blocks, layout.d, padded(layout.d)
        shift, weight = self._given(shift, blocks, d), self._given(weight, blocks, d)
        before, after, bias = (self._given(values, channels.number) for values in (before, after, bias))
        packed, kept, order = [], [y, shift, before, after, bias, weight], self._order(layout)
        for term in terms:
            array, own = term.array, self.layout(term.array)
            if self._order(own) != order:
                array = library.in_order_of(array, y)
                own = self.layout(array)
            kept += [array, self._given(term.matrix, blocks, d, d), self._given(term.centre, blocks, d)]
            packed.append(TermArgs(*map(address, kept[-3:]), own))
        arranged = _workspace("matrices", blocks * len(terms) * dp * dp, library.dtype(x))
        kept.append(arranged)
        as_rows, _ = order
        args = AffineMapArgs(
            num_terms=len(terms),
            as_rows=as_rows,
            first=packed[0],
            second=packed[1] if len(terms) == 2 else TermArgs(0, 0, 0, layout),
            row_scale=self._address(weight),
            packed_matrices=memory(arranged),
            y=address(y),
            shift=self._address(shift),
            input_weight=self._address(before),
            output_weight=self._address(after),
            channel_bias=self._address(bias),
            channels=channels,
            panels_first=not by_block and (as_rows or layout.block_stride < layout.outer_stride),
            nontemporal=as_rows and self._go_past_caches(y, layout),
            y_layout=layout,
        )
        return y, Launch(pack_matrices, args, kept), Launch(affine_map, args, kept)

    def fold_weight(self, w: Array, weight: Array, k: Array) -> tuple[Array, Array, Launch]:
        """A', of A = diag(weight) W, and the weight's gradient."""
        blocks, d, _ = w.shape
        w, weight = self._given(w, blocks, d, d), self._given(weight, blocks, d)
        a, gradient = self.library.empty((blocks, d, d), w), self.library.empty((blocks, d), w)
        arrays = w, weight, k, a, gradient
        args = ScaleWhitenerArgs(blocks, d, *map(self.library.address, arrays))
        return a, gradient, Launch(scale_whitener, args, arrays)

    def gradient_terms(self, ds: Array, s: Array, count: int) -> tuple[Array, Launch]:
        """S / M, and (dS + dS') / M in place of dS."""
        blocks, d = s.shape
        centre = self.library.empty((blocks, d), s)
        arrays = ds, s, centre
        return centre, Launch(gradient_terms, GradientTermsArgs(blocks, d, count, *map(self._address, arrays)), arrays)

    def layout(self, x: Array) -> Layout:
        shape, strides = x.shape, list(self.library.strides(x))
        if shape[2] == 1:
            strides[2] = shape[3]  # any number stands for an array of one, but it decides on the order of samples
        blocks, outer = self.block_axis, 1 - self.block_axis
        if shape[3] == 1 and self.block_axis == 1:  # rows
            return Layout(shape[1], 1, shape[2], shape[0], strides[1], 0, strides[2], strides[0])
        return Layout(*(shape[i] for i in (blocks, outer, 2, 3)), *(strides[i] for i in (blocks, outer, 2, 3)))

    def _given(self, array: Array | None, *shape: int) -> Array | None:
        """An array, as kernels read it."""
        if array is None:
            return None
        if tuple(array.shape) != shape:
            raise ValueError(f"statistics or values of channels have shape {tuple(array.shape)}: they need {shape}")
        return self.library.contiguous(array)

    def _address(self, array: Array | None) -> int:
        return 0 if array is None else self.library.address(array)

    def _as_rows(self, layout: Layout) -> bool:
        return self.block_axis == 1 and layout.d_stride == 1 and layout.inner_stride != 1

    def _go_past_caches(self, y: Array, layout: Layout) -> bool:
        """Whether a result is so large that rows written past the caches pay, and these begin where lines do."""
        size = np.dtype(self.library.dtype(y)).itemsize
        places = self.library.address(y), layout.block_stride * size, layout.inner_stride * size
        return math.prod(y.shape) * size >= _LARGE and all(place % LINE == 0 for place in places)

    def _order(self, layout: Layout) -> tuple[bool, bool]:
        """In which a panel's samples are counted."""
        interleaved = is_interleaved.py_func(layout)  # a call of what is compiled takes ten times as long
        return self._as_rows(layout), interleaved


def panels(layout: Layout) -> int:
    """How many a block has."""
    return int(-(-layout.outer * layout.inner // width_of_runs(layout)))


class _Kept(threading.local):
    """A thread's memory, as large as it had to be so far: new memory costs more than a small kernel."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, str], np.ndarray[Any, Any]] = {}


_KEPT = _Kept()


def _workspace(name: str, count: int, dtype: str) -> np.ndarray[Any, Any]:
    kept = _KEPT.arrays.get((name, dtype))
    if kept is None or kept.size < count:
        kept = _empty_lines(count, dtype)
        if kept.nbytes <= _MOST:
            _KEPT.arrays[name, dtype] = kept
    return kept


def _empty_lines(count: int, dtype: str) -> np.ndarray[Any, Any]:
    """Numbers from the beginning of a line of the caches on: vectors that lie across two cost twice as much."""
    each = LINE // np.dtype(dtype).itemsize
    array = np.empty(count + each, dtype)
    first = -memory(array) % LINE * each // LINE
    return array[first : first + count]


def solve(
    library: Library,
    solver: Newton,
    eps: float,
    phased: bool,
    cov: Array,
    grad: Array | None = None,
    weight: Array | None = None,
    whitener: Array | None = None,
) -> tuple[Array, list[Launch]]:
    """W of a covariance; or, of that and W's gradient with its rows times the weight (blocks, d), its own.

    In one step, whose workers have matrices of their own in their scratch memory; or, if `phased`, in one for each
    phase of the iteration, which all workers begin together. With a gradient, W goes to `whitener` where there is that.
    """
    derivative, (*blocks, d, _) = grad is not None, cov.shape
    arrays = [None if array is None else library.contiguous(array) for array in (cov, grad, weight)]
    cov, grad, weight = arrays
    number, dtype = math.prod(blocks), library.dtype(cov)
    result = library.empty((*blocks, d, d), cov)
    matrices = _workspace("matrices", number * newton.workspace_size(d, derivative), dtype) if phased else None
    args = InverseSqrtArgs(
        phase=-1,
        blocks=number,
        d=d,
        steps=solver.iterations,
        eps=eps,
        smallest_normal=float(np.finfo(dtype).smallest_normal),
        matrices=0 if matrices is None else memory(matrices),
        cov=library.address(cov),
        whitener=library.address(result) if not derivative else 0 if whitener is None else library.address(whitener),
        grad=0 if grad is None else library.address(grad),
        row_scale=0 if weight is None else library.address(weight),
        dcov=library.address(result) if derivative else 0,
    )
    kernel = newton.inverse_sqrt_adjoint if derivative else newton.inverse_sqrt
    phases = range(newton.num_phases(solver.iterations, derivative)) if phased else [-1]
    kept = *arrays, result, whitener, matrices
    return result, [Launch(kernel, args._replace(phase=phase), kept) for phase in phases]


def scratch_size(d: int) -> int:
    """Numbers that a worker needs for panels and the list of lines, and an even number."""
    return int(panels_memory.py_func(d) + list_memory(d))  # nothing to compile for that


def scratch(workers: int, size: int, dtype: str) -> np.ndarray[Any, Any]:
    """Memory of each worker's own, (workers, size)."""
    size = padded(size)
    return _workspace("scratch", workers * size, dtype)[: workers * size].reshape(workers, size)
