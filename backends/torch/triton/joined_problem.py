"""What the joined kernels are to whiten, which arrays they can read for it, and as which blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polywhiten.blocks import SampleGroups
from polywhiten.spec import WhiteningSpec
from polywhiten.torch.triton.layouts import (
    Layout,
    SampleStrides,
    channel_layout,
    channel_strides,
    sample_layout,
    sample_strides,
)
from polywhiten.torch.triton.memory_regions import MemoryRegions
from polywhiten.torch.triton.sample_parts import MAX_GROUPS
from polywhiten.torch.triton.tiles import MAX_VARIABLES, fits_32_bits, have_size

_MAX_BLOCKS = 4096  # a block has a workspace for at least 16 variables, which is large beside a small block

Shape = tuple[int, ...]
Stride = tuple[int, ...]


class BlockSizes(NamedTuple):
    """An array as blocks of d rows; the last block has fewer if `total_rows` ends before."""

    num_blocks: int
    total_rows: int
    d: int

    def statistics(self) -> MemoryRegions:
        """Return the memory of covariances, whiteners and means."""
        matrices = self.num_blocks * self.d**2
        return MemoryRegions.of(matrices, matrices, self.num_blocks * self.d)


class JoinedProblem(NamedTuple):
    """What is whitened, in numbers that are quick to hash, as plans are looked up by them.

    Attributes
    ----------
    of_samples : bool
        Whether this is group whitening, whose blocks are samples; otherwise groups of channels are whitened.
    axis : int
        The axis of the channels.
    d : int
        The number of variables of a block, of which a last group of channels may have fewer.
    eps : float
    iterations : int
        The number of Newton's steps.
    """

    of_samples: bool
    axis: int
    d: int
    eps: float = 0.0
    iterations: int = 0

    @classmethod
    def of(cls, spec: WhiteningSpec, iterations: int) -> JoinedProblem:
        blocks = spec.blocks
        of_samples = isinstance(blocks, SampleGroups)
        d = blocks.num_groups if isinstance(blocks, SampleGroups) else blocks.group_size
        return cls(of_samples, blocks.axis, d, spec.eps, iterations)

    def can_whiten(self, shape: Shape, stride: Stride) -> bool:
        """Return whether the kernels can read an array with these strides, and write a result."""
        result = torch.empty_like(torch.empty_strided(shape, stride, device="meta"))  # without gaps that x may have
        return self.can_read(shape, stride) and self.can_read(shape, result.stride())

    def can_read(self, shape: Shape, stride: Stride) -> bool:
        """Return whether the kernels can read an array with these strides."""
        if math.prod(shape) == 0:
            return False
        sizes, strides = self.sizes(shape), sample_strides if self.of_samples else channel_strides
        return (
            fits_32_bits(shape, stride)
            and sizes.d <= (MAX_GROUPS if self.of_samples else MAX_VARIABLES)
            and sizes.num_blocks <= _MAX_BLOCKS
            and strides(shape, stride, self.axis) is not None
        )

    def fits(self, shape: Shape, channel_tensors: Sequence[Tensor | None], matrices: Tensor | None) -> bool:
        """Return whether tensors of channels, and matrices if there are any, have the sizes that go with an array."""
        if not have_size(channel_tensors, shape[self.axis]):
            return False
        if matrices is None:
            return True
        num_blocks, _, d = self.sizes(shape)
        return matrices.shape == (num_blocks, d, d)

    def sizes(self, shape: Shape) -> BlockSizes:
        """Return the sizes of an array's blocks."""
        if self.of_samples:
            return BlockSizes(shape[0], shape[0] * self.d, self.d)
        channels = shape[self.axis]
        d = min(self.d, channels)
        return BlockSizes(-(-channels // d), channels, d)

    def layout(self, shape: Shape, *strides: Stride) -> Layout:
        """Return how several arrays of one shape are read, for each of which `can_read` is true."""
        axis, d = self.axis, self.sizes(shape).d
        if self.of_samples:
            channels = shape[axis]
            positions = math.prod(shape[1:]) // channels
            return sample_layout(channels // d, positions, [self.sample_strides(shape, each) for each in strides])
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        found = [channel_strides(shape, each, axis) for each in strides]
        return channel_layout(before, after, d, [each for each in found if each is not None])

    def sample_strides(self, shape: Shape, stride: Stride) -> SampleStrides:
        """Return the strides of samples, for an array for which `can_read` is true."""
        found = sample_strides(shape, stride, self.axis)
        assert found is not None
        return found
