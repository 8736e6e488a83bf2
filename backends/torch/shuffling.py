"""Whitening of groups of channels that are drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor

from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import WhiteningStats
from polywhiten.torch.backend import BACKEND


def whiten_shuffled(
    spec: WhiteningSpec, x: Tensor, mask: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Whiten groups of channels drawn at random; channels, weight and bias keep their places."""
    x, axis, restore = BACKEND.in_memory_order(x, spec.blocks.axis)
    spec = spec.at_axis(axis)
    order = _random_order(spec, x)
    weight, bias = (None if values is None else values.index_select(0, order) for values in (weight, bias))
    shuffled = x.index_select(axis, order)
    if mask is None:
        y = BACKEND.whiten(spec, shuffled, weight, bias)
    else:
        y, *_ = BACKEND.whiten_masked(spec, shuffled, mask, weight, bias)
    return restore(y.index_select(axis, torch.argsort(order)))


@torch.no_grad()
def statistics_in_order(spec: WhiteningSpec, x: Tensor, mask: Tensor | None) -> tuple[WhiteningStats, Tensor | None]:
    """Return the statistics of groups of adjacent channels, and how many positions a mask leaves, None without one."""
    if mask is not None:
        _, stats, count = BACKEND.whiten_masked(spec, x, mask, None, None)
        return stats, count
    x, axis, _ = BACKEND.in_memory_order(x, spec.blocks.axis)
    return BACKEND.statistics(spec.at_axis(axis), x), None


def _random_order(spec: WhiteningSpec, x: Tensor) -> Tensor:
    """Return the channels in an order drawn from the default generator; processes that share statistics agree on it."""
    keys = torch.rand(x.shape[spec.blocks.axis], device=x.device)
    if spec.all_reduce is not None:
        keys = spec.all_reduce(keys)
    return torch.argsort(keys)
