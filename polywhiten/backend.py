"""What the core asks of a library of arrays: implementations of whitening, and how its arrays behave."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from polywhiten import checks
from polywhiten._types import Array, Namespace
from polywhiten.blocks import join_channels, take_channels
from polywhiten.kernels import Kernels
from polywhiten.moments import Float64, Moments
from polywhiten.reference import Gradients, Reference
from polywhiten.rows import RowInput, RowMap, like, row_blocks, row_sums, whole_row_spec
from polywhiten.solvers import Solver
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics, WhiteningStats, join_statistics

Pullback = Callable[[Array], Gradients]
Implementation = Reference  # an implementation inherits from the reference what it doesn't do faster


class Backend:
    """A library of arrays: its implementations, the fastest first, the plain one last.

    As it stands, it serves libraries that don't differentiate. One that does overrides `whiten_blocks`, and gives its
    framework `forward` and `backward` as an operation and its gradient.

    Parameters
    ----------
    kernels : Kernels
        The plain kernels, with the library's array namespace; every other implementation may leave arrays to them.
    *faster : Implementation
        Implementations that are asked before.
    """

    has_mutable_arrays: ClassVar[bool] = True  # whether a part of an array can be assigned to

    def __init__(self, kernels: Kernels, *faster: Implementation) -> None:
        self.kernels = kernels
        self.implementations: tuple[Implementation, ...] = (*faster, Reference(kernels))

    def implementation(self, spec: WhiteningSpec | None, x: Array, *others: Array | None) -> Implementation:
        """Return the first implementation that supports these arrays."""
        return next(each for each in self.implementations if each.supports(spec, x, *others))

    def kernels_for(self, cov: Array) -> Kernels:
        """Return the fastest kernels for covariances (..., d, d)."""
        return self.implementation(None, cov).kernels

    def whiten(self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None) -> Array:
        """Whiten an array, whose last group may be smaller than the others; differentiable if the library is."""
        return self._whiten_parts(spec, x, weight, bias)[0]

    def whiten_with_statistics(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, WhiteningStats]:
        """Like `whiten`, and return the statistics too, as layers need them for running averages."""
        y, stats = self._whiten_parts(spec, x, weight, bias)
        return y, join_statistics(self.kernels.xp, stats)

    def _whiten_parts(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, list[Statistics]]:
        parts = spec.equal_parts(x)
        if len(parts) == 1:
            y, one = self.whiten_blocks(parts[0][1], x, weight, bias)
            return y, [one]
        axis, outputs, stats = spec.blocks.axis, [], []
        for part, equal in parts:
            arrays = take_channels(x, part, axis), take_channels(weight, part), take_channels(bias, part)
            y, part_stats = self.whiten_blocks(equal, *arrays)
            outputs.append(y)
            stats.append(part_stats)
        return join_channels(self.kernels.xp, outputs, axis), stats

    def whiten_blocks(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Whiten an array of equal blocks, and return the statistics; differentiable if the library is."""
        return self.forward(spec, x, weight, bias)

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Whiten an array of equal blocks by the first implementation that supports it."""
        return self.implementation(spec, x, weight, bias).forward(spec, x, weight, bias)

    def backward(
        self,
        spec: WhiteningSpec,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        stats: Statistics,
        dy: Array,
        dstats: Statistics = NO_STATISTICS,
    ) -> Gradients:
        """Return the gradients of `forward` by the first implementation that supports the arrays."""
        implementation = self.implementation(spec, x, weight, bias, dy, *stats, *dstats)
        return implementation.backward(spec, x, weight, bias, stats, dy, dstats)

    def vjp(self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Pullback]:
        """Whiten an array, and return the function that maps the gradient of the result to those of the arguments."""
        xp, axis, parts, outputs = self.kernels.xp, spec.blocks.axis, [], []
        for part, equal in spec.equal_parts(x):
            inputs = take_channels(x, part, axis), take_channels(weight, part), take_channels(bias, part)
            y, stats = self.forward(equal, *inputs)
            parts.append((part, equal, inputs, stats))
            outputs.append(y)

        def pullback(dy: Array) -> Gradients:
            dy = self.converted(dy, "dy", x)
            checks.check_gradient(xp, dy, x.shape)
            dy = xp.astype(dy, x.dtype, copy=False)
            gradients = [
                self.backward(equal, *inputs, stats, take_channels(dy, part, axis))
                for part, equal, inputs, stats in parts
            ]
            dxs, dweights, dbiases = zip(*gradients, strict=True)
            return (
                join_channels(xp, dxs, axis),
                None if weight is None else join_channels(xp, dweights),
                None if bias is None else join_channels(xp, dbiases),
            )

        return join_channels(xp, outputs, axis), pullback

    def statistics(self, spec: WhiteningSpec, x: Array) -> WhiteningStats:
        """Return the statistics of an array, whose last group may be smaller than the others."""
        stats = []
        for part, equal in spec.equal_parts(x):
            channels = take_channels(x, part, spec.blocks.axis)
            stats.append(self.implementation(equal, channels).statistics(equal, channels))
        return join_statistics(self.kernels.xp, stats)

    def apply_frozen(
        self, axis: int, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None
    ) -> Array:
        """Return diag(weight) whitener (x - mean) + bias for mean (C,) and whitener (groups, d, d)."""
        arrays = x, mean, whitener, weight, bias
        return self.implementation(None, *arrays).apply_frozen(axis, *arrays)

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return (cov + eps I)^(-1/2) of matrices (..., d, d)."""
        return self.implementation(None, cov).inverse_sqrt(solver, cov, eps)

    @np.errstate(over="ignore", invalid="ignore")  # values that aren't finite are looked for afterwards
    def moments(self, x: Array, weights: Float64 | None, read: RowInput, *, fourth: bool = False) -> Moments:
        """Return the moments of rows.

        Parameters
        ----------
        x : array, shape (n, d)
            Floating point, or integers.
        weights : NumPy array, shape (n,), optional
            The weights of the rows, 0 or more.
        read : RowInput
            How rows are read.
        fourth : bool
            Whether third and fourth moments are taken too.
        """
        xp, total = self.kernels.xp, Moments.empty(x.shape[1], fourth=fourth)
        for part in row_blocks(x.shape):
            rows, row_weights = read.floating(xp, x[part, ...]), None if weights is None else weights[part]
            moments = self._block_moments(rows, row_weights, fourth)
            if not moments.is_finite():
                finite = self._finite_rows(rows, part.start, read)
                rows = xp.take(rows, xp.asarray(np.flatnonzero(finite), device=rows.device), axis=0)
                moments = self._block_moments(rows, None if row_weights is None else row_weights[finite], fourth)
                moments = replace(moments, skipped=int(np.sum(~finite)))
                if not moments.is_finite():
                    raise ValueError(f"x has values whose squares overflow {rows.dtype}: divide it, or use float64")
            total += moments
        return total

    @np.errstate(over="ignore", invalid="ignore")
    def map_rows(self, x: Array, row_map: RowMap, read: RowInput) -> Array:
        """Return the outputs (n, k) of a map for rows (n, d), in the dtype of x, or in floating point for integers."""
        xp, parts = self.kernels.xp, []
        result: Array = self._map_at_once(x, row_map, read)
        mapped = result is not None
        for part in row_blocks(x.shape):
            rows = read.floating(xp, x[part, ...])
            y = row_map.finished(xp, result[part, ...]) if mapped else row_map.apply(self.kernels, rows)
            y, is_finite = self._checked_outputs(y, rows, part.start, read)
            if not self.has_mutable_arrays:
                parts.append(y)
            elif result is None:
                result = xp.empty((x.shape[0], y.shape[1]), dtype=y.dtype, device=y.device)
            if result is not None and not (mapped and is_finite and not row_map.normalize):
                result[part, ...] = y
        return xp.concat(parts) if parts else result

    def _map_at_once(self, x: Array, row_map: RowMap, read: RowInput) -> Array | None:
        """Return the outputs of a map before they are divided by their length, or None if no fast kernels have it."""
        xp, is_square = self.kernels.xp, row_map.matrix.shape[0] == row_map.matrix.shape[1]
        if not is_square or read.scale is not None or not xp.isdtype(x.dtype, "real floating"):
            return None
        if self.implementation(None, x) is self.implementations[-1]:
            return None
        arrays = row_map.mean, row_map.blocks(), None, row_map.shift
        return self.apply_frozen(1, x, *(None if each is None else like(xp, each, x) for each in arrays))

    def _block_moments(self, rows: Array, weights: Float64 | None, fourth: bool) -> Moments:
        count, dimension = rows.shape
        weight = count if weights is None else float(np.sum(weights))
        if not weight:
            return replace(Moments.empty(dimension, fourth=fourth), count=count)
        kernels, unit = self.implementation(whole_row_spec(dimension), rows).kernels, 1.0
        if weights is not None:  # in units of a power of two, because float32 might hold none of them
            unit = math.ldexp(1.0, math.frexp(float(np.max(weights)))[1] - 1)
            weights = like(self.kernels.xp, weights / unit, kernels.to_accumulation_dtype(rows))
        sums = row_sums(kernels, rows, weights, fourth)
        mean, *higher = (self.to_numpy(each).astype(np.float64) for each in sums)
        scatter, *higher = (each * unit for each in higher)
        return Moments(count, 0, weight, mean, scatter, *((higher[0], float(higher[1])) if fourth else ()))

    def _checked_outputs(self, y: Array, rows: Array, first: int, read: RowInput) -> tuple[Array, bool]:
        """Return outputs, NaN where a row isn't finite, and whether all rows are; raise ValueError if they must be."""
        xp = self.kernels.xp
        if math.isfinite(float(xp.sum(self.kernels.to_accumulation_dtype(y)))):
            return y, True
        finite = xp.asarray(self._finite_rows(rows, first, read), device=y.device)
        return xp.where(finite[:, None], y, math.nan * xp.ones_like(y)), False

    def _finite_rows(self, rows: Array, first: int, read: RowInput) -> npt.NDArray[np.bool_]:
        """Return which rows are finite; raise ValueError if all have to be, with the number of the first other one."""
        xp = self.kernels.xp
        finite = self.to_numpy(xp.all(xp.isfinite(rows), axis=1))
        if not finite.all() and not read.skip_nonfinite:
            row = read.first_row + first + int(np.argmin(finite))
            raise ValueError(
                f'x contains NaN or infinity in row {row}: remove such rows, or leave them out by on_nonfinite="skip"'
            )
        return finite

    def to_numpy(self, x: Array) -> npt.NDArray[Any]:
        """Return a copy of x, or x itself, as an array of NumPy."""
        return np.asarray(x)

    def tensor(self, x: Array, name: str = "x") -> Array:
        """Return x, or the tensor that a framework's variable holds; raise an error with the argument's name."""
        return x

    def rows(self, x: Array, name: str = "X") -> Array:
        """Like `tensor`, for rows (n, d), of which a library may not know the number n yet."""
        return self.tensor(x, name)

    def snapshot(self, state: Array, *inputs: Array | None) -> Array:
        """Return a layer's state, or a copy if it may change in place while the gradient of the inputs needs it."""
        return state

    def checked_affine(
        self, x: Array, axis: int, weight: Array | None, bias: Array | None
    ) -> tuple[Array | None, Array | None]:
        """Return weight and bias as arrays of x's library; raise an error if they haven't a value for each channel."""

        def checked(values: Array | None, name: str) -> Array | None:
            if values is not None:
                values = self.converted(values, name, x)
                checks.check_per_channel(self.kernels.xp, values, name, x.shape[axis])
            return values

        return checked(weight, "weight"), checked(bias, "bias")

    def in_memory_order(self, x: Array, axis: int) -> tuple[Array, int, Callable[[Array], Array]]:
        """Return a view of x with its axes as they lie in memory, its channel axis, and what restores a result's axes.

        This is for libraries whose arrays can be channels-last in memory alone.
        """
        return x, axis, lambda y: y

    def converted(self, values: Any, name: str, x: Array) -> Array:
        """Return what came beside x as an array of its library, or raise TypeError with the argument's name.

        A library converts what its own functions convert, which here is nothing.
        """
        if namespace_of(values) is not self.kernels.xp:
            raise checks.wrong_type(values, name, "an array of the library that x is of")
        return values


def namespace_of(x: Any) -> Namespace | None:
    """Return the array API namespace of x, None if x is no array."""
    try:
        return array_namespace(x)
    except TypeError:
        return None
