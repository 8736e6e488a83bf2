"""Whitening, forward and backward, written once over the five kernels of `polywhiten.kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polywhiten._types import Array
from polywhiten.blocks import (
    Blocks,
    ChannelGroups,
    channel_parts,
    channel_shape,
    join_channels,
    take_channels,
    take_groups,
)
from polywhiten.kernels import Kernels, Term
from polywhiten.memory_order import ChannelsFirst
from polywhiten.solvers import Solver
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import NO_STATISTICS, Statistics, batch_statistics, sum_over_workers

Gradients = tuple[Array, Array | None, Array | None]  # of x, weight and bias
# What backward sums over samples: their number, s, and the gradients of whitener, mean and covariance.
Sums = Sequence[Any]


@dataclass(frozen=True)
class Reference:
    """The implementation that serves every array, over the five kernels of its library.

    A backend's faster implementations inherit from it, with kernels of their own, shortcuts, or both. All blocks of an
    array are equal here: `polywhiten.backend.Backend` cuts off a smaller last group.
    """

    name = "array API"
    kernels: Kernels

    def supports(self, spec: WhiteningSpec | None, x: Array, *others: Array | None) -> bool:
        """Return whether the other methods may be called with these arrays, of which x or a covariance is the first.

        There is no spec for `apply_frozen` and `inverse_sqrt`. Any array will do here.
        """
        return True

    def statistics(self, spec: WhiteningSpec, x: Array) -> Statistics:
        """Return the statistics of the blocks of x."""
        return batch_statistics(self.kernels, spec, x)

    def forward(
        self, spec: WhiteningSpec, x: Array, weight: Array | None, bias: Array | None
    ) -> tuple[Array, Statistics]:
        """Return y = W (x - mean) of every block, times weight (C,) plus bias (C,), and the statistics."""
        order = ChannelsFirst.of(self.kernels, spec, x)
        if order is not None:
            y, stats = self.forward(order.spec, order.arranged(x), weight, bias)
            return order.restored(y), stats
        stats = self.statistics(spec, x)
        return self.apply(spec.blocks, x, stats.mean, stats.whitener, weight, bias), stats

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
        """Return the gradients of x, weight and bias from those of y and, if a loss uses them too, of the statistics.

        Statistics that are None, the whitener alone or all of them, are computed again.

        With K = dY (X - mean)', s = dY 1 and dS the adjoint of S -> S^(-1/2) along G = diag(weight) K::

            dX = A' (dY - s / M) + (dS + dS') / M (X - mean),    A = diag(weight) W
        """
        kernels = self.kernels
        if stats.mean is None:
            stats = self.statistics(spec, x)
        elif stats.whitener is None:
            stats = stats._replace(whitener=kernels.inverse_sqrt(spec.solver, stats.covariance, spec.eps))
        order = ChannelsFirst.of(kernels, spec, x)
        if order is not None:
            reordered = order.arranged(x), weight, bias, stats, order.arranged(dy)
            dx, dweight, dbias = self.backward(order.spec, *reordered, dstats)
            return order.restored(dx), dweight, dbias
        if isinstance(spec.blocks, ChannelGroups):
            dx, dweight, dbias = self._channels_backward(spec, x, weight, bias, stats, dy, dstats)
        else:
            dy, dweight, dbias = self._undo_channel_affine(spec.blocks, x, weight, bias, stats, dy)
            x4, dy4 = kernels.split(spec.blocks, x), kernels.split(spec.blocks, dy)
            s, k = kernels.cross_moments(dy4, x4, stats.mean, spec.blocks.block_axis)
            dx = self.input_gradient(spec, x4, stats, stats.whitener, dy4, self._sums(spec, x4, s, k, dstats))
        dx = kernels.xp.reshape(dx, kernels.shape(x))
        return dx, as_dtype_of(kernels, dweight, weight), as_dtype_of(kernels, dbias, bias)

    def apply_frozen(
        self, axis: int, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None
    ) -> Array:
        """Return diag(weight) whitener (x - mean) + bias for mean (C,) and whitener (groups, d, d)."""
        xp, dtype = self.kernels.xp, self.kernels.accumulation_dtype(x.dtype)
        mean, whitener = (xp.astype(values, dtype, copy=False) for values in (mean, whitener))
        outputs = []
        for part, size in channel_parts(x.shape[axis], whitener.shape[-1]):
            y = self.apply(
                ChannelGroups(axis, size),
                take_channels(x, part, axis),
                xp.reshape(take_channels(mean, part), (-1, size)),
                take_groups(whitener, part, size),
                take_channels(weight, part),
                take_channels(bias, part),
            )
            outputs.append(y)
        return join_channels(xp, outputs, axis)

    def inverse_sqrt(self, solver: Solver, cov: Array, eps: float = 0.0) -> Array:
        """Return (cov + eps I)^(-1/2) of matrices (..., d, d)."""
        return self.kernels.inverse_sqrt(solver, cov, eps)

    def apply(
        self, blocks: Blocks, x: Array, mean: Array, whitener: Array, weight: Array | None, bias: Array | None
    ) -> Array:
        """Return diag(weight) whitener (x - mean) + bias, in the shape and dtype of x."""
        kernels, xp = self.kernels, self.kernels.xp
        term = Term(whitener, kernels.split(blocks, x), mean)
        if isinstance(blocks, ChannelGroups):  # the variables are channels, so one affine map does all
            scale, shift = (None if v is None else _per_variable(kernels, v, mean) for v in (weight, bias))
            y = kernels.affine_map([term], shift, blocks.block_axis, x.dtype, row_scale=scale)
            return xp.reshape(y, kernels.shape(x))
        dtype = x.dtype if weight is None and bias is None else mean.dtype
        y = xp.reshape(kernels.affine_map([term], None, blocks.block_axis, dtype), kernels.shape(x))
        shape = channel_shape(x.ndim, blocks.axis)
        if weight is not None:
            y = y * xp.reshape(xp.astype(weight, dtype, copy=False), shape)
        if bias is not None:
            y = y + xp.reshape(xp.astype(bias, dtype, copy=False), shape)
        return xp.astype(y, x.dtype, copy=False)

    def _channels_backward(
        self,
        spec: WhiteningSpec,
        x: Array,
        weight: Array | None,
        bias: Array | None,
        stats: Statistics,
        dy: Array,
        dstats: Statistics,
    ) -> Gradients:
        """Return the gradients, that of x as (p, q, d, l), where each variable is a channel."""
        x4, dy4 = self.kernels.split(spec.blocks, x), self.kernels.split(spec.blocks, dy)
        a, sums, dweight, dbias = self.channel_sums(spec, x4, weight, bias, stats, dy4, dstats)
        return self.input_gradient(spec, x4, stats, a, dy4, sums), dweight, dbias

    def channel_sums(
        self,
        spec: WhiteningSpec,
        x4: Array,
        weight: Array | None,
        bias: Array | None,
        stats: Statistics,
        dy4: Array,
        dstats: Statistics,
    ) -> tuple[Array, Sums, Array | None, Array | None]:
        """Return A of the formula in `backward`, the worker's sums, and the gradients of weight and bias.

        Each variable is a channel, so weight and bias are part of the affine map. x and dy are (p, q, d, l).
        """
        kernels, xp = self.kernels, self.kernels.xp
        s, k = kernels.cross_moments(dy4, x4, stats.mean, spec.blocks.block_axis)
        a, dweight = stats.whitener, None
        if weight is not None:
            dweight = xp.reshape(xp.sum(k * stats.whitener, axis=-1), (-1,))
            a, k = (m * _per_variable(kernels, weight, m)[..., None] for m in (a, k))
        return a, self._sums(spec, x4, s, k, dstats), dweight, None if bias is None else xp.reshape(s, (-1,))

    def _sums(self, spec: WhiteningSpec, x4: Array, s: Array, g: Array, dstats: Statistics) -> Sums:
        g = g if dstats.whitener is None else g + dstats.whitener
        return self.kernels.sample_count(x4, spec.blocks.block_axis), s, g, dstats.mean, dstats.covariance

    def input_gradient(
        self, spec: WhiteningSpec, x4: Array, stats: Statistics, a: Array, dy4: Array, sums: Sums
    ) -> Array:
        """Return dX of the formula in `backward` as (p, q, d, l), after summing over the workers; `a` maps x to y."""
        kernels, xp = self.kernels, self.kernels.xp
        if spec.all_reduce is not None:
            sums = sum_over_workers(kernels, spec.all_reduce, *sums)
        count, s, g, dmean, dcov = sums
        ds = kernels.inverse_sqrt_adjoint(spec.solver, stats.covariance, g, spec.eps)
        if dcov is not None:
            ds = ds + dcov
        b = (ds + xp.matrix_transpose(ds)) / count
        terms = [Term(xp.matrix_transpose(a), dy4, s / count), Term(b, x4, stats.mean)]
        shift = None if dmean is None else dmean / count
        return kernels.affine_map(terms, shift, spec.blocks.block_axis, x4.dtype)

    def _undo_channel_affine(
        self, blocks: Blocks, x: Array, weight: Array | None, bias: Array | None, stats: Statistics, dy: Array
    ) -> Gradients:
        """Return the gradients of the whitened array, weight and bias where a variable has several channels."""
        kernels, xp = self.kernels, self.kernels.xp
        dweight = dbias = None
        if weight is None and bias is None:
            return dy, None, None
        others = tuple(i for i in range(x.ndim) if i != blocks.axis)
        dy = kernels.to_accumulation_dtype(dy)
        if bias is not None:
            dbias = xp.sum(dy, axis=others)
        if weight is not None:
            white = self.apply(blocks, kernels.to_accumulation_dtype(x), stats.mean, stats.whitener, None, None)
            dweight = xp.sum(dy * white, axis=others)
            dy = dy * xp.reshape(xp.astype(weight, dy.dtype, copy=False), channel_shape(x.ndim, blocks.axis))
        return dy, dweight, dbias


def as_dtype_of(kernels: Kernels, gradient: Array | None, parameter: Array | None) -> Array | None:
    """Return the gradient in the dtype of its parameter, None if there is no parameter."""
    return None if parameter is None else kernels.xp.astype(gradient, parameter.dtype, copy=False)


def _per_variable(kernels: Kernels, values: Array, like: Array) -> Array:
    """Return values (C,) as (blocks, d), in the dtype of `like` (blocks, d, ...)."""
    return kernels.xp.reshape(kernels.xp.astype(values, like.dtype, copy=False), like.shape[:2])
