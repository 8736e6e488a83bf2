"""What the layers of every framework call, with arguments that they have checked."""

from __future__ import annotations

from polywhiten._types import Array
from polywhiten.backend import Backend
from polywhiten.blocks import channel_shape, join_channels, take_channels
from polywhiten.reference import Reference
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import WhiteningStats, join_statistics, masked_statistics


def whiten_masked(
    backend: Backend, spec: WhiteningSpec, x: Array, mask: Array, weight: Array | None, bias: Array | None
) -> tuple[Array, WhiteningStats, Array]:
    """Whiten all positions by the statistics of those where `mask` is true; return these and their number too.

    The mask has the shape of x without its channel axis. The gradient is the framework's own.
    """
    _, first = spec.equal_parts(x)[0]
    reference, axis = Reference(backend.implementation(first, x, weight, bias).kernels), spec.blocks.axis
    parts, count = masked_statistics(reference.kernels, spec, x, mask)
    outputs = [
        reference.apply(
            equal.blocks,
            take_channels(x, part, axis),
            stats.mean,
            stats.whitener,
            take_channels(weight, part),
            take_channels(bias, part),
        )
        for part, equal, stats in parts
    ]
    xp = backend.kernels.xp
    return join_channels(xp, outputs, axis), join_statistics(xp, [stats for _, _, stats in parts]), count


def whiten_nothing(backend: Backend, x: Array, weight: Array | None, bias: Array | None, axis: int) -> Array:
    """Return an array without elements as it is, but so that the gradients of weight and bias are 0."""

    def along_channels(values: Array) -> Array:
        return xp.reshape(xp.astype(values, x.dtype, copy=False), channel_shape(x.ndim, axis))

    xp, y = backend.kernels.xp, x + 0  # a new array, which may be changed in place
    if weight is not None:
        y = y * along_channels(weight)
    if bias is not None:
        y = y + along_channels(bias)
    return y
