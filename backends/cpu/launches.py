"""The compiled kernels on a library's arrays, one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numba

from polywhiten._types import Array
from polywhiten.cpu.arguments import AverageArgs, UpdateAveragesArgs, ValuesArgs
from polywhiten.cpu.device import newton
from polywhiten.cpu.device.averages import update_averages
from polywhiten.cpu.device.packing import Layout, padded
from polywhiten.cpu.runtime.parallel import Launch, launch
from polywhiten.cpu.schedule import Library, Steps, panels, scratch, scratch_size, solve
from polywhiten.kernels import Term
from polywhiten.solvers.newton import Newton

_WORTH = 1 << 18  # operations that are worth another thread
_SHARED = 160  # as large are matrices whose phases are worth a call each


class Calls(NamedTuple):
    """The five kernels over a library, and running averages."""

    library: Library

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Mean (blocks, d) and covariance (blocks, d, d)."""
        steps = Steps(self.library, block_axis)
        layout = steps.layout(x)
        workers, chunks = self.shares(layout)
        result, sums, whole = steps.moments(x, chunks)
        self._run([sums], workers, layout.d, x)
        dp = padded(layout.d)
        workers = min(workers, layout.blocks, self._workers(layout.blocks * dp * dp * (chunks + panels(layout))))
        self._run([whole], workers, layout.d, x)
        return result

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """S and K."""
        steps = Steps(self.library, block_axis)
        layout = steps.layout(x)
        workers, chunks = self.shares(layout)
        result, sums, whole = steps.cross_moments(dy, x, mean, chunks)
        self._run([sums], workers, layout.d, x)
        workers = min(workers, layout.blocks, self._workers(layout.blocks * padded(layout.d) ** 2 * chunks))
        self._run([whole], workers, layout.d, x)
        return result

    def affine_map(
        self, terms: Sequence[Term], shift: Array | None, block_axis: int, weight: Array | None = None
    ) -> Array:
        """The sum of the terms, plus shift (blocks, d); the first one times the weight (blocks, d) of its rows."""
        steps = Steps(self.library, block_axis)
        y, arranged, mapped = steps.affine_map(terms, shift, False, weight=weight)
        layout = steps.layout(y)
        self._run([arranged, mapped], self.shares(layout, len(terms))[0], layout.d, y)
        return y

    def inverse_sqrt(self, solver: Newton, cov: Array, eps: float) -> Array:
        """W."""
        return self._solve(solver, eps, cov)

    def inverse_sqrt_adjoint(self, solver: Newton, cov: Array, grad: Array, eps: float) -> Array:
        """Gradient with respect to cov."""
        return self._solve(solver, eps, cov, grad)

    def average(
        self,
        averages: Sequence[Array],
        statistics: Sequence[Array],
        judged: Sequence[Array],
        count: Array,
        momentum: float | None,
    ) -> None:
        """A step of running averages, in place, of arrays that are contiguous."""
        library, like = self.library, averages[0]
        statistics, judged = ([library.contiguous(each) for each in given] for given in (statistics, judged))
        entries = [
            AverageArgs(math.prod(each.shape), library.address(each), library.address(newest))
            for each, newest in zip(averages, statistics, strict=True)
        ]
        others = [ValuesArgs(math.prod(each.shape), library.address(each)) for each in judged]
        args = UpdateAveragesArgs(
            -1.0 if momentum is None else momentum,
            library.address(count),
            entries[0],
            entries[1] if len(entries) > 1 else AverageArgs(0, 0, 0),
            others[0] if others else ValuesArgs(0, 0),
        )
        launch([Launch(update_averages, args)], 1, scratch(1, 1, library.dtype(like)))

    def _solve(self, solver: Newton, eps: float, *given: Array) -> Array:
        *blocks, d, _ = given[0].shape
        number, derivative, dtype = math.prod(blocks), len(given) == 2, self.library.dtype(given[0])
        phased = self.are_phases_shared(solver, number, d)
        workers = self._newton_workers(solver, number, d)
        if not phased:
            workers = min(workers, number)
        result, steps = solve(self.library, solver, eps, phased, *given)
        own = scratch(workers, 1 if phased else newton.workspace_size(d, derivative), dtype)
        launch(steps, workers, own)
        return result

    def are_phases_shared(self, solver: Newton, number: int, d: int) -> bool:
        """Whether matrices are so large and few that threads work on each together."""
        return d >= _SHARED and number < self._newton_workers(solver, number, d)

    def _newton_workers(self, solver: Newton, number: int, d: int) -> int:
        return self._workers(number * padded(d) ** 3 * solver.iterations)

    def _run(self, steps: Sequence[Launch], workers: int, d: int, like: Array) -> None:
        launch(steps, workers, scratch(workers, scratch_size(d), self.library.dtype(like)))

    def shares(self, layout: Layout, terms: int = 1) -> tuple[int, int]:
        """Threads, and in how many parts they share a block."""
        workers = self._workers(terms * layout.blocks * layout.outer * layout.inner * padded(layout.d) ** 2)
        chunks, most = 1, panels(layout)
        while layout.blocks * chunks % workers and layout.blocks * chunks < 8 * workers and chunks < most:
            chunks += 1
        return workers, chunks

    def _workers(self, operations: int) -> int:
        return int(min(self.library.threads(), numba.config.NUMBA_NUM_THREADS, 1 + operations // _WORTH))
