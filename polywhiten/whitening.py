"""Whitening of equal blocks, forward and backward, over the five kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from polywhiten._types import AllReduce, Array, Shape
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups, channel_shape
from polywhiten.kernels import Kernels, Term, outer_square
from polywhiten.solvers import Solver


@dataclass(frozen=True)
class Plan:
    """All that forward and backward know beside the arrays; hashable, so that tracers can keep it as a constant."""

    blocks: Blocks
    solver: Solver
    eps: float
    all_reduce: AllReduce | None = None


class Statistics(NamedTuple):
    """Of every block: mean (blocks, d), covariance without eps and whitener, both (blocks, d, d)."""

    mean: Array
    covariance: Array
    whitener: Array


NO_STATISTICS = Statistics(None, None, None)


class Whole(Protocol):
    """Forward and backward of an array, split into blocks, with weight and bias on the way."""

    def forward(self, weight: Array | None, bias: Array | None) -> tuple[Array, Statistics]:
        """Y, and the statistics."""

    def backward(
        self, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
    ) -> tuple[Array, Array | None, Array | None]:
        """As `backward`, of dy split as x is."""


def statistics(kernels: Kernels, plan: Plan, x: Array) -> Statistics:
    """Mean, covariance and W = (covariance + eps I)^(-1/2) of the blocks of x."""
    block_axis = plan.blocks.block_axis
    x4 = kernels.split(plan.blocks, x)
    mean, cov = kernels.moments(x4, block_axis)
    if plan.all_reduce is not None:
        count = kernels.sample_count(x4, block_axis)
        total, whole = reduced(kernels, plan.all_reduce, count, mean * count)
        whole = whole / total
        off = mean - whole
        cov = plan.all_reduce(count * (cov + outer_square(off))) / total
        mean = whole
    return Statistics(mean, cov, kernels.inverse_sqrt(plan.solver, cov, plan.eps))


def forward(
    kernels: Kernels, plan: Plan, x: Array, weight: Array | None, bias: Array | None
) -> tuple[Array, Statistics]:
    """Y = W (X - mean) of every block, then weight and bias (C,) of every channel."""
    whole = kernels.whole(plan, x, weight, bias) if plan.all_reduce is None else None
    if whole is not None:
        y, stats = whole.forward(weight, bias)
        return kernels.xp.reshape(y, x.shape), stats
    order = _ChannelsFirst.of(kernels, plan, x)
    if order is not None:
        y, stats = forward(kernels, order.plan, order.arranged(x), weight, bias)
        return order.restored(y), stats
    stats = statistics(kernels, plan, x)
    return affine(kernels, plan.blocks, x, stats.mean, stats.whitener, weight, bias), stats


def affine(
    kernels: Kernels, blocks: Blocks, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None
) -> Array:
    """diag(weight) whitener (x - mean) + bias, in the shape and dtype of x."""
    xp = kernels.xp
    x4 = kernels.split(blocks, x)
    if isinstance(blocks, ChannelGroups):  # the variables are channels: one affine map does it all
        factor, shift = (None if each is None else _per_variable(kernels, each, mean) for each in (weight, bias))
        y = kernels.scaled_map(factor, Term(whitener, x4, mean), shift, blocks.block_axis, x.dtype)
        return xp.reshape(y, kernels.shape(x))
    dtype = x.dtype if weight is None and bias is None else mean.dtype
    y = xp.reshape(kernels.affine_map([Term(whitener, x4, mean)], None, blocks.block_axis, dtype), kernels.shape(x))
    shape = channel_shape(x.ndim, blocks.axis)
    if weight is not None:
        y = y * xp.reshape(xp.astype(weight, dtype, copy=False), shape)
    if bias is not None:
        y = y + xp.reshape(xp.astype(bias, dtype, copy=False), shape)
    return xp.astype(y, x.dtype, copy=False)


def backward(
    kernels: Kernels,
    plan: Plan,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    stats: Statistics,
    dy: Array,
    dstats: Statistics = NO_STATISTICS,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of x, weight and bias, from that of y and, where a loss uses them too, those of the statistics.

    Statistics that are None, the whitener or all, are computed again.

    With K = dY (X - mean)', s = dY 1 and dS the adjoint of S -> S^(-1/2) along G = diag(weight) K::

        dX = A' (dY - s / M) + (dS + dS') / M (X - mean),    A = diag(weight) W
    """
    alone = plan.all_reduce is None and all(each is None for each in dstats)
    whole = kernels.whole(plan, x, weight, bias, dy, *stats) if alone else None
    if whole is not None:
        dx, dweight, dbias = whole.backward(weight, bias, stats, kernels.split(plan.blocks, dy))
        return kernels.xp.reshape(dx, x.shape), dweight, dbias
    if stats.mean is None:
        stats = statistics(kernels, plan, x)
    elif stats.whitener is None:
        stats = stats._replace(whitener=kernels.inverse_sqrt(plan.solver, stats.covariance, plan.eps))
    order = _ChannelsFirst.of(kernels, plan, x)
    if order is not None:
        given = order.arranged(x), weight, bias, stats, order.arranged(dy)
        dx, dweight, dbias = backward(kernels, order.plan, *given, dstats)
        return order.restored(dx), dweight, dbias
    xp, block_axis = kernels.xp, plan.blocks.block_axis
    mean, cov, whitener = stats
    folded = isinstance(plan.blocks, ChannelGroups)
    dweight = dbias = None
    if not folded:
        dy, dweight, dbias = _undo_channel_affine(kernels, plan.blocks, x, weight, bias, stats, dy)
    x4, dy4 = kernels.split(plan.blocks, x), kernels.split(plan.blocks, dy)
    s, g = kernels.cross_moments(dy4, x4, mean, block_axis)
    a = whitener
    if folded:
        dbias = None if bias is None else xp.reshape(s, (-1,))
        if weight is not None:
            dweight = xp.reshape(xp.sum(g * whitener, axis=-1), (-1,))
            a, g = _scaled(kernels, a, weight), _scaled(kernels, g, weight)
    if dstats.whitener is not None:
        g = g + dstats.whitener
    count, dmean, dcov = kernels.sample_count(x4, block_axis), dstats.mean, dstats.covariance
    if plan.all_reduce is not None:
        count, s, g, dmean, dcov = reduced(kernels, plan.all_reduce, count, s, g, dmean, dcov)
    ds = kernels.inverse_sqrt_adjoint(plan.solver, cov, g, plan.eps)
    if dcov is not None:
        ds = ds + dcov
    b = (ds + xp.matrix_transpose(ds)) / count
    terms = [Term(xp.matrix_transpose(a), dy4, s / count), Term(b, x4, mean)]
    shift = None if dmean is None else dmean / count
    dx = xp.reshape(kernels.affine_map(terms, shift, block_axis, x.dtype), kernels.shape(x))
    return dx, as_dtype_of(kernels, dweight, weight), as_dtype_of(kernels, dbias, bias)


@dataclass(frozen=True)
class _ChannelsFirst:
    """An array whose samples have positions before and after a group's channels, with all of them after."""

    kernels: Kernels
    plan: Plan
    shape: Shape
    axes: tuple[int, ...]

    @classmethod
    def of(cls, kernels: Kernels, plan: Plan, x: Array) -> _ChannelsFirst | None:
        """None where that is no gain."""
        blocks = plan.blocks
        if kernels.reads_any_order or not isinstance(blocks, SampleGroups) or blocks.axis == 1:
            return None
        shape = kernels.shape(x)  # an operation in TensorFlow's graphs
        size = blocks.split(shape)[3]
        if isinstance(size, int) and size == 1:  # rows of variables: matrices as they are
            return None
        axes = (0, blocks.axis, *(i for i in range(1, x.ndim) if i != blocks.axis))
        return cls(kernels, replace(plan, blocks=replace(blocks, axis=1)), tuple(shape[i] for i in axes), axes)

    def arranged(self, x: Array) -> Array:
        """(N, C, positions); a copy."""
        batch, channels, *positions = self.shape
        xp = self.kernels.xp
        return xp.reshape(xp.permute_dims(x, self.axes), (batch, channels, math.prod(positions)))

    def restored(self, y: Array) -> Array:
        """Of the former shape; a view where the library has views."""
        inverse = tuple(map(self.axes.index, range(len(self.axes))))
        return self.kernels.xp.permute_dims(self.kernels.xp.reshape(y, self.shape), inverse)


def _undo_channel_affine(
    kernels: Kernels, blocks: Blocks, x: Array, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
) -> tuple[Array, Array | None, Array | None]:
    """Gradient of the whitened array, of weight and of bias, where these don't fold into the whitener."""
    xp = kernels.xp
    dweight = dbias = None
    others = tuple(i for i in range(x.ndim) if i != blocks.axis)
    if weight is None and bias is None:
        return dy, None, None
    dy = kernels.for_statistics(dy)
    if bias is not None:
        dbias = xp.sum(dy, axis=others)
    if weight is not None:
        white = affine(kernels, blocks, kernels.for_statistics(x), stats.mean, stats.whitener, None, None)
        dweight = xp.sum(dy * white, axis=others)
        dy = dy * xp.reshape(xp.astype(weight, dy.dtype, copy=False), channel_shape(x.ndim, blocks.axis))
    return dy, dweight, dbias


def _scaled(kernels: Kernels, matrix: Array, weight: Array) -> Array:
    """diag(weight) matrix."""
    return matrix * _per_variable(kernels, weight, matrix)[..., None]


def _per_variable(kernels: Kernels, values: Array, like: Array) -> Array:
    """(C,) as (blocks, d), in the dtype of `like`."""
    return kernels.xp.reshape(kernels.xp.astype(values, like.dtype, copy=False), like.shape[:2])


def as_dtype_of(kernels: Kernels, gradient: Array | None, parameter: Array | None) -> Array | None:
    return None if parameter is None else kernels.xp.astype(gradient, parameter.dtype, copy=False)


def reduced(kernels: Kernels, all_reduce: AllReduce, count: Any, *arrays: Array | None) -> list[Array]:
    """Sums over the workers of a count and of arrays, in one exchange."""
    xp = kernels.xp
    given = [array for array in arrays if array is not None]
    flat = [xp.reshape(array, (-1,)) for array in given]
    packed = all_reduce(xp.concat([xp.full_like(flat[0][:1], count), *flat]))
    result = [packed[0]]
    start = 1
    for array in arrays:
        if array is None:
            result.append(None)
            continue
        stop = start + math.prod(array.shape)
        result.append(xp.reshape(packed[start:stop], array.shape))
        start = stop
    return result
