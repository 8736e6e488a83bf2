"""Plans of all steps of a forward or a backward pass, made once for a spec, shapes and strides.

If threads have whole blocks to themselves that fit their caches, all steps of a block follow each other. Otherwise the
threads share the blocks in each step.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from polywhiten.blocks import SampleGroups
from polywhiten.cpu import tuning
from polywhiten.cpu.arguments import GradientTermsArgs, ScaleWhitenerArgs, TermArgs
from polywhiten.cpu.device.channels import Channels
from polywhiten.cpu.device.gradients import gradient_terms, scale_whitener
from polywhiten.cpu.device.panels import Layout
from polywhiten.cpu.geometry import (
    newton_iterates_size,
    newton_workspace_size,
    num_panels,
    padded,
    panel_workspace_size,
)
from polywhiten.cpu.launches import Address, LaunchBuilder, Program
from polywhiten.cpu.layout import layout_of, sample_order, split
from polywhiten.cpu.library import ArrayKey, Library, Strided
from polywhiten.cpu.runtime.parallel import address
from polywhiten.cpu.steps import (
    NO_AFFINE,
    NO_ARRAY,
    NO_CHANNELS,
    BlockArray,
    ChannelAffine,
    NewtonSteps,
    WeightSums,
    add_affine_map,
    add_cross_moments,
    add_inverse_sqrt,
    add_inverse_sqrt_adjoint,
    add_moments,
)
from polywhiten.spec import WhiteningSpec

X, DY, Y, DX = Address("x"), Address("dy"), Address("y"), Address("dx")
ORDERED_X, ORDERED_DY = Address("x in the order of dx"), Address("dy in the order of dx")
WEIGHT, BIAS = Address("weight"), Address("bias")
MEAN, COVARIANCE, WHITENER = Address("mean"), Address("covariance"), Address("whitener")
K, DCOV, DWEIGHT, DBIAS = Address("k"), Address("dcov"), Address("dweight"), Address("dbias")


class ParameterSums(NamedTuple):
    """Where workers sum up the gradients of weight and bias in the workspace, as float64."""

    num_workers: int
    worker_bytes: int
    begin: int  # bytes in a worker's workspace
    end: int


class Plan(NamedTuple):
    """What a call has to do.

    Attributes
    ----------
    result : Strided
        How y or dx lies in memory.
    vectors, matrices : tuple of int
        The shapes of the means and of the covariances.
    orders_x, orders_dy : bool
        Whether the array has to be copied to the memory order of the result.
    workspace_bytes : int
    programs : tuple of Program
        One, or two if another solver than Newton's works between them.
    parameter_sums : ParameterSums or None
        The gradients of weight and bias if they come this way.
    constants : tuple of array
        Arrays whose addresses are in the programs.
    """

    result: Strided
    vectors: tuple[int, int]
    matrices: tuple[int, int, int]
    orders_x: bool
    orders_dy: bool
    workspace_bytes: int
    programs: tuple[Program, ...]
    parameter_sums: ParameterSums | None = None
    constants: tuple[Any, ...] = ()


class Work(NamedTuple):
    """How threads share the work on an array."""

    num_workers: int
    num_chunks: int  # of each block
    by_block: bool  # whether all steps of a block follow each other
    newton: NewtonSteps | None  # None for another solver

    def builder(self, dtype: str, layout: Layout, derivative: bool, more: int = 0) -> LaunchBuilder:
        """Return a builder of launches, with some more elements in each worker's workspace."""
        size = worker_size(layout.d, self.newton, derivative) + more
        return LaunchBuilder(dtype, self.num_workers, size, layout.blocks if self.by_block else None)


def worker_size(d: int, newton: NewtonSteps | None, derivative: bool) -> int:
    """Return how many elements each worker needs."""
    size = panel_workspace_size(d)
    if newton is None or newton.shares_phases:
        return size
    return max(size, newton_workspace_size(d, derivative))


def num_workers(operations: int, num_threads: int) -> int:
    """Return how many threads so many operations are worth."""
    return int(min(num_threads, numba.config.NUMBA_NUM_THREADS, 1 + operations // tuning.MIN_OPS_PER_THREAD))


def workers_and_chunks(layout: Layout, num_threads: int, num_terms: int = 1) -> tuple[int, int]:
    """Return how many threads work on the panels of an array, and in how many chunks they share each block."""
    samples = layout.blocks * layout.outer * layout.inner
    workers = num_workers(num_terms * samples * padded(layout.d) ** 2, num_threads)
    chunks, most = 1, num_panels(layout)
    while layout.blocks * chunks % workers and layout.blocks * chunks < 8 * workers and chunks < most:
        chunks += 1
    return workers, chunks


def iteration_workers(blocks: int, d: int, steps: int, num_threads: int) -> int:
    """Return how many threads work on inverse square roots."""
    return num_workers(blocks * padded(d) ** 3 * steps, num_threads)


def shares_phases(blocks: int, d: int, steps: int, num_threads: int) -> bool:
    """Return whether matrices are so large and so few that threads work on each together."""
    return d >= tuning.MIN_SHARED_SIZE and blocks < iteration_workers(blocks, d, steps, num_threads)


def _work(spec: WhiteningSpec, layout: Layout, channels: Channels, itemsize: int, num_threads: int) -> Work:
    blocks, d = layout.blocks, layout.d
    workers, chunks = workers_and_chunks(layout, num_threads)
    steps = spec.solver.newton_steps(itemsize)
    block_bytes = layout.outer * layout.inner * padded(d) * itemsize
    is_even = blocks % workers == 0 or blocks >= 4 * workers
    fits = channels.number > 0 or block_bytes <= tuning.MAX_CACHED_BLOCK_BYTES
    by_block = steps is not None and is_even and fits
    if steps is None:
        return Work(workers, chunks, False, None)
    shares = not by_block and shares_phases(blocks, d, steps, num_threads)
    return Work(workers, 1 if by_block else chunks, by_block, NewtonSteps(steps, spec.eps, shares))


def _channels(spec: WhiteningSpec, shape: tuple[int, ...]) -> Channels:
    """Return how channels lie along the samples: none do if the variables are channels."""
    if not isinstance(spec.blocks, SampleGroups):
        return NO_CHANNELS
    axis = spec.blocks.axis
    return Channels(shape[axis], math.prod(shape[axis + 1 :]))


@lru_cache(tuning.MAX_KEPT_PLANS)
def forward_plan(
    library: Library, spec: WhiteningSpec, key: ArrayKey, num_threads: int, has_weight: bool, has_bias: bool
) -> Plan | None:
    """Return the plan of a forward pass; None if x can't be cut into blocks without a copy."""
    x4 = split(spec.blocks, library.strided(key))
    if x4 is None:
        return None
    dtype, block_axis, channels = library.dtype_name(key.dtype), spec.blocks.block_axis, _channels(spec, key.shape)
    y4, result = library.dense(x4, key.shape)
    x, y = BlockArray(X, layout_of(x4, block_axis)), BlockArray(Y, layout_of(y4, block_axis))
    blocks, d = x.layout.blocks, x.layout.d
    work = _work(spec, x.layout, channels, np.dtype(dtype).itemsize, num_threads)
    builder, programs, constants = work.builder(dtype, x.layout, False), [], []
    builder.launch(*add_moments(builder, x, block_axis, work.num_chunks, MEAN, COVARIANCE))
    if work.newton is None:
        programs.append(builder.program())
    else:
        add_inverse_sqrt(builder, work.newton, blocks, d, COVARIANCE, WHITENER)
    orders = sample_order(x.layout, block_axis) != sample_order(y.layout, block_axis)
    term = TermArgs(ORDERED_X, WHITENER, MEAN, y.layout) if orders else TermArgs(X, WHITENER, MEAN, x.layout)
    weight, bias = WEIGHT if has_weight else 0, BIAS if has_bias else 0
    if not channels.number:
        add_affine_map(builder, [term], y, block_axis, shift=bias, row_scale=weight)
    else:
        if has_weight != has_bias:
            constants.append(np.full(channels.number, 1.0 if has_bias else 0.0, dtype))
            weight, bias = (weight, address(constants[0])) if has_weight else (address(constants[0]), bias)
        add_affine_map(builder, [term], y, block_axis, affine=ChannelAffine(channels, 0, weight, bias))
    programs.append(builder.program())
    vectors, matrices = (blocks, d), (blocks, d, d)
    size = builder.workspace_bytes
    return Plan(result, vectors, matrices, orders, False, size, tuple(programs), constants=tuple(constants))


class Known(NamedTuple):
    """What a backward pass is given beside x and dy."""

    weight: bool
    bias: bool
    moments: bool
    whitener: bool


@lru_cache(tuning.MAX_KEPT_PLANS)
def backward_plan(
    library: Library, spec: WhiteningSpec, x_key: ArrayKey, dy_key: ArrayKey, num_threads: int, known: Known
) -> Plan | None:
    """Return the plan of a backward pass; None if x or dy can't be cut into blocks without a copy.

    The statistics have to be known if the solver isn't Newton's.
    """
    x4, dy4 = (split(spec.blocks, library.strided(key)) for key in (x_key, dy_key))
    if x4 is None or dy4 is None:
        return None
    block_axis, channels = spec.blocks.block_axis, _channels(spec, x_key.shape)
    dx4, result = library.dense(x4, x_key.shape)
    dx = BlockArray(DX, layout_of(dx4, block_axis))
    order = sample_order(dx.layout, block_axis)
    x, dy = BlockArray(X, layout_of(x4, block_axis)), BlockArray(DY, layout_of(dy4, block_axis))
    orders_x, orders_dy = (sample_order(array.layout, block_axis) != order for array in (x, dy))
    given = _BackwardArrays(
        BlockArray(ORDERED_X, dx.layout) if orders_x else x, BlockArray(ORDERED_DY, dx.layout) if orders_dy else dy, dx
    )
    dtype = library.dtype_name(x_key.dtype)
    work = _work(spec, x.layout, channels, np.dtype(dtype).itemsize, num_threads)
    if not (known.weight or known.bias):
        channels = NO_CHANNELS
    more = 4 * channels.number  # as many elements as 2 float64 of each channel take at most
    if channels.number and not known.whitener:
        work, more = _keeping_iterates(work, x.layout.d, more, np.dtype(dtype).itemsize)
    builder = work.builder(dtype, x.layout, True, more)
    sums, weight, constants = None, WEIGHT if known.weight else 0, []
    if channels.number:
        begin = worker_size(x.layout.d, work.newton, True) * builder.itemsize
        sums = ParameterSums(work.num_workers, builder.worker_bytes, begin, begin + 2 * 8 * channels.number)
        constants.append(np.zeros(channels.number, dtype))
        if not known.weight:
            constants.append(np.ones(channels.number, dtype))
            weight = address(constants[1])
    affine = ChannelAffine(channels, weight, 0, address(constants[0])) if channels.number else None
    programs = _backward_programs(builder, work, block_axis, known, given, affine)
    vectors = dx.layout.blocks, dx.layout.d
    sizes, size = (vectors, (*vectors, vectors[1])), builder.workspace_bytes
    return Plan(result, *sizes, orders_x, orders_dy, size, programs, sums, tuple(constants))


def _keeping_iterates(work: Work, d: int, more: int, itemsize: int) -> tuple[Work, int]:
    """Let the adjoint find the iterates that the whitener is computed by, if that is in the same part and cache.

    Return the work, and how many elements each worker's workspace has in addition, `more` of them for something else.
    """
    if work.newton is None or not work.by_block:
        return work, more
    size = newton_iterates_size(d, work.newton.steps)
    if size * itemsize > tuning.MAX_CACHED_BLOCK_BYTES:
        return work, more
    others = worker_size(d, work.newton, True)
    kept = padded(others + more)
    return work._replace(newton=work.newton._replace(kept=kept)), kept + size - others


class _BackwardArrays(NamedTuple):
    """Arrays whose samples have the same order."""

    x: BlockArray
    dy: BlockArray
    dx: BlockArray


def _backward_programs(
    builder: LaunchBuilder,
    work: Work,
    block_axis: int,
    known: Known,
    arrays: _BackwardArrays,
    affine: ChannelAffine | None,
) -> tuple[Program, ...]:
    """Return the programs of a backward pass; `affine` is that of channels along the samples, if they have one."""
    (x, dy, dx), programs, temporary = arrays, [], builder.temporary
    blocks, d = x.layout.blocks, x.layout.d
    mean, cov, whitener, computed_whitener = MEAN, COVARIANCE, WHITENER, NO_ARRAY
    if not known.moments:
        mean, cov = temporary(blocks * d), temporary(blocks * d * d)
        builder.launch(*add_moments(builder, x, block_axis, work.num_chunks, mean, cov))
    if not known.whitener:
        assert work.newton is not None
        whitener = temporary(blocks * d * d)
        if affine:
            add_inverse_sqrt(builder, work.newton, blocks, d, cov, whitener)
        else:
            computed_whitener = whitener  # the adjoint computes it anyway
    s = DBIAS if known.bias and not affine else temporary(blocks * d)
    k, dcov = (K, DCOV) if work.newton is None else (temporary(blocks * d * d), temporary(blocks * d * d))
    sums = None
    if affine:
        begin = worker_size(d, work.newton, True)
        sums = WeightSums(affine.channels, whitener, affine.input_weight, begin)
    builder.launch(*add_cross_moments(builder, dy, x, block_axis, work.num_chunks, mean, s, k, sums))
    row_scale = WEIGHT if known.weight and not affine else 0
    if work.newton is None:
        programs.append(builder.program())
    else:
        add_inverse_sqrt_adjoint(builder, work.newton, blocks, d, cov, k, dcov, row_scale, computed_whitener)
    matrix, mean_dy = whitener, temporary(blocks * d)  # the whitener is symmetric, up to rounding
    if row_scale:
        matrix = temporary(blocks * d * d)
        builder.launch(scale_whitener, ScaleWhitenerArgs(blocks, d, whitener, WEIGHT, k, matrix, DWEIGHT))
    num_samples = x.layout.outer * x.layout.inner
    builder.launch(gradient_terms, GradientTermsArgs(blocks, d, num_samples, dcov, s, mean_dy))
    terms = [TermArgs(dy.address, matrix, mean_dy, dy.layout), TermArgs(x.address, dcov, mean, x.layout)]
    add_affine_map(builder, terms, dx, block_axis, affine=affine or NO_AFFINE)
    programs.append(builder.program())
    return tuple(programs)
