"""Whitening by compiled kernels: one call for all steps of a forward or a backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polywhiten._types import Array
from polywhiten.cpu.kernels import CpuKernels
from polywhiten.cpu.launches import WORKSPACE, Program
from polywhiten.cpu.library import Library
from polywhiten.cpu.schedule import (
    BIAS,
    COVARIANCE,
    DBIAS,
    DCOV,
    DWEIGHT,
    DX,
    DY,
    MEAN,
    ORDERED_DY,
    ORDERED_X,
    WEIGHT,
    WHITENER,
    K,
    Known,
    ParameterSums,
    Plan,
    X,
    Y,
    backward_plan,
    forward_plan,
)
from polywhiten.cpu.workspace import Workspace, workspace
from polywhiten.kernels import Kernels
from polywhiten.reference import Gradients, Reference, as_dtype_of
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics


@dataclass(frozen=True)
class CpuImplementation(Reference):
    """Whitening of a library's arrays in the CPU's memory.

    `Reference` over the compiled kernels does what one call can't: half precision, statistics that are shared between
    workers, and gradients of the statistics.
    """

    name = "Numba"
    library: Library

    @classmethod
    def over(cls, library: Library, plain: Kernels) -> CpuImplementation:
        """Return the implementation for a library, with plain kernels for other solvers than Newton's."""
        return cls(CpuKernels(plain.xp, library, plain), library)

    def supports(self, spec: WhiteningSpec | None, *arrays: Array | None) -> bool:
        """Return whether kernels can read these arrays; weight and bias are converted first, as frozen statistics."""
        library, (x, *others) = self.library, arrays
        if spec is None:
            return library.can_read(x) and library.can_convert(*others)
        return library.can_read(x, *others[2:]) and library.can_convert(*others[:2])

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Return y and the statistics, by one call of compiled code if that can do it."""
        if spec.all_reduce is not None or x.dtype.itemsize < 4:
            return super().forward(spec, x, weight, bias)
        library = self.library
        has_affine = weight is not None, bias is not None
        plan = forward_plan(library, spec, library.key(x), library.num_threads(), *has_affine)
        if plan is None:
            return self.forward(spec, library.contiguous(x), weight, bias)
        mean, cov = library.empty(plan.vectors, x), library.empty(plan.matrices, x)
        arrays = self._inputs(plan, x, weight, bias) | {MEAN: mean, COVARIANCE: cov}
        arrays[Y] = y = library.empty_strided(plan.result, x)
        memory = workspace(plan.workspace_bytes)
        if len(plan.programs) == 1:
            arrays[WHITENER] = whitener = library.empty(plan.matrices, x)
        else:
            self._run(plan.programs[0], arrays, memory)
            whitener = self.kernels.inverse_sqrt(spec.solver, cov, spec.eps)
            arrays[WHITENER] = library.converted(whitener, plan.matrices, x)
        self._run(plan.programs[-1], arrays, memory)
        return y, Statistics(mean, cov, whitener)

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
        """Return the gradients, by one call of compiled code if that can do it."""
        if spec.all_reduce is not None or x.dtype.itemsize < 4 or any(each is not None for each in dstats):
            return super().backward(spec, x, weight, bias, stats, dy, dstats)
        library = self.library
        if spec.solver.newton_steps(x.dtype.itemsize) is None:
            stats = self._completed(spec, x, stats)
        known = Known(weight is not None, bias is not None, stats.mean is not None, stats.whitener is not None)
        plan = backward_plan(library, spec, library.key(x), library.key(dy), library.num_threads(), known)
        if plan is None:
            return self.backward(spec, library.contiguous(x), weight, bias, stats, library.contiguous(dy))
        arrays = self._inputs(plan, x, weight, bias) | self._gradients(plan, x, dy, known)
        for name, values, shape in zip(_STATISTICS, stats, (plan.vectors, plan.matrices, plan.matrices), strict=True):
            if values is not None:
                arrays[name] = library.converted(values, shape, x)
        memory = workspace(plan.workspace_bytes)
        sums = None if plan.parameter_sums is None else _parameter_sums(memory, plan.parameter_sums)
        if len(plan.programs) > 1:
            arrays[K] = library.empty(plan.matrices, x)
            self._run(plan.programs[0], arrays, memory)
            arrays[DCOV] = self._solver_adjoint(spec, plan, arrays, scaled=sums is None)
        self._run(plan.programs[-1], arrays, memory)
        if sums is None:
            dweight, dbias = arrays.get(DWEIGHT), arrays.get(DBIAS)
        else:
            dweight, dbias = library.from_numpy(sums.sum(0), x)
        return arrays[DX], as_dtype_of(self.kernels, dweight, weight), as_dtype_of(self.kernels, dbias, bias)

    def _inputs(self, plan: Plan, x: Array, weight: Array | None, bias: Array | None) -> dict[Any, Array]:
        """Return x, weight and bias as the programs read them."""
        library, arrays = self.library, {X: x}
        if plan.orders_x:
            arrays[ORDERED_X] = library.copied(x, library.empty_strided(plan.result, x))
        if weight is not None:
            arrays[WEIGHT] = library.converted(weight, weight.shape, x)
        if bias is not None:
            arrays[BIAS] = library.converted(bias, bias.shape, x)
        return arrays

    def _gradients(self, plan: Plan, x: Array, dy: Array, known: Known) -> dict[Any, Array]:
        """Return dy as the programs read it, and new arrays for the gradients that they write."""
        library, arrays = self.library, {DY: dy}
        arrays[DX] = library.empty_strided(plan.result, x)
        if plan.orders_dy:
            arrays[ORDERED_DY] = library.copied(dy, library.empty_strided(plan.result, x))
        if plan.parameter_sums is None:
            channels = (math.prod(plan.vectors),)
            arrays |= {
                name: library.empty(channels, x)
                for name, is_there in zip((DWEIGHT, DBIAS), known, strict=False)
                if is_there
            }
        return arrays

    def _completed(self, spec: WhiteningSpec, x: Array, stats: Statistics) -> Statistics:
        """Return all statistics, computing those that are None."""
        if stats.mean is None:
            return self.statistics(spec, x)
        if stats.whitener is None:
            return stats._replace(whitener=self.kernels.inverse_sqrt(spec.solver, stats.covariance, spec.eps))
        return stats

    def _solver_adjoint(self, spec: WhiteningSpec, plan: Plan, arrays: dict[Any, Array], scaled: bool) -> Array:
        """Return the gradient with respect to the covariance by a solver that has no compiled steps."""
        grad, xp = arrays[K], self.kernels.xp
        if scaled and WEIGHT in arrays:
            grad = grad * xp.reshape(arrays[WEIGHT], plan.vectors)[..., None]
        dcov = self.kernels.inverse_sqrt_adjoint(spec.solver, arrays[COVARIANCE], grad, spec.eps)
        return self.library.converted(dcov, plan.matrices, arrays[K])

    def _run(self, program: Program, arrays: dict[Any, Array], memory: Workspace) -> None:
        address = self.library.address
        addresses = {name.array: address(array) for name, array in arrays.items()}
        addresses[WORKSPACE] = memory.address
        program.run(addresses)


_STATISTICS = MEAN, COVARIANCE, WHITENER


def _parameter_sums(memory: Workspace, sums: ParameterSums) -> npt.NDArray[np.float64]:
    """Return each worker's sums for weight and bias, (workers, 2, channels), set to 0."""
    workers = memory.memory[: sums.num_workers * sums.worker_bytes].reshape(sums.num_workers, -1)
    result = workers[:, sums.begin : sums.end].view(np.float64).reshape(sums.num_workers, 2, -1)
    result[...] = 0
    return result
