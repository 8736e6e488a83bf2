"""Affine maps of channels: what a normalization layer computes in evaluation, and its product with a convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from polywhiten.blocks import divisors
from polywhiten.torch.networks.normalization import Averages, Normalization

TRANSPOSED = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
LINEAR_LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED


@dataclass(frozen=True)
class AffineMap:
    """The map y = A x + b of channels, with a block diagonal A, in float64 on the CPU.

    Attributes
    ----------
    blocks : Tensor, shape (blocks, d, d)
        The blocks of A. The last one may exceed the channels.
    offset : Tensor, shape (C,)
        b.
    """

    blocks: Tensor
    offset: Tensor

    @classmethod
    def of(cls, layer: Normalization, averages: Averages) -> Self:
        """Return y = weight W (x - mean) + bias, for the whitener W."""
        whitener, mean = _exact(averages.whitener), _exact(averages.mean)
        linear = cls(whitener, whitener.new_zeros(layer.channels))
        if layer.weight is not None and layer.weight.ndim == 3:
            linear = cls(_exact(layer.weight) @ whitener, linear.offset)
        elif layer.weight is not None:
            scale = linear.in_blocks(_exact(layer.weight))
            linear = cls(scale.unsqueeze(-1) * whitener, linear.offset)
        offset = -linear.apply(mean.unsqueeze(-1)).squeeze(-1)
        return cls(linear.blocks, offset if layer.bias is None else offset + _exact(layer.bias))

    @property
    def channels(self) -> int:
        return len(self.offset)

    def in_blocks(self, rows: Tensor) -> Tensor:
        """Return an array (C, ...) as (blocks, d, ...), filled with zeros behind the last channel."""
        count, d, _ = self.blocks.shape
        filling = rows.new_zeros(count * d - self.channels, *rows.shape[1:])
        return torch.cat([rows, filling]).reshape(count, d, *rows.shape[1:])

    def apply(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        """Return A times a matrix (C, n), or the transpose of A times it."""
        blocks = self.blocks.mT if transposed else self.blocks
        return (blocks @ self.in_blocks(rows)).flatten(0, 1)[: self.channels]

    def stays_within(self, size: int) -> bool:
        """Return whether A maps each group of `size` channels, counted from the first channel, to itself."""
        d = self.blocks.shape[-1]
        block, row, column = self.blocks.nonzero(as_tuple=True)
        rows, columns = block * d + row, block * d + column
        inside = (rows < self.channels) & (columns < self.channels)
        return torch.equal(rows[inside] // size, columns[inside] // size)

    def grouped(self) -> Tensor:
        """Return A in the smallest groups of n channels that it stays within, as a matrix (C, n) of their rows.

        Groups are equal, unless only blocks of d channels with a smaller last one are small enough. Then n = d.
        """
        d = self.blocks.shape[-1]
        size = next((n for n in divisors(self.channels) if n <= d and self.stays_within(n)), d)
        identity = torch.eye(size, dtype=torch.float64, device=self.blocks.device)
        identities = identity.repeat(math.ceil(self.channels / size), 1)
        return self.apply(identities[: self.channels])


@dataclass(frozen=True)
class LinearWeights:
    """Weight and bias of a convolution or linear layer, in float64 on the CPU.

    Attributes
    ----------
    weight : Tensor, shape (outputs, inputs / groups, positions)
    bias : Tensor, shape (outputs,)
    groups : int
    """

    weight: Tensor
    bias: Tensor
    groups: int

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Return the weights of one of `LINEAR_LAYERS`; no bias is a bias of 0."""
        groups = getattr(layer, "groups", 1)
        weight = _exact(layer.weight)
        weight = weight.unsqueeze(-1) if weight.ndim == 2 else weight.flatten(2)
        weight = _swapped(weight, groups) if isinstance(layer, TRANSPOSED) else weight
        bias = weight.new_zeros(len(weight)) if layer.bias is None else _exact(layer.bias)
        return cls(weight, bias, groups)

    @property
    def outputs(self) -> int:
        return len(self.weight)

    @property
    def inputs(self) -> int:
        return self.groups * self.weight.shape[1]

    def then(self, following: AffineMap) -> Self:
        """Return the weights of the layer with a map after it, which stays within the groups of outputs."""
        weight = following.apply(self.weight.flatten(1)).reshape(self.weight.shape)
        bias = following.apply(self.bias.unsqueeze(-1)).squeeze(-1) + following.offset
        return replace(self, weight=weight, bias=bias)

    def after(self, preceding: AffineMap) -> Self:
        """Return the weights of the layer with a map before it, which stays within the groups of inputs."""
        by_input = _swapped(self.weight, self.groups)
        shift = (by_input.sum(2) * preceding.offset.unsqueeze(-1)).unflatten(0, (self.groups, -1)).sum(1)
        weight = preceding.apply(by_input.flatten(1), transposed=True).reshape(by_input.shape)
        return replace(self, weight=_swapped(weight, self.groups), bias=self.bias + shift.flatten())

    def fits(self, dtype: torch.dtype) -> bool:
        """Return whether a dtype can represent all weights."""
        limit = torch.finfo(dtype).max
        return all(bool((tensor.abs() <= limit).all()) for tensor in (self.weight, self.bias))

    @torch.no_grad()
    def parameters_for(self, layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
        """Return weight and bias with dtype, device, memory format and `requires_grad` as the layer has them."""
        weight = _swapped(self.weight, self.groups) if isinstance(layer, TRANSPOSED) else self.weight
        new = torch.empty_like(layer.weight).copy_(weight.reshape(layer.weight.shape))
        needs_gradient = layer.weight.requires_grad, (layer.weight if layer.bias is None else layer.bias).requires_grad
        bias = self.bias.to(layer.weight)
        return nn.Parameter(new, needs_gradient[0]), nn.Parameter(bias, needs_gradient[1])


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Return weights (outputs, inputs per group, positions) as (inputs, outputs per group, positions), or back."""
    grouped: Tensor = weight.unflatten(0, (groups, -1))
    return grouped.transpose(1, 2).flatten(0, 1)


def _exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU because not all devices have it."""
    return tensor.detach().cpu().double()
