"""What takes the place of a folded layer: a 1 x 1 convolution for inputs of any rank, or nothing but a check."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from polywhiten.torch.leaf import LeafModule

_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


class ChannelMap(LeafModule):
    """An affine map of the channels of inputs (N, C, ...): a 1 x 1 convolution that accepts any number of axes.

    `polywhiten.torch.fold` puts it in the place of a whitening layer that it can't fold into another layer.

    Parameters
    ----------
    weight : Tensor, shape (C, n)
        The matrices of groups of n channels, one below the other. If n doesn't divide C, the last group is smaller, and
        its matrix fills the first columns. If n = 1, these are scales of single channels.
    bias : Tensor, shape (C,)

    Attributes
    ----------
    weight, bias : Parameter

    Examples
    --------
    >>> import torch
    >>> from polywhiten.torch.networks.channel_map import ChannelMap
    >>> swap = ChannelMap(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.zeros(2))
    >>> swap(torch.tensor([[1.0, 2.0]]))
    tensor([[2., 1.]], grad_fn=<ViewBackward0>)
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map the channels of x, shape (N, C, ...). The result doesn't depend on a mask, as that of `IterNorm` here."""
        channels, size = self.weight.shape
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        ones = (1,) * (x.ndim - 2)
        if size == 1:
            return torch.addcmul(bias.reshape(channels, *ones), x, weight.reshape(channels, *ones))
        if x.ndim not in _CONVOLUTIONS:
            return self.forward(x.reshape(*x.shape[:2], math.prod(x.shape[2:]))).reshape(x.shape)
        convolution = _CONVOLUTIONS[x.ndim]
        weight = weight.reshape(channels, size, *ones)
        equal = channels // size * size  # two convolutions take less time than one that mixes all channels
        if equal == channels:
            return convolution(x, weight, bias, groups=channels // size)
        parts = (
            convolution(x[:, :equal], weight[:equal], bias[:equal], groups=equal // size),
            convolution(x[:, equal:], weight[equal:, : channels - equal], bias[equal:]),
        )
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """Return the sizes, as `repr` shows them."""
        channels, size = self.weight.shape
        return f"{channels}, group_size={size}"


class RowsOnly(LeafModule):
    """Return an input (N, C) as it is, and raise a ValueError for any other shape.

    A normalization layer was here that is part of a linear layer now. A linear layer maps the last axis and a
    normalization layer the second one, so this is exact only if these are the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        if x.ndim != 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but a normalization layer that was here is folded into a linear layer, "
                "which is exact only for inputs (N, C)"
            )
        return x
