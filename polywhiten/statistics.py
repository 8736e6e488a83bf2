"""Mean, covariance and whitener of blocks: of all samples, over several workers, and with positions left out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from polywhiten._types import AllReduce, Array, Namespace
from polywhiten.blocks import ChannelGroups, channel_parts, channel_shape, join_channels, take_channels, take_groups
from polywhiten.kernels import Kernels, outer_square
from polywhiten.solvers import Solver
from polywhiten.solvers.iteration import identity_like
from polywhiten.spec import WhiteningSpec

TRACKED = ("whitener", "covariance")  # the matrices that a layer may average


class Statistics(NamedTuple):
    """Statistics of equal blocks: mean (blocks, d), covariance without eps and whitener, both (blocks, d, d)."""

    mean: Array
    covariance: Array
    whitener: Array


NO_STATISTICS = Statistics(None, None, None)


class WhiteningStats(NamedTuple):
    """Statistics of groups of d channels, where the last group may be smaller than d.

    Attributes
    ----------
    mean : array, shape (C,)
    covariance : array, shape (groups, d, d)
        Divided by the number of samples, without eps.
    whitener : array, shape (groups, d, d)
        (covariance + eps I)^(-1/2), as the chosen method approximates it.

    Notes
    -----
    If the last group is smaller, its matrices stand in the upper left corner and the identity fills the rest.
    """

    mean: Array
    covariance: Array
    whitener: Array


def join_statistics(xp: Namespace, parts: list[Statistics]) -> WhiteningStats:
    """Return the statistics of all channels from those of one or two parts, each of equal groups."""
    return WhiteningStats(
        join_channels(xp, [xp.reshape(part.mean, (-1,)) for part in parts]),
        join_matrices(xp, [part.covariance for part in parts]),
        join_matrices(xp, [part.whitener for part in parts]),
    )


def join_matrices(xp: Namespace, parts: list[Array]) -> Array:
    """Return the matrices of all groups; the identity fills what a smaller last one lacks."""
    if len(parts) == 1:
        return parts[0]
    first, last = parts
    d, eye = last.shape[-1], identity_like(xp, first)
    top = xp.concat([last, eye[:, :d, d:]], axis=2)
    return xp.concat([first, xp.concat([top, eye[:, d:, :]], axis=1)])


def batch_statistics(kernels: Kernels, spec: WhiteningSpec, x: Array, shift: Array | None = None) -> Statistics:
    """Return mean, covariance and W = (covariance + eps I)^(-1/2) of equal blocks, over all workers.

    The samples are those of x plus `shift` (blocks, d), which may be another one for each worker.
    """
    block_axis = spec.blocks.block_axis
    x4 = kernels.split(spec.blocks, x)
    mean, cov = kernels.moments(x4, block_axis)
    mean = mean if shift is None else mean + shift
    if spec.all_reduce is not None:
        count = kernels.sample_count(x4, block_axis)
        total_count, total = sum_over_workers(kernels, spec.all_reduce, count, mean * count)
        joint_mean = total / total_count
        # the parts' covariances are about the parts' own means
        cov = spec.all_reduce(count * (cov + outer_square(mean - joint_mean))) / total_count
        mean = joint_mean
    return Statistics(mean, cov, kernels.inverse_sqrt(spec.solver, cov, spec.eps))


def masked_statistics(
    kernels: Kernels, spec: WhiteningSpec, x: Array, mask: Array
) -> tuple[list[tuple[slice, WhiteningSpec, Statistics]], Array]:
    """Return the statistics of the positions where `mask` is true, and the number of these positions.

    The mask has the shape of x without its channel axis. Statistics come in one or two parts, each with its channels
    and what is computed of them, in equal groups.
    """
    assert isinstance(spec.blocks, ChannelGroups)  # a mask leaves samples of a batch out
    xp, axis, all_reduce = kernels.xp, spec.blocks.axis, spec.all_reduce
    full = kernels.to_accumulation_dtype(x)
    keep = xp.expand_dims(mask, axis=axis)
    zeros = xp.zeros_like(full)
    count = xp.sum(xp.astype(keep, full.dtype))
    total = xp.sum(xp.where(keep, full, zeros), axis=tuple(i for i in range(x.ndim) if i != axis))
    if all_reduce is not None:
        count, total = sum_over_workers(kernels, all_reduce, count, total)
    divisor = xp.clip(count, min=1.0)  # all may be masked
    mean = total / divisor
    centred = xp.where(keep, full - xp.reshape(mean, channel_shape(x.ndim, axis)), zeros)
    parts = []
    for part, equal in spec.equal_parts(x):
        part_mean = take_channels(mean, part)
        stats = _statistics_of_centred(kernels, equal, take_channels(centred, part, axis), part_mean, divisor)
        parts.append((part, equal, stats))
    return parts, count


def _statistics_of_centred(
    kernels: Kernels, spec: WhiteningSpec, centred: Array, mean: Array, count: Array
) -> Statistics:
    """Return statistics of equal groups; `centred` is 0 where it is masked, so its sums are those of the others."""
    block_axis = spec.blocks.block_axis
    x4 = kernels.split(spec.blocks, centred)
    positions = kernels.sample_count(x4, block_axis, least=1)
    residual, cov = kernels.moments(x4, block_axis)
    sums, products = residual * positions, (cov + outer_square(residual)) * positions
    if spec.all_reduce is not None:
        _, sums, products = sum_over_workers(kernels, spec.all_reduce, 0, sums, products)
    residual = sums / count  # what rounding has left in the mean
    cov = products / count - outer_square(residual)
    mean = kernels.xp.reshape(mean, residual.shape) + residual
    return Statistics(mean, cov, kernels.inverse_sqrt(spec.solver, cov, spec.eps))


def whitener_of(kernels: Kernels, covariance: Array, channels: int, solver: Solver, eps: float) -> Array:
    """Return the whiteners (groups, d, d) of given covariances (groups, d, d)."""
    parts = [take_groups(covariance, part, d) for part, d in channel_parts(channels, covariance.shape[-1])]
    return join_matrices(kernels.xp, [kernels.inverse_sqrt(solver, part, eps) for part in parts])


def sum_over_workers(kernels: Kernels, all_reduce: AllReduce, count: Any, *arrays: Array | None) -> list[Array]:
    """Return the sums of a count and of arrays over all workers, by one exchange; None stays None."""
    xp = kernels.xp
    flat = [xp.reshape(array, (-1,)) for array in arrays if array is not None]
    packed = all_reduce(xp.concat([xp.full_like(flat[0][:1], count), *flat]))
    result, start = [packed[0]], 1
    for array in arrays:
        if array is None:
            result.append(None)
            continue
        stop = start + math.prod(array.shape)
        result.append(xp.reshape(packed[start:stop], array.shape))
        start = stop
    return result
