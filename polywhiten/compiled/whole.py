"""Forward and backward block by block, each of its steps while the block is in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from polywhiten._types import Array
from polywhiten.blocks import SampleGroups
from polywhiten.compiled import newton
from polywhiten.compiled.calls import Calls, map_operations, newton_operations
from polywhiten.compiled.panels import Channels
from polywhiten.compiled.parallel import Step, run
from polywhiten.compiled.steps import NO_CHANNELS, Steps, scratch, scratch_size
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers.newton import Newton
from polywhiten.whitening import Plan, Statistics, as_dtype_of

_CACHED = 1 << 20  # bytes of a block of channels; a sample's channels are scaled on the way, too


class ByBlock:
    """Of an array x, which the compiled kernels serve."""

    @classmethod
    def of(cls, kernels: Kernels, calls: Calls, plan: Plan, x: Array) -> ByBlock | None:
        """None where that is no gain: where threads would have to share a block, or it is too large for the cache."""
        if plan.all_reduce is not None or not isinstance(plan.solver, Newton):
            return None
        whole = cls(kernels, calls, plan, x)
        blocks, workers = whole._layout.blocks, calls.workers(whole._operations)
        even = blocks % workers == 0 or blocks >= 4 * workers
        return whole if even and (isinstance(plan.blocks, SampleGroups) or x.nbytes <= blocks * _CACHED) else None

    def __init__(self, kernels: Kernels, calls: Calls, plan: Plan, x: Array) -> None:
        assert isinstance(plan.solver, Newton)
        self._kernels, self._calls, self._solver, self._eps = kernels, calls, plan.solver, plan.eps
        self._x = kernels.split(plan.blocks, x)
        self._steps = Steps(calls.library, plan.blocks.block_axis)
        self._layout = self._steps.layout(self._x)
        self._channels = NO_CHANNELS
        if isinstance(plan.blocks, SampleGroups):
            axis = plan.blocks.axis
            self._channels = Channels(x.shape[axis], math.prod(x.shape[axis + 1 :]))

    def forward(self, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """Y, split into blocks, and the statistics."""
        (mean, cov), *steps = self._steps.moments(self._x)
        whitener, solved = self._steps.inverse_sqrt(self._solver, cov, self._eps)
        steps.append(solved(-1))
        if self._channels.number:
            y, *mapped = self._steps.affine_map(
                [Term(whitener, self._x, mean)], None, True, self._channels, None, *self._of_channels(weight, bias)
            )
        else:
            matrix = whitener
            if weight is not None:
                matrix, _, folded = self._steps.fold_weight(whitener, self._of_variables(weight))
                steps.append(folded)
            y, *mapped = self._steps.affine_map([Term(matrix, self._x, mean)], self._of_variables(bias), True)
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
            (s, k), *given = steps.cross_moments(dy, self._x, mean)
        else:
            place = self._scratch_size(True)
            (s, k), *given = steps.cross_moments(dy, self._x, mean, 1, channels, whitener, factors, place)
        matrix = whitener  # Newton's is symmetric, to the last bit
        dweight, dbias = None, s
        if not number and weight is not None:
            matrix, dweight, folded = steps.fold_weight(whitener, self._of_variables(weight), k)
            given.append(folded)
        ds, solved = steps.inverse_sqrt_adjoint(self._solver, cov, k, self._eps)
        centre, terms = steps.gradient_terms(ds, s, self._layout.outer * self._layout.inner)
        both = [Term(matrix, dy, centre), Term(ds, self._x, mean)]
        before, zeros = (None, None) if factors is None else (factors, self._kernels.xp.zeros_like(factors))
        dx, *mapped = steps.affine_map(both, None, True, channels, before, None, zeros)
        sums = self._run([*given, solved(-1), terms, *mapped], True, 0 if factors is None else 2 * number)
        if factors is not None:
            dweight, dbias = self._calls.library.converted(sums.reshape(2, -1), self._x)
        return dx, self._gradient(dweight, weight), self._gradient(dbias, bias)

    def _run(self, steps: Sequence[Step], derivative: bool, sums: int = 0) -> np.ndarray:
        """All steps of a block, and then the next one; so many sums in float64 over the workers."""
        blocks, dtype = self._layout.blocks, self._calls.library.dtype(self._x)
        workers, start = min(self._calls.workers(self._operations), blocks), self._scratch_size(derivative)
        own = scratch(workers, start + 2 * sums, dtype)
        found = own[:, start : start + sums * 8 // own.itemsize].view(np.float64)
        found[...] = 0
        run(steps, workers, own, blocks)
        return found.sum(0)

    @property
    def _operations(self) -> int:
        layout = self._layout
        return map_operations(layout, 2) + newton_operations(self._solver, layout.blocks, layout.d)

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
