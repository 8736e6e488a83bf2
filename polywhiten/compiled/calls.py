"""The compiled kernels on a library's arrays, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numba

from polywhiten._types import Array
from polywhiten.compiled import newton
from polywhiten.compiled.panels import Layout, padded
from polywhiten.compiled.parallel import Step, run
from polywhiten.compiled.steps import Library, Steps, matrices_of, panels, scratch, scratch_size
from polywhiten.kernels import Term
from polywhiten.solvers.newton import Newton

_WORTH = 1 << 18  # operations that are worth another thread
_SHARED = 160  # as large are matrices whose phases are worth a call each


class Calls(NamedTuple):
    """The five kernels over a library."""

    library: Library

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Mean (blocks, d) and covariance (blocks, d, d)."""
        steps = Steps(self.library, block_axis)
        layout = steps.layout(x)
        workers, chunks = self._shares(layout)
        result, sums, whole = steps.moments(x, chunks)
        self._run(sums, workers, layout.d, x)
        dp = padded(layout.d)
        workers = min(workers, layout.blocks, self.workers(layout.blocks * dp * dp * (chunks + panels(layout))))
        self._run(whole, workers, layout.d, x)
        return result

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S and K."""
        steps = Steps(self.library, block_axis)
        layout = steps.layout(x)
        workers, chunks = self._shares(layout)
        result, sums, whole = steps.cross_moments(dy, x, mean, chunks)
        self._run(sums, workers, layout.d, x)
        workers = min(workers, layout.blocks, self.workers(layout.blocks * padded(layout.d) ** 2 * chunks))
        self._run(whole, workers, layout.d, x)
        return result

    def affine_map(self, terms: Sequence[Term], shift: Array | None, block_axis: int) -> Array:
        """The sum of the terms, plus shift (blocks, d)."""
        steps = Steps(self.library, block_axis)
        y, arranged, mapped = steps.affine_map(terms, shift, False)
        layout = steps.layout(y)
        few = min(layout.blocks, self.workers(layout.blocks * len(terms) * padded(layout.d) ** 2))
        self._run(arranged, few, layout.d, y)
        self._run(mapped, self._shares(layout, len(terms))[0], layout.d, y)
        return y

    def inverse_sqrt(self, solver: Newton, cov: Array, eps: float) -> Array:
        """W."""
        return self._solve(Steps.inverse_sqrt, False, solver, cov, eps)

    def inverse_sqrt_adjoint(self, solver: Newton, cov: Array, grad: Array, eps: float) -> Array:
        """Gradient with respect to cov."""
        return self._solve(Steps.inverse_sqrt_adjoint, True, solver, cov, grad, eps)

    def _solve(
        self, of: Callable[..., tuple[Array, Callable[[int], Step]]], derivative: bool, solver: Newton, *given: Array
    ) -> Array:
        """Matrices of their own for each worker; or, where large matrices are few, a phase of all at a time."""
        cov = given[0]
        *blocks, d, _ = cov.shape
        number, dtype = math.prod(blocks), self.library.dtype(cov)
        workers = self.workers(newton_operations(solver, number, d))
        if number < workers and d >= _SHARED:
            matrices = matrices_of(number, d, derivative, dtype)
            result, phase = of(Steps(self.library, 0), solver, *given, matrices)
            for k in range(newton.phases(solver.iterations, derivative)):
                run([phase(k)], workers, scratch(workers, 1, dtype))
        else:
            workers = min(workers, number)
            result, phase = of(Steps(self.library, 0), solver, *given)
            run([phase(-1)], workers, scratch(workers, newton.memory(d, derivative), dtype))
        return result

    def _run(self, step: Step, workers: int, d: int, like: Array) -> None:
        run([step], workers, scratch(workers, scratch_size(d), self.library.dtype(like)))

    def _shares(self, layout: Layout, terms: int = 1) -> tuple[int, int]:
        """Threads, and in how many parts they share a block."""
        workers = self.workers(map_operations(layout, terms))
        chunks, most = 1, panels(layout)
        while layout.blocks * chunks % workers and layout.blocks * chunks < 8 * workers and chunks < most:
            chunks += 1
        return workers, chunks

    def workers(self, operations: int) -> int:
        """Threads that so much work is worth."""
        return int(min(self.library.threads(), numba.config.NUMBA_NUM_THREADS, 1 + operations // _WORTH))


def map_operations(layout: Layout, terms: int) -> int:
    """Of a map, and of moments about as many."""
    return terms * layout.blocks * layout.outer * layout.inner * padded(layout.d) ** 2


def newton_operations(solver: Newton, number: int, d: int) -> int:
    """Of the iteration on so many matrices."""
    return int(number * padded(d) ** 3 * solver.iterations)
