"""Copy arrays into the order that plain kernels are fast in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from polywhiten._types import Array, Shape
from polywhiten.blocks import SampleGroups
from polywhiten.kernels import Kernels
from polywhiten.spec import WhiteningSpec


@dataclass(frozen=True)
class ChannelsFirst:
    """Moves the channels of an array to axis 1.

    In group whitening a sample has positions before and after a group's channels if the channels aren't at axis 1.
    Kernels that multiply matrices as the library stores them are slow on such samples.
    """

    kernels: Kernels
    spec: WhiteningSpec
    shape: Shape
    axes: tuple[int, ...]

    @classmethod
    def of(cls, kernels: Kernels, spec: WhiteningSpec, x: Array) -> ChannelsFirst | None:
        """Return the reordering for x, or None if that is no gain."""
        blocks = spec.blocks
        if kernels.reads_any_order or not isinstance(blocks, SampleGroups) or blocks.axis == 1:
            return None
        shape = kernels.shape(x)  # an operation in graphs of some libraries
        length = blocks.split(shape)[3]
        if isinstance(length, int) and length == 1:  # rows of variables are matrices already
            return None
        axes = (0, blocks.axis, *(i for i in range(1, x.ndim) if i != blocks.axis))
        return cls(kernels, replace(spec, blocks=replace(blocks, axis=1)), tuple(shape[i] for i in axes), axes)

    def arranged(self, x: Array) -> Array:
        """Return x as (N, C, positions), a copy."""
        batch, channels, *positions = self.shape
        xp = self.kernels.xp
        return xp.reshape(xp.permute_dims(x, self.axes), (batch, channels, math.prod(positions)))

    def restored(self, y: Array) -> Array:
        """Return y in the shape of x, as a view where the library has views."""
        inverse = tuple(map(self.axes.index, range(len(self.axes))))
        return self.kernels.xp.permute_dims(self.kernels.xp.reshape(y, self.shape), inverse)
