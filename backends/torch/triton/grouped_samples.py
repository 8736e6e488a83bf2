"""The samples of group whitening as the kernels read them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from polywhiten.blocks import SampleGroups
from polywhiten.torch.triton.affine_map import ChannelAffine
from polywhiten.torch.triton.sample_parts import MAX_GROUPS, GroupStrides, is_small_sample


class GroupedSamples(NamedTuple):
    """Samples x (N, q, d, l), whose d groups have `channels` channels each at `positions` positions."""

    x: Tensor
    channels: int
    positions: int
    strides: GroupStrides

    @classmethod
    def of(cls, blocks: SampleGroups, x: Tensor) -> GroupedSamples | None:
        """Return None if there are too many groups, or positions on both sides of the channels."""
        channels = x.shape[blocks.axis] // blocks.num_groups
        x = x.reshape(blocks.split(x.shape))
        _, q, d, l = x.shape
        strides = _group_strides(x, channels)
        return None if strides is None or d > MAX_GROUPS else cls(x, channels, q * l // channels, strides)

    @property
    def are_small(self) -> bool:
        """Whether one program whitens a sample."""
        _, q, d, l = self.x.shape
        return is_small_sample(d, q * l)

    def affine(
        self, input_weight: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> ChannelAffine:
        """Return what the kernels do with parameters (C,) of the channels."""
        return ChannelAffine(input_weight, weight, bias, positions=self.x.shape[3] // self.channels)


def _group_strides(x: Tensor, channels: int) -> GroupStrides | None:
    """Return the strides of x (N, q, groups, l), None if it has positions on both sides of the channels."""
    block, outer, row, inner = x.stride()
    if x.shape[1] == 1:
        return GroupStrides(block, row, x.shape[3] // channels * inner, inner)
    return GroupStrides(block, row, inner, outer) if x.shape[3] == channels else None
