"""What a whitening computes, apart from the arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

from polywhiten._types import AllReduce, Array
from polywhiten.blocks import Blocks, ChannelGroups, SampleGroups, channel_parts
from polywhiten.solvers import Solver


@dataclass(frozen=True)
class WhiteningSpec:
    """All that forward and backward need beside the arrays; hashable, so that tracers can treat it as a constant.

    Attributes
    ----------
    blocks : ChannelGroups or SampleGroups
        How an array is cut into the blocks that are whitened.
    solver : Solver
        Computes inverse square roots.
    eps : float
        Added to the diagonal of every covariance.
    all_reduce : callable, optional
        Returns the sum of an array over all workers, as a new array. Statistics then cover the joined batch.
    """

    blocks: Blocks
    solver: Solver
    eps: float
    all_reduce: AllReduce | None = None

    def at_axis(self, axis: int) -> WhiteningSpec:
        """Return what is computed of an array with its channels at another axis."""
        return replace(self, blocks=replace(self.blocks, axis=axis))

    def equal_parts(self, x: Array) -> list[tuple[slice, WhiteningSpec]]:
        """Return slices of the channels of x, in each of which all blocks are equal, with what is computed there."""
        blocks = self.blocks
        channels = x.shape[blocks.axis]
        if isinstance(blocks, SampleGroups) or channels % blocks.group_size == 0:
            return [(slice(0, channels), self)]
        return [
            (part, replace(self, blocks=ChannelGroups(blocks.axis, size)))
            for part, size in channel_parts(channels, blocks.group_size)
        ]
