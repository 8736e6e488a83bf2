"""The five compiled kernels, each by itself, on a library's arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from polywhiten._types import Array
from polywhiten.cpu import tuning
from polywhiten.cpu.arguments import TermArgs
from polywhiten.cpu.geometry import num_panels, padded, panel_workspace_size
from polywhiten.cpu.launches import WORKSPACE, Address, LaunchBuilder, Program
from polywhiten.cpu.layout import layout_of, sample_order
from polywhiten.cpu.library import ArrayKey, Library, Strided
from polywhiten.cpu.schedule import (
    COVARIANCE,
    DCOV,
    DY,
    MEAN,
    WHITENER,
    K,
    X,
    Y,
    iteration_workers,
    num_workers,
    shares_phases,
    worker_size,
    workers_and_chunks,
)
from polywhiten.cpu.steps import (
    BlockArray,
    NewtonSteps,
    add_affine_map,
    add_cross_moments,
    add_inverse_sqrt,
    add_inverse_sqrt_adjoint,
    add_moments,
)
from polywhiten.cpu.workspace import workspace
from polywhiten.kernels import Kernels, Term
from polywhiten.solvers import Solver

_S, _SHIFT, _ROW_SCALE = Address("s"), Address("shift"), Address("row scale")


@dataclass(frozen=True)
class CpuKernels(Kernels):
    """Compiled kernels.

    They leave other solvers than Newton's to the plain kernels, and arrays that they can't read: an implementation
    looks at its arrays before, but `all_reduce` may return any.
    """

    library: Library
    plain: Kernels
    reads_any_order = True

    def moments(self, x: Array, block_axis: int) -> tuple[Array, Array]:
        """Return mean and covariance, in one pass over x."""
        library = self.library
        if not library.can_read(x):
            return self.plain.moments(x, block_axis)
        x = self.to_accumulation_dtype(x)
        plan = _moments_plan(library, library.key(x), block_axis, library.num_threads())
        mean, cov = library.empty(plan.vectors, x), library.empty(plan.matrices, x)
        self._run(plan, {X: x, MEAN: mean, COVARIANCE: cov})
        return mean, cov

    def cross_moments(self, dy: Array, x: Array, mean: Array, block_axis: int) -> tuple[Array, Array]:
        """Return s and K, in one pass over both arrays."""
        library = self.library
        if not library.can_read(x, dy, mean):
            return self.plain.cross_moments(dy, x, mean, block_axis)
        dy, x = self.to_accumulation_dtype(dy), self.to_accumulation_dtype(x)
        plan = _cross_moments_plan(library, library.key(dy), library.key(x), block_axis, library.num_threads())
        if plan.orders_x:
            x = library.copied(x, library.empty_strided(plan.result, x))
        if plan.orders_dy:
            dy = library.copied(dy, library.empty_strided(plan.result, x))
        mean = library.converted(mean, plan.vectors, x)
        s, k = library.empty(plan.vectors, x), library.empty(plan.matrices, x)
        self._run(plan, {DY: dy, X: x, MEAN: mean, _S: s, K: k})
        return s, k

    def affine_map(
        self,
        terms: Sequence[Term],
        bias: Array | None,
        block_axis: int,
        dtype: Any,
        *,
        row_scale: Array | None = None,
    ) -> Array:
        """Return the sum of the terms plus the bias, in one pass."""
        library, others = self.library, [array for term in terms for array in (term.array, term.matrix, term.centre)]
        if not library.can_read(terms[-1].array, *others, bias, row_scale):
            return self.plain.affine_map(terms, bias, block_axis, dtype, row_scale=row_scale)
        inputs = [self.to_accumulation_dtype(term.array) for term in terms]
        keys, x = tuple(map(library.key, inputs)), inputs[-1]
        plan = _affine_map_plan(
            library, keys, block_axis, library.num_threads(), bias is not None, row_scale is not None
        )
        y = library.empty_strided(plan.result, x)
        arrays: dict[Any, Array] = {Y: y}
        for names, term, array, orders in zip(_TERMS, terms, inputs, (plan.orders_x, plan.orders_dy), strict=False):
            arrays[names.array] = library.copied(array, library.empty_strided(plan.result, x)) if orders else array
            arrays[names.matrix] = library.converted(term.matrix, plan.matrices, x)
            arrays[names.centre] = library.converted(term.centre, plan.vectors, x)
        for name, values in ((_SHIFT, bias), (_ROW_SCALE, row_scale)):
            if values is not None:
                arrays[name] = library.converted(values, plan.vectors, x)
        self._run(plan, arrays)
        return self.xp.astype(y, dtype, copy=False)

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return W, computing every matrix in the cache."""
        library = self.library
        if not library.can_read(cov) or solver.newton_steps(cov.dtype.itemsize) is None:
            return self.plain.inverse_sqrt(solver, cov, eps)
        cov, whitener = library.contiguous(cov), library.empty(tuple(cov.shape), cov)
        plan = _inverse_sqrt_plan(library, library.key(cov), solver, eps, library.num_threads(), False)
        self._run(plan, {COVARIANCE: cov, WHITENER: whitener})
        return whitener

    def inverse_sqrt_adjoint(self, solver: Solver, cov: Array, grad: Array, eps: float = 0.0) -> Array:
        """Return the gradient with respect to cov, computing every matrix in the cache."""
        library = self.library
        if not library.can_read(cov, grad) or solver.newton_steps(cov.dtype.itemsize) is None:
            return self.plain.inverse_sqrt_adjoint(solver, cov, grad, eps)
        cov, grad, dcov = library.contiguous(cov), library.contiguous(grad), library.empty(tuple(cov.shape), cov)
        plan = _inverse_sqrt_plan(library, library.key(cov), solver, eps, library.num_threads(), True)
        self._run(plan, {COVARIANCE: cov, K: grad, DCOV: dcov})
        return dcov

    def _run(self, plan: _KernelPlan, arrays: dict[Any, Array]) -> None:
        memory = workspace(plan.workspace_bytes)
        addresses = {name.array: self.library.address(array) for name, array in arrays.items()}
        for program in plan.programs:
            program.run(addresses | {WORKSPACE: memory.address})


class _KernelPlan(NamedTuple):
    """What the call of one kernel has to do."""

    programs: tuple[Program, ...]
    workspace_bytes: int
    vectors: tuple[int, ...] = ()  # shape of means
    matrices: tuple[int, ...] = ()  # shape of covariances
    result: Strided = Strided((), ())  # how the result lies, and copies of arrays
    orders_x: bool = False  # whether the first array has to be copied
    orders_dy: bool = False


_TERMS = [Term(Address(f"matrix {i}"), Address(f"array {i}"), Address(f"centre {i}")) for i in range(2)]


@lru_cache(tuning.MAX_KEPT_PLANS)
def _moments_plan(library: Library, key: ArrayKey, block_axis: int, num_threads: int) -> _KernelPlan:
    layout = layout_of(library.strided(key), block_axis)
    blocks, d, dp = layout.blocks, layout.d, padded(layout.d)
    workers, chunks = workers_and_chunks(layout, num_threads)
    builder = LaunchBuilder(library.dtype_name(key.dtype), workers, panel_workspace_size(d))
    finish = add_moments(builder, BlockArray(X, layout), block_axis, chunks, MEAN, COVARIANCE)
    sums = builder.program()
    builder.launch(*finish)
    operations = blocks * dp * dp * (chunks + num_panels(layout))
    finished = builder.program(min(workers, blocks, num_workers(operations, num_threads)))
    return _KernelPlan((sums, finished), builder.workspace_bytes, (blocks, d), (blocks, d, d))


@lru_cache(tuning.MAX_KEPT_PLANS)
def _cross_moments_plan(
    library: Library, dy_key: ArrayKey, x_key: ArrayKey, block_axis: int, num_threads: int
) -> _KernelPlan:
    x4, dy4 = library.strided(x_key), library.strided(dy_key)
    dense, _ = library.dense(x4, x4.shape)
    x, dy = BlockArray(X, layout_of(x4, block_axis)), BlockArray(DY, layout_of(dy4, block_axis))
    orders = sample_order(x.layout, block_axis) != sample_order(dy.layout, block_axis)
    if orders:
        x, dy = (BlockArray(array.address, layout_of(dense, block_axis)) for array in (x, dy))
    blocks, d = x.layout.blocks, x.layout.d
    workers, chunks = workers_and_chunks(x.layout, num_threads)
    builder = LaunchBuilder(library.dtype_name(x_key.dtype), workers, panel_workspace_size(d))
    finish = add_cross_moments(builder, dy, x, block_axis, chunks, MEAN, _S, K)
    sums = builder.program()
    builder.launch(*finish)
    finished = builder.program(min(workers, blocks, num_workers(blocks * padded(d) ** 2 * chunks, num_threads)))
    return _KernelPlan((sums, finished), builder.workspace_bytes, (blocks, d), (blocks, d, d), dense, orders, orders)


@lru_cache(tuning.MAX_KEPT_PLANS)
def _affine_map_plan(
    library: Library, keys: tuple[ArrayKey, ...], block_axis: int, num_threads: int, has_shift: bool, has_scale: bool
) -> _KernelPlan:
    inputs = [library.strided(key) for key in keys]
    dense, _ = library.dense(inputs[-1], inputs[-1].shape)  # the last one is no gradient
    y = BlockArray(Y, layout_of(dense, block_axis))
    blocks, d = y.layout.blocks, y.layout.d
    layouts = [layout_of(each, block_axis) for each in inputs]
    orders = [sample_order(layout, block_axis) != sample_order(y.layout, block_axis) for layout in layouts]
    terms = [
        TermArgs(names.array, names.matrix, names.centre, y.layout if ordered else layout)
        for names, layout, ordered in zip(_TERMS, layouts, orders, strict=False)
    ]
    workers, _ = workers_and_chunks(y.layout, num_threads, len(terms))
    builder = LaunchBuilder(library.dtype_name(keys[0].dtype), workers, panel_workspace_size(d))
    shift, row_scale = _SHIFT if has_shift else 0, _ROW_SCALE if has_scale else 0
    add_affine_map(builder, terms, y, block_axis, shift, row_scale)
    programs, shapes = (builder.program(),), ((blocks, d), (blocks, d, d))
    return _KernelPlan(programs, builder.workspace_bytes, *shapes, dense, *orders)


@lru_cache(tuning.MAX_KEPT_PLANS)
def _inverse_sqrt_plan(
    library: Library, key: ArrayKey, solver: Solver, eps: float, num_threads: int, adjoint: bool
) -> _KernelPlan:
    *lead, d, _ = key.shape
    blocks, dtype = math.prod(lead), library.dtype_name(key.dtype)
    steps = solver.newton_steps(key.dtype.itemsize)
    assert steps is not None
    how = NewtonSteps(steps, eps, shares_phases(blocks, d, steps, num_threads))
    workers = iteration_workers(blocks, d, steps, num_threads)
    builder = LaunchBuilder(dtype, workers if how.shares_phases else min(workers, blocks), worker_size(d, how, adjoint))
    if adjoint:
        add_inverse_sqrt_adjoint(builder, how, blocks, d, COVARIANCE, K, DCOV)
    else:
        add_inverse_sqrt(builder, how, blocks, d, COVARIANCE, WHITENER)
    return _KernelPlan((builder.program(),), builder.workspace_bytes)
