"""Make a normalization layer of one kind from what a layer of another kind has learnt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polywhiten.conversion import feasible_group_size, feasible_num_groups
from polywhiten.torch._internals import BatchNorm
from polywhiten.torch.modules import GroupWhitening, IterNorm
from polywhiten.torch.networks.normalization import (
    BATCH_NORM,
    GROUP_NORM,
    GROUP_WHITENING,
    ITER_NORM,
    Averages,
    Normalization,
)
from polywhiten.torch.norm_layers import NormAct

WITHIN_SAMPLES = GROUP_NORM, GROUP_WHITENING
DEFAULT_NUM_GROUPS = 32  # of the group normalization paper, and what the group whitening paper compares with it
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TARGETS: dict[str, type[nn.Module]] = {
    ITER_NORM: IterNorm,
    GROUP_WHITENING: GroupWhitening,
    BATCH_NORM: nn.BatchNorm2d,
    GROUP_NORM: nn.GroupNorm,
}
_TAKEN_FROM_LAYER = {"num_features", "num_channels", "affine", "bias", "axis", "device", "dtype"}


class Replacement(NamedTuple):
    """A new layer.

    Attributes
    ----------
    layer : Module
    adjustment : str
        Which argument was infeasible and what it became, such as "num_groups=24 instead of 32"; often "".
    losses : list of str
        What the new layer doesn't keep of the old one.
    """

    layer: nn.Module
    adjustment: str
    losses: list[str]


def accepted_arguments(to: str) -> list[str]:
    """Return the names of the arguments that a user may choose for new layers of a kind."""
    names = [name for name in inspect.signature(TARGETS[to]).parameters if name not in _TAKEN_FROM_LAYER]
    return [*names, "dimensions"] if to == BATCH_NORM else names


def check_replaceable(old: Normalization, name: str, to: str) -> None:
    """Raise a ValueError with the layer's name if no layer of the kind `to` can do what it does."""
    if old.axis != 1 and to in (BATCH_NORM, GROUP_NORM):
        raise ValueError(
            f"layer {name!r} has its channels at axis={old.axis}, and PyTorch's own layers have them at axis 1: "
            "leave it out with where="
        )
    if old.weight is not None and old.weight.ndim > 1:
        raise ValueError(
            f"layer {name!r} has affine='coloring', matrices that no other kind of layer has: leave it out with where="
        )


def make_replacement(
    old: Normalization, to: str, arguments: Mapping[str, Any], shapes: Collection[Sequence[int]]
) -> Replacement:
    """Return a layer of the kind `to` that keeps what was learnt: weight, bias, and statistics if both kinds have them.

    Parameters
    ----------
    old : Normalization
    to : str
        A key of `TARGETS`.
    arguments : mapping
        Arguments of the new layer. Those that are missing and that both layers have are taken from the old one.
    shapes : collection of shapes
        The inputs (N, C, ...) that the layer gets in the network, as far as they are known.
    """
    wanted = {**_inherited(old, to), **arguments}
    values = wanted | _feasible(old.channels, to, wanted, shapes)
    if to == BATCH_NORM:
        dimensions = [max(1, len(shape) - 2) for shape in shapes]  # rows (N, C) have BatchNorm1d, as sequences do
        values.setdefault("dimensions", max(dimensions, default=old.dimensions))
    layer = _new_layer(old, to, values)
    _take_affine(layer, old)
    if old.averages is not None and getattr(layer, "running_mean", None) is not None:
        _take_averages(layer, old.averages, old.eps)
    adjusted = [f"{name}={values[name]} instead of {value}" for name, value in wanted.items() if values[name] != value]
    return Replacement(
        NormAct(layer, *old.activation) if old.activation else layer, ", ".join(adjusted), _losses(old, layer)
    )


def _inherited(old: Normalization, to: str) -> dict[str, Any]:
    """Return the arguments of the new layer that the old one or the layer's defaults determine."""
    if to in WITHIN_SAMPLES:
        return {"eps": old.eps, "num_groups": old.num_groups or DEFAULT_NUM_GROUPS}
    inherited: dict[str, Any] = {"eps": old.eps, "momentum": old.momentum}
    if to == ITER_NORM:
        inherited["process_group"] = old.process_group
        inherited["group_size"] = inspect.signature(IterNorm).parameters["group_size"].default
    if old.kind not in WITHIN_SAMPLES:
        inherited["track_running_stats"] = old.averages is not None
    return inherited


def _feasible(channels: int, to: str, wanted: Mapping[str, Any], shapes: Collection[Sequence[int]]) -> dict[str, int]:
    """Return the size or number of groups that a layer's channels and inputs allow, as near as possible to `wanted`."""
    if to in WITHIN_SAMPLES:
        values = min((math.prod(shape[1:]) for shape in shapes), default=None)
        return {"num_groups": feasible_num_groups(to, wanted["num_groups"], channels, values)}
    if to == ITER_NORM:
        size = min(wanted["group_size"], channels)  # a layer with fewer channels has groups of all of them
        feasible = feasible_group_size(size, min((math.prod(shape) // channels for shape in shapes), default=None))
        return {"group_size": feasible} if feasible < size else {}
    return {}


def _new_layer(old: Normalization, to: str, values: Mapping[str, Any]) -> nn.Module:
    """Return a layer with the old one's channels, dtype and device, and with these arguments."""
    mean = None if old.averages is None else old.averages.mean
    tensors = [tensor for tensor in (old.weight, old.bias, mean) if tensor is not None]
    arguments: dict[str, Any] = {"affine": old.weight is not None or old.bias is not None, **values}
    if to in (ITER_NORM, GROUP_WHITENING):
        arguments["axis"] = old.axis
    if tensors:
        arguments |= {"device": tensors[0].device, "dtype": tensors[0].dtype}
    if to == BATCH_NORM:
        return BATCH_NORMS[arguments.pop("dimensions")](old.channels, **arguments)
    return TARGETS[to](**{"num_features" if to == ITER_NORM else "num_channels": old.channels}, **arguments)


def _take_affine(layer: nn.Module, old: Normalization) -> None:
    """Give the new layer the old one's parameters themselves, so that optimizers and tied weights keep working."""
    for name, value in (("weight", old.weight), ("bias", old.bias)):
        if value is not None and not isinstance(value, nn.Parameter):  # the buffer of a frozen layer
            value = nn.Parameter(value.clone(), requires_grad=False)
        setattr(layer, name, value)


@torch.no_grad()
def _take_averages(layer: Any, averages: Averages, eps: float) -> None:
    """Set running averages such that an evaluation normalizes by the same variances; an eps is part of a whitener."""
    layer.running_mean.copy_(averages.mean)
    if averages.batches is not None:
        layer.num_batches_tracked.copy_(averages.batches)
    channels = len(averages.mean)
    if not isinstance(layer, IterNorm):
        inverse = torch.linalg.inv(averages.whitener)
        variance = (inverse @ inverse).diagonal(dim1=1, dim2=2).flatten()[:channels] - eps
        layer.running_var.copy_(variance.clamp(min=0))
        return
    scales = averages.whitener.flatten()  # of batch normalization, whose blocks are single channels
    tracked = scales if layer.track == "whitener" else scales**-2 - eps
    matrices: Tensor = getattr(layer, f"running_{layer.track}")
    groups, d, _ = matrices.shape
    padded = torch.cat([tracked, tracked.new_ones(groups * d - channels)])
    matrices.copy_(torch.diag_embed(padded.view(groups, d)))


def _losses(old: Normalization, layer: nn.Module) -> list[str]:
    """Return what the new layer doesn't keep of the old one."""
    losses = []
    if isinstance(layer, nn.GroupNorm | GroupWhitening):
        losses.append("outputs change")
    elif not layer.track_running_stats:
        losses.append("normalizes every input by itself: outputs change")
    elif old.averages is None:
        losses.append("has no statistics yet: outputs change")
    elif isinstance(layer, IterNorm) and layer.track == "covariance":
        exact = layer.method == "eigh" and layer.eps == old.eps and not layer.relative_eps
        losses.append("" if exact else "whitens the old variances in another way: outputs in evaluation change")
    elif not _is_diagonal(old.averages.whitener):
        losses.append("has the variances alone, without correlations: outputs in evaluation change")
    if old.process_group is not None and isinstance(layer, BatchNorm):
        losses.append("each process takes statistics of its own batch")
    if old.weight is not None and not isinstance(old.weight, nn.Parameter):
        losses.append("weight and bias stay without gradients, but in training the statistics are those of the batch")
    if old.frozen_stats and isinstance(layer, BatchNorm):
        losses.append("in training the statistics are those of the batch")
    return [loss for loss in losses if loss]


def _is_diagonal(matrices: Tensor) -> bool:
    """Return whether all matrices are diagonal, as far as that is known: meta tensors have no values."""
    if matrices.shape[-1] == 1:
        return True
    return not matrices.is_meta and torch.equal(matrices, torch.diag_embed(matrices.diagonal(dim1=1, dim2=2)))
