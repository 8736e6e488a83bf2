"""Whitening by the statistics of a batch that several processes share: one exchange forward, and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

import polywhiten.torch.namespace as xp
from polywhiten.backend import Backend, Implementation
from polywhiten.blocks import join_channels, take_channels, take_groups
from polywhiten.reference import Gradients, as_dtype_of
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics, WhiteningStats, join_statistics, sum_over_workers
from polywhiten.torch.processes import SumOverProcesses


@dataclass(frozen=True)
class _Part:
    """Channels in groups of equal size, and the implementation that whitens them on this process.

    The spec has no `all_reduce`, because all parts are exchanged together.
    """

    channels: slice
    spec: WhiteningSpec
    implementation: Implementation
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def split(self, x: Tensor) -> Tensor:
        """Return these channels of x, or of an array of its shape, as (p, q, d, l)."""
        result: Tensor = self.implementation.kernels.split(self.spec.blocks, x)
        return result

    def statistics(self, stats: Statistics | WhiteningStats) -> Statistics:
        """Return the statistics of these channels, or their gradients, of which some may be None."""
        mean: Any
        mean, *matrices = stats
        size = self.spec.blocks.split(self.x.shape)[2]
        if mean is not None:
            mean = mean[self.channels].reshape(-1, size)
        return Statistics(mean, *(m if m is None else take_groups(m, self.channels, size) for m in matrices))


class _OwnGradient(NamedTuple):
    """What a part's gradient needs beside the sums over all processes: see `Reference.channel_sums`."""

    x4: Tensor
    stats: Statistics
    a: Tensor
    dy4: Tensor


def is_shared(spec: WhiteningSpec) -> bool:
    """Return whether processes share the batch, so that the functions of this module serve the spec."""
    return isinstance(spec.all_reduce, SumOverProcesses)


def forward(
    backend: Backend, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Statistics]:
    """Return y and the joined batch's statistics, in the form of `WhiteningStats`, as groups may be unequal."""
    parts = _parts(backend, spec, x, weight, bias)
    stats = _statistics(spec, parts)
    outputs = [
        part.implementation.apply(part.spec.blocks, part.x, of_part.mean, of_part.whitener, part.weight, part.bias)
        for part, of_part in zip(parts, stats, strict=True)
    ]
    return join_channels(xp, outputs, spec.blocks.axis), Statistics(*join_statistics(xp, stats))


def statistics(backend: Backend, spec: WhiteningSpec, x: Tensor) -> WhiteningStats:
    """Return the joined batch's statistics."""
    return join_statistics(xp, _statistics(spec, _parts(backend, spec, x, None, None)))


def backward(
    backend: Backend,
    spec: WhiteningSpec,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Statistics,
    dy: Tensor,
    dstats: Statistics,
) -> Gradients:
    """Return the gradient of x for the sum of all processes' losses, and those of weight and bias for the own one."""
    parts = _parts(backend, spec, x, weight, bias, dy)
    axis, kernels = spec.blocks.axis, parts[0].implementation.kernels
    own, counts, sums, dweights, dbiases = [], [], [], [], []
    for part in parts:
        x4, of_part = part.split(part.x), part.statistics(stats)
        dy4 = part.split(cast(Tensor, take_channels(dy, part.channels, axis)))
        a, (count, *part_sums), dweight, dbias = part.implementation.channel_sums(
            part.spec, x4, part.weight, part.bias, of_part, dy4, part.statistics(dstats)
        )
        own.append(_OwnGradient(x4, of_part, a, dy4))
        counts.append(count)  # all parts have the same samples
        sums += part_sums
        dweights.append(dweight)
        dbiases.append(dbias)
    total_count, *totals = sum_over_workers(kernels, _exchange(spec), counts[0], *sums)
    dxs, each = [], len(totals) // len(parts)
    for i, (part, of_own) in enumerate(zip(parts, own, strict=True)):
        part_totals = total_count, *totals[i * each : (i + 1) * each]
        dxs.append(part.implementation.input_gradient(part.spec, *of_own, part_totals).reshape(part.x.shape))
    dweight = None if weight is None else join_channels(xp, dweights)
    dbias = None if bias is None else join_channels(xp, dbiases)
    return join_channels(xp, dxs, axis), as_dtype_of(kernels, dweight, weight), as_dtype_of(kernels, dbias, bias)


def _exchange(spec: WhiteningSpec) -> SumOverProcesses:
    assert isinstance(spec.all_reduce, SumOverProcesses), "as is_shared says"
    return spec.all_reduce


def _parts(
    backend: Backend, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Tensor
) -> list[_Part]:
    """Return one part, or two if the last group is smaller, for an implementation that supports the others, too."""
    axis, parts = spec.blocks.axis, []
    for channels, equal in replace(spec, all_reduce=None).equal_parts(x):
        of_x: Any
        of_x, *of_others = (take_channels(each, channels, axis) for each in (x, *others))
        affine = take_channels(weight, channels), take_channels(bias, channels)
        implementation = backend.implementation(equal, of_x, *affine, *of_others)
        parts.append(_Part(channels, equal, implementation, of_x, *affine))
    return parts


def _statistics(spec: WhiteningSpec, parts: Sequence[_Part]) -> list[Statistics]:
    """Return the joined batch's statistics of each part."""
    block_axis = spec.blocks.block_axis
    x4 = [part.split(part.x) for part in parts]
    count = parts[0].implementation.kernels.sample_count(x4[0], block_axis)
    own = [part.implementation.kernels.moments(x, block_axis) for part, x in zip(parts, x4, strict=True)]
    joined = _joined_moments(_exchange(spec), count, own)
    return [
        Statistics(mean, cov, part.implementation.kernels.inverse_sqrt(spec.solver, cov, spec.eps))
        for part, (mean, cov) in zip(parts, joined, strict=True)
    ]


def _joined_moments(
    total_of: SumOverProcesses, count: int, moments: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """Return means (blocks, d) and covariances (blocks, d, d) of the joined batch from those of this process' samples.

    A single sum exchanges everything. It collects the means rather than adding them up: each process adds its own to
    zeros of the others. So the means' differences are known exactly, however far the means are from 0.
    """
    number, means = total_of.number, torch.cat([mean.reshape(-1) for mean, _ in moments])
    own = torch.cat([means.new_full((1,), count), means])
    slots = pad(own, (total_of.index * len(own), (number - 1 - total_of.index) * len(own)))
    products = [(count * cov).reshape(-1) for _, cov in moments]
    sizes = [len(slots), *map(len, products)]
    slots, *products = total_of(torch.cat([slots, *products])).split(sizes)
    counts, means = slots.reshape(number, -1).split([1, len(means)], dim=1)
    weights = counts / counts.sum()  # NaN if there is no sample at all
    joined_mean = (weights * means).sum(0)
    joined_mean = joined_mean + (weights * (means - joined_mean)).sum(0)  # what rounding lost
    deviations, results, start = weights.sqrt() * (means - joined_mean), [], 0
    for (mean, cov), within in zip(moments, products, strict=True):
        channels = slice(start, start + mean.numel())
        start = channels.stop
        of_processes = deviations[:, channels].reshape(number, *mean.shape)
        between = torch.einsum("nbi,nbj->bij", of_processes, of_processes)
        results.append((joined_mean[channels].reshape(mean.shape), within.reshape(cov.shape) / counts.sum() + between))
    return results
