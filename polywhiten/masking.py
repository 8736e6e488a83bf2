"""Whitening over the batch with positions left out of the statistics; its gradient is the framework's own."""

from __future__ import annotations

from polywhiten._types import AllReduce, Array
from polywhiten.blocks import ChannelGroups, channel_shape
from polywhiten.dispatch import Backend
from polywhiten.groups import WhiteningStats, channel_parts, join_channels, join_statistics, take_channels
from polywhiten.kernels import Kernels, outer_square
from polywhiten.solvers import Solver
from polywhiten.whitening import Statistics, affine, reduced


def whiten_masked_channels(
    backend: Backend,
    x: Array,
    mask: Array,
    weight: Array | None,
    bias: Array | None,
    group_size: int,
    axis: int,
    solver: Solver,
    eps: float,
    all_reduce: AllReduce | None = None,
) -> tuple[Array, WhiteningStats, Array]:
    """`whiten_channels` with the statistics of the positions where `mask` is true, and their number.

    The mask has the shape of x without its channel axis. All positions are whitened.
    """
    kernels = backend.kernels
    xp = kernels.xp
    full = kernels.for_statistics(x)
    keep = xp.expand_dims(mask, axis=axis)
    nothing = xp.zeros_like(full)
    count = xp.sum(xp.astype(keep, full.dtype))
    total = xp.sum(xp.where(keep, full, nothing), axis=tuple(i for i in range(x.ndim) if i != axis))
    if all_reduce is not None:
        count, total = reduced(kernels, all_reduce, count, total)
    divisor = xp.clip(count, min=1.0)  # all may be masked
    mean = total / divisor
    centred = xp.where(keep, full - xp.reshape(mean, channel_shape(x.ndim, axis)), nothing)
    outputs, stats = [], []
    for part, size in channel_parts(x.shape[axis], group_size):
        blocks = ChannelGroups(axis, size)
        part_stats = _statistics(
            kernels,
            blocks,
            take_channels(centred, part, axis),
            take_channels(mean, part),
            divisor,
            solver,
            eps,
            all_reduce,
        )
        given = take_channels(x, part, axis), part_stats.mean, part_stats.whitener
        outputs.append(affine(kernels, blocks, *given, take_channels(weight, part), take_channels(bias, part)))
        stats.append(part_stats)
    return join_channels(xp, outputs, axis), join_statistics(xp, stats), count


def _statistics(
    kernels: Kernels,
    blocks: ChannelGroups,
    centred: Array,
    mean: Array,
    count: Array,
    solver: Solver,
    eps: float,
    all_reduce: AllReduce | None,
) -> Statistics:
    """Of equal groups: `centred` is 0 where it is masked, so that its sums are those of the others."""
    x4 = kernels.split(blocks, centred)
    number = kernels.sample_count(x4, blocks.block_axis, least=1)
    lost, cov = kernels.moments(x4, blocks.block_axis)
    sums, products = lost * number, (cov + outer_square(lost)) * number
    if all_reduce is not None:
        _, sums, products = reduced(kernels, all_reduce, 0, sums, products)
    lost = sums / count  # what rounding has left in the mean
    cov = products / count - outer_square(lost)
    mean = kernels.xp.reshape(mean, lost.shape) + lost
    return Statistics(mean, cov, kernels.inverse_sqrt(solver, cov, eps))
