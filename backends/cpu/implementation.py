"""Forward and backward, block by block where that keeps them in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polywhiten._types import Array
from polywhiten.blocks import SampleGroups
from polywhiten.cpu.device import newton
from polywhiten.cpu.device.packing import Channels, padded
from polywhiten.cpu.launches import Calls
from polywhiten.cpu.runtime.parallel import Launch, launch
from polywhiten.cpu.schedule import NO_CHANNELS, Steps, scratch, scratch_size, solve
from polywhiten.kernels import Kernels, Term
from polywhiten.reference import Gradients, Reference, as_dtype_of
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics

_CACHED = 1 << 19  # bytes of a block of channels; a sample's are read in their order anyway


class CpuImplementation(Reference):
    """NumPy's arrays by compiled kernels."""

    name = "Numba"

    def __init__(self, kernels: Kernels, calls: Calls, serves: Any) -> None:
        super().__init__(kernels)
        object.__setattr__(self, "_calls", calls)
        object.__setattr__(self, "_serves", serves)

    def supports(self, spec: WhiteningSpec | None, x: Array, *others: Array | None) -> bool:
        return bool(self._serves(x))

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        if spec.all_reduce is not None:
            return super().forward(spec, x, weight, bias)
        y, stats = WholeWhitening(self.kernels, self._calls, spec, x).forward(weight, bias)
        return self.kernels.xp.reshape(y, x.shape), stats

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
        extra = spec.all_reduce is not None or any(each is not None for each in dstats)
        if extra or not self._serves(x, dy, *stats):
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        dy = self.kernels.split(spec.blocks, dy)
        dx, dweight, dbias = WholeWhitening(self.kernels, self._calls, spec, x).backward(weight, bias, stats, dy)
        return self.kernels.xp.reshape(dx, x.shape), dweight, dbias


class WholeWhitening:
    """Of an array x, which the compiled kernels serve.

    Where threads have whole blocks to themselves that fit their cache, all steps of a block follow each other, if the
    solver is one of them. Else threads share the blocks in each step.
    """

    def __init__(self, kernels: Kernels, calls: Calls, spec: WhiteningSpec, x: Array) -> None:
        self._kernels, self._calls, self._spec = kernels, calls, spec
        self._x = kernels.split(spec.blocks, x)
        self._steps = Steps(calls.library, spec.blocks.block_axis)
        layout = self._layout = self._steps.layout(self._x)
        self._count, self._dtype = layout.outer * layout.inner, calls.library.dtype(x)
        self._channels = NO_CHANNELS
        if isinstance(spec.blocks, SampleGroups):
            axis = spec.blocks.axis
            self._channels = Channels(x.shape[axis], math.prod(x.shape[axis + 1 :]))
        self._workers, self._chunks = calls.shares(layout)
        lines = self._count * padded(layout.d) * np.dtype(self._dtype).itemsize
        even = layout.blocks % self._workers == 0 or layout.blocks >= 4 * self._workers
        # the solver, if its steps are among the compiled ones
        self._newton = None if spec.solver.newton_steps(np.dtype(self._dtype).itemsize) is None else spec.solver
        self._by_block = self._newton is not None and even and (self._channels.number > 0 or lines <= _CACHED)
        if self._by_block:
            self._chunks = 1

    def forward(self, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """Y, split into blocks, and the statistics."""
        own = scratch(self._workers, self._scratch_size(False), self._dtype)
        (mean, cov), *steps = self._steps.moments(self._x, self._chunks)
        whitener, steps = self._whitener(own, steps, cov)
        stats = Statistics(mean, cov, whitener)
        if self._channels.number:
            given = None, self._by_block, self._channels, None, *self._of_channels(weight, bias)
            y, *mapped = self._steps.affine_map([Term(whitener, self._x, mean)], *given)
        else:
            terms, shift, factor = [Term(whitener, self._x, mean)], self._of_variables(bias), self._of_variables(weight)
            y, *mapped = self._steps.affine_map(terms, shift, self._by_block, weight=factor)
        self._run([*steps, *mapped], own)
        return y, stats

    def backward(
        self, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
    ) -> tuple[Array, Array | None, Array | None]:
        """As `polywhiten.reference.Reference.backward`."""
        steps, channels = self._steps, self._channels
        factors, zeros = None, None
        if channels.number and not (weight is None and bias is None):
            factors, _ = self._of_channels(weight, bias)
            zeros = self._kernels.xp.zeros_like(factors)
        place, number = self._scratch_size(True), 0 if factors is None else 2 * channels.number
        own = scratch(self._workers, place + 2 * number, self._dtype)
        parameters = own[:, place : place + number * 8 // own.itemsize].view(np.float64)  # their gradients
        parameters[...] = 0
        known: list[Launch] = []
        mean, cov, whitener = stats
        if mean is None:
            (mean, cov), *known = steps.moments(self._x, self._chunks)
        computed = None
        if whitener is None and self._newton is not None and not number:
            whitener = computed = self._calls.library.empty(cov.shape, cov)  # with the adjoint, which takes it anyway
        elif whitener is None:
            whitener, known = self._whitener(own, known, cov)
        by_channel = (channels, whitener, factors, place) if number else ()
        (s, k), *given = steps.cross_moments(dy, self._x, mean, self._chunks, *by_channel)
        by_variable = None if channels.number or weight is None else self._of_variables(weight)
        ds, given = self._adjoint(own, [*known, *given], cov, k, by_variable, computed)
        matrix = whitener  # symmetric, up to rounding
        dweight, dbias = None, s
        if by_variable is not None:
            matrix, dweight, folded = steps.fold_weight(whitener, by_variable, k)
            given.append(folded)
        centre, terms = steps.gradient_terms(ds, s, self._count)
        both = [Term(matrix, dy, centre), Term(ds, self._x, mean)]
        dx, *mapped = steps.affine_map(both, None, self._by_block, channels, factors, None, zeros)
        self._run([*given, terms, *mapped], own)
        if number:
            dweight, dbias = self._calls.library.converted(parameters.sum(0).reshape(2, -1), self._x)
        return dx, self._gradient(dweight, weight), self._gradient(dbias, bias)

    def _whitener(self, own: np.ndarray[Any, Any], steps: list[Launch], cov: Array) -> tuple[Array, list[Launch]]:
        """W, and the steps that are still to be run for it."""
        solver, eps = self._spec.solver, self._spec.eps
        if self._newton is not None:
            whitener, solving = solve(self._calls.library, self._newton, eps, self._phased, cov)
            return whitener, [*steps, *solving]
        self._run(steps, own)
        return self._kernels.inverse_sqrt(solver, cov, eps), []

    def _adjoint(
        self,
        own: np.ndarray[Any, Any],
        steps: list[Launch],
        cov: Array,
        grad: Array,
        weight: Array | None,
        whitener: Array | None,
    ) -> tuple[Array, list[Launch]]:
        """The covariance's gradient by that of W, its rows times the weight; and the steps that are still to be run.

        Newton's iteration gives W again, in `whitener`.
        """
        solver, eps = self._spec.solver, self._spec.eps
        if self._newton is not None:
            ds, solving = solve(self._calls.library, self._newton, eps, self._phased, cov, grad, weight, whitener)
            return ds, [*steps, *solving]
        self._run(steps, own)
        return self._kernels.inverse_sqrt_adjoint(
            solver, cov, grad if weight is None else grad * weight[..., None], eps
        ), []

    def _run(self, steps: Sequence[Launch], own: np.ndarray[Any, Any]) -> None:
        launch(steps, self._workers, own, self._layout.blocks if self._by_block else None)

    @property
    def _phased(self) -> bool:
        if self._by_block or self._newton is None:
            return False
        return self._calls.are_phases_shared(self._newton, self._layout.blocks, self._layout.d)

    def _scratch_size(self, derivative: bool) -> int:
        d = self._layout.d
        return scratch_size(d) if self._phased else max(scratch_size(d), newton.workspace_size(d, derivative))

    def _of_channels(self, weight: Array | None, bias: Array | None) -> tuple[Array | None, Array | None]:
        """Both, if any, in the dtype of x."""
        weight, bias = (None if each is None else self._converted(each) for each in (weight, bias))
        if weight is None and bias is not None:
            weight = self._kernels.xp.ones_like(bias)
        elif bias is None and weight is not None:
            bias = self._kernels.xp.zeros_like(weight)
        return weight, bias

    def _of_variables(self, parameter: Array | None) -> Array | None:
        """As (blocks, d)."""
        if parameter is None:
            return None
        return self._kernels.xp.reshape(self._converted(parameter), (self._layout.blocks, -1))

    def _converted(self, parameter: Array) -> Array:
        return self._kernels.xp.astype(parameter, self._x.dtype, copy=False)

    def _gradient(self, values: Array | None, parameter: Array | None) -> Array | None:
        if parameter is None:
            return None
        return as_dtype_of(self._kernels, self._kernels.xp.reshape(values, (-1,)), parameter)
