"""Forward and backward, block by block where that keeps them in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polywhiten._types import Array
from polywhiten.blocks import SampleGroups
from polywhiten.compiled import newton
from polywhiten.compiled.calls import Calls
from polywhiten.compiled.panels import Channels
from polywhiten.compiled.parallel import Step, run
from polywhiten.compiled.steps import NO_CHANNELS, Steps, scratch, scratch_size
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers.newton import Newton
from polywhiten.whitening import Plan, Statistics, as_dtype_of

_CACHED = 1 << 20  # bytes of a block of channels; a sample's are read in their order anyway


class WholeWhitening:
    """Of an array x, which the compiled kernels serve.

    Where threads have whole blocks to themselves that fit their cache, all steps of a block follow each other. Else
    they share the blocks in each step.
    """

    def __init__(self, kernels: Kernels, calls: Calls, plan: Plan, solver: Newton, x: Array) -> None:
        self._kernels, self._calls, self._solver, self._eps = kernels, calls, solver, plan.eps
        self._x = kernels.split(plan.blocks, x)
        self._steps = Steps(calls.library, plan.blocks.block_axis)
        self._layout = layout = self._steps.layout(self._x)
        self._channels = NO_CHANNELS
        if isinstance(plan.blocks, SampleGroups):
            axis = plan.blocks.axis
            self._channels = Channels(x.shape[axis], math.prod(x.shape[axis + 1 :]))
        self._workers, self._chunks = calls.shares(layout)
        even = layout.blocks % self._workers == 0 or layout.blocks >= 4 * self._workers
        self._by_block = even and (self._channels.number > 0 or x.nbytes <= layout.blocks * _CACHED)
        if self._by_block:
            self._chunks = 1

    def forward(self, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """Y, split into blocks, and the statistics."""
        (mean, cov), *steps = self._steps.moments(self._x, self._chunks)
        whitener, solved = self._solved(False, cov)
        steps += solved
        if self._channels.number:
            y, *mapped = self._steps.affine_map(
                [Term(whitener, self._x, mean)], None, self._by_block, self._channels, None, *self._of_channels(weight, bias)
            )
        else:
            matrix = whitener
            if weight is not None:
                matrix, _, folded = self._steps.fold_weight(whitener, self._of_variables(weight))
                steps.append(folded)
            y, *mapped = self._steps.affine_map([Term(matrix, self._x, mean)], self._of_variables(bias), self._by_block)
        self._run([*steps, *mapped], False)
        return y, Statistics(mean, cov, whitener)

    def backward(
        self, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
    ) -> tuple[Array, Array | None, Array | None]:
        """As `polywhiten.whitening.backward`."""
        mean, cov, whitener = stats
        steps, channels, number = self._steps, self._channels, self._channels.number
        factors, _ = self._of_channels(weight, bias) if number else (None, None)
        if factors is None:
            (s, k), *given = steps.cross_moments(dy, self._x, mean, self._chunks)
        else:
            place = self._scratch_size(True)
            (s, k), *given = steps.cross_moments(
                dy, self._x, mean, self._chunks, channels, whitener, factors, place
            )
        matrix = whitener  # Newton's is symmetric, to the last bit
        dweight, dbias = None, s
        if not number and weight is not None:
            matrix, dweight, folded = steps.fold_weight(whitener, self._of_variables(weight), k)
            given.append(folded)
        ds, solved = self._solved(True, cov, k)
        centre, terms = steps.gradient_terms(ds, s, self._layout.outer * self._layout.inner)
        both = [Term(matrix, dy, centre), Term(ds, self._x, mean)]
        before, zeros = (None, None) if factors is None else (factors, self._kernels.xp.zeros_like(factors))
        dx, *mapped = steps.affine_map(both, None, self._by_block, channels, before, None, zeros)
        sums = self._run([*given, *solved, terms, *mapped], True, 0 if factors is None else 2 * number)
        if factors is not None:
            dweight, dbias = self._calls.library.converted(sums.reshape(2, -1), self._x)
        return dx, self._gradient(dweight, weight), self._gradient(dbias, bias)

    def _solved(self, derivative: bool, *given: Array) -> tuple[Array, list[Step]]:
        """Of the solver's value or derivative."""
        phased = not self._by_block and self._calls.are_phases_shared(self._solver, given[0])
        return self._calls.solved(phased, derivative, self._solver, *given, self._eps)

    def _run(self, steps: Sequence[Step], derivative: bool, sums: int = 0) -> np.ndarray[Any, Any]:
        """All steps of a block, and then the next one, or each of all; so many sums in float64 over the workers."""
        workers, start = self._workers, self._scratch_size(derivative)
        own = scratch(workers, start + 2 * sums, self._calls.library.dtype(self._x))
        found = own[:, start : start + sums * 8 // own.itemsize].view(np.float64)
        found[...] = 0
        if self._by_block:
            run(steps, workers, own, self._layout.blocks)
        else:
            for step in steps:
                run([step], workers, own)
        return found.sum(0)

    def _scratch_size(self, derivative: bool) -> int:
        d = self._layout.d
        return max(scratch_size(d), newton.memory(d, derivative))

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
