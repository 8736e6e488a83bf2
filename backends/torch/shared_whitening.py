"""Whitening by the statistics of a batch that several processes share: one exchange forward, and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        mean, *matrices = stats
        *_, size, _ = self.spec.blocks.split(self.x.shape)
        mean = None if mean is None else take_channels(mean, self.channels).reshape(-1, size)
        return Statistics(mean, *(m if m is None else take_groups(m, self.channels, size) for m in matrices))


def forward(
    backend: Backend, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, WhiteningStats]:
    """Return y and the joined batch's statistics; the last group may be smaller than the others."""
    parts = _parts(backend, spec, x, weight, bias)
    stats = _statistics(spec, parts)
    outputs = [
        part.implementation.apply(part.spec.blocks, part.x, of_part.mean, of_part.whitener, part.weight, part.bias)
        for part, of_part in zip(parts, stats, strict=True)
    ]
    return join_channels(xp, outputs, spec.blocks.axis), join_statistics(xp, stats)


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
    inputs, sums, dweights, dbiases = [], [], [], []
    for part in parts:
        of_part, dy4 = part.statistics(stats), part.split(take_channels(dy, part.channels, axis))
        arguments = part.split(part.x), part.weight, part.bias, of_part, dy4, part.statistics(dstats)
        a, part_sums, dweight, dbias = part.implementation.channel_sums(part.spec, *arguments)
        inputs.append((part, arguments[0], of_part, a, dy4))
        sums.append(part_sums)
        dweights.append(dweight)
        dbiases.append(dbias)
    count, *totals = sum_over_workers(
        kernels, spec.all_reduce, sums[0][0], *(each for part in sums for each in part[1:])
    )
    dxs = []
    for i, (part, *arrays) in enumerate(inputs):
        each = len(totals) // len(parts)
        dx = part.implementation.input_gradient(part.spec, *arrays, (count, *totals[i * each : (i + 1) * each]))
        dxs.append(dx.reshape(part.x.shape))
    dweight, dbias = (None if of[0] is None else join_channels(xp, of) for of in (dweights, dbiases))
    return join_channels(xp, dxs, axis), as_dtype_of(kernels, dweight, weight), as_dtype_of(kernels, dbias, bias)


def _parts(
    backend: Backend, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Tensor
) -> list[_Part]:
    """Return one part, or two if the last group is smaller."""
    axis, parts = spec.blocks.axis, []
    for channels, equal in replace(spec, all_reduce=None).equal_parts(x):
        arrays = take_channels(x, channels, axis), take_channels(weight, channels), take_channels(bias, channels)
        implementation = backend.implementation(
            equal, *arrays, *(take_channels(each, channels, axis) for each in others)
        )
        parts.append(_Part(channels, equal, implementation, *arrays))
    return parts


def _statistics(spec: WhiteningSpec, parts: Sequence[_Part]) -> list[Statistics]:
    """Return the joined batch's statistics of each part."""
    block_axis = spec.blocks.block_axis
    x4 = [part.split(part.x) for part in parts]
    count = parts[0].implementation.kernels.sample_count(x4[0], block_axis)
    own = [part.implementation.kernels.moments(x, block_axis) for part, x in zip(parts, x4, strict=True)]
    joined = _joined_moments(spec.all_reduce, count, own)
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
