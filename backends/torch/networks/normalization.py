"""What a normalization layer computes, read from the layers of PyTorch, torchvision, timm and polywhiten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from polywhiten.torch.modules import GroupWhitening, IterNorm
from polywhiten.torch.norm_layers import NormAct
from polywhiten.torch.processes import WORLD

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BATCH_NORM, GROUP_NORM, ITER_NORM, GROUP_WHITENING = "batch_norm", "group_norm", "iter_norm", "group_whitening"


@dataclass(frozen=True)
class Averages:
    """What a layer normalizes by in evaluation.

    Attributes
    ----------
    mean : Tensor, shape (C,)
    whitener : Tensor, shape (blocks, d, d), float64
        Inverse square roots of the blocks' covariances, with d = 1 for batch normalization. Where the last block has
        fewer channels, the identity fills the rest.
    batches : Tensor, shape (), or None
        How many batches were averaged.
    """

    mean: Tensor
    whitener: Tensor
    batches: Tensor | None


@dataclass(frozen=True)
class Normalization:
    """A normalization layer, in the terms that all kinds share.

    Attributes
    ----------
    kind : str
        One of the four kinds above.
    channels : int
    eps : float
    weight, bias : Tensor, shape (C,), or None
        Parameters, or buffers where the layer is frozen. With `affine="coloring"`, the weight has the shape of the
        whiteners, (blocks, d, d), and multiplies them.
    averages : Averages or None
        None for normalization within samples, and where every batch is normalized by itself.
    momentum : float or None
        Weight of the newest batch in the running averages; None for the plain average of all.
    num_groups : int or None
        Number of groups of normalization within samples.
    dimensions : int
        How many axes the input has beside samples and channels, 2 where the layer doesn't tell.
    axis : int
        Axis of the channels. Only polywhiten's layers can have another one than 1.
    process_group : ProcessGroup, "world" or None
        The processes that share statistics in training; None if each takes those of its own batch.
    activation : tuple of Module
        The modules (drop, act) that the layer calls at its end; empty for most layers.
    frozen_stats : bool
        Whether the layer normalizes by its averages in training, too, and has parameters.
    """

    kind: str
    channels: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    averages: Averages | None = None
    momentum: float | None = 0.1
    num_groups: int | None = None
    dimensions: int = 2
    axis: int = 1
    process_group: ProcessGroup | str | None = None
    activation: tuple[nn.Module, ...] = ()
    frozen_stats: bool = False


def normalization_layers(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all layers that `read_normalization` can read, with their names in the network, in the order of definition.

    A layer that a network has under several names is yielded under each.
    """
    if _reader(network) is not None:
        yield name, network
        return
    for child_name, child in network._modules.items():
        if child is not None:
            yield from normalization_layers(child, f"{name}.{child_name}" if name else child_name)


def check_initialized(network: nn.Module) -> None:
    """Raise a ValueError if a lazy layer of a network doesn't have its parameters yet."""
    for name, module in network.named_modules():
        tensors = *module.parameters(recurse=False), *module.buffers(recurse=False)
        if any(isinstance(tensor, UninitializedBuffer | UninitializedParameter) for tensor in tensors):
            raise ValueError(
                f"layer {name!r} is a {_class_name(module)} without parameters yet: call the network once first"
            )


def read_normalization(layer: nn.Module, name: str) -> Normalization:
    """Return what a layer computes; `name` is the layer's name in its network, for error messages.

    Raises
    ------
    ValueError
        The layer's parameters are computed from others.
    """
    read = _reader(layer)
    assert read is not None, "only layers that normalization_layers yields"
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"layer {name!r} has parametrizations, which another layer can't take over: remove them first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    return read(layer)


def describe(layer: nn.Module) -> str:
    """Return a layer's class with its sizes, such as "IterNorm(64, group_size=16)"."""
    if isinstance(layer, NormAct):
        return f"NormAct({describe(layer.norm)}, {_class_name(layer.act)})"
    if _reader(layer) is None:
        return _class_name(layer)
    groups = [f"{key}={getattr(layer, key)}" for key in ("num_groups", "group_size") if hasattr(layer, key)]
    return f"{_class_name(layer)}({', '.join([str(_channels(layer)), *groups])})"


def _class_name(module: object) -> str:
    return type(module).__name__


def _channels(layer: Any) -> int:
    """Return the number of channels; a frozen layer has it only as the length of its weight."""
    for attribute in ("num_features", "num_channels"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute))
    return len(layer.weight)


def _read_batch_norm(layer: Any) -> Normalization:
    averages = None
    if layer.running_mean is not None and layer.running_var is not None:
        whitener = (layer.running_var.detach().double() + layer.eps).rsqrt()
        batches = getattr(layer, "num_batches_tracked", None)
        averages = Averages(layer.running_mean.detach(), whitener[:, None, None], batches)
    return Normalization(
        BATCH_NORM,
        _channels(layer),
        layer.eps,
        layer.weight,
        layer.bias,
        averages,
        getattr(layer, "momentum", 0.1),  # a frozen layer has none
        process_group=(layer.process_group or WORLD) if isinstance(layer, nn.SyncBatchNorm) else None,
        dimensions={nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}.get(type(layer), 2),
        activation=(layer.drop, layer.act) if hasattr(layer, "act") else (),
    )


def _read_group_norm(layer: Any) -> Normalization:
    return Normalization(
        GROUP_WHITENING if isinstance(layer, GroupWhitening) else GROUP_NORM,
        layer.num_channels,
        layer.eps,
        layer.weight,
        layer.bias,
        num_groups=layer.num_groups,
        axis=getattr(layer, "axis", 1),
        activation=(layer.drop, layer.act) if hasattr(layer, "act") else (),
    )


def _read_iter_norm(layer: IterNorm) -> Normalization:
    statistics = layer.evaluation_statistics()
    return Normalization(
        ITER_NORM,
        layer.num_features,
        layer.eps,
        layer.weight,
        layer.bias,
        None if statistics is None else Averages(*statistics, layer.num_batches_tracked),
        layer.momentum,
        axis=layer.axis,
        process_group=layer.process_group,
        frozen_stats=layer.frozen_stats,
    )


def _read_norm_act(layer: NormAct) -> Normalization:
    return replace(read_normalization(layer.norm, "norm"), activation=(layer.drop, layer.act))


# By the class that defines a layer's `forward`: a subclass with a `forward` of its own may compute something else.
# torchvision and timm aren't imported, as a network that has their layers already has imported them.
_READERS: dict[tuple[str, str], Callable[[Any], Normalization]] = {
    ("torch.nn.modules.batchnorm", "_BatchNorm"): _read_batch_norm,
    ("torch.nn.modules.batchnorm", "SyncBatchNorm"): _read_batch_norm,
    ("torch.nn.modules.normalization", "GroupNorm"): _read_group_norm,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): _read_batch_norm,
    ("timm.layers.norm_act", "BatchNormAct2d"): _read_batch_norm,
    ("timm.layers.norm_act", "SyncBatchNormAct"): _read_batch_norm,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): _read_batch_norm,
    ("timm.layers.norm_act", "GroupNormAct"): _read_group_norm,
    (IterNorm.__module__, IterNorm.__qualname__): _read_iter_norm,
    (GroupWhitening.__module__, GroupWhitening.__qualname__): _read_group_norm,
}


def _reader(layer: nn.Module) -> Callable[[Any], Normalization] | None:
    """Return the function that reads this kind of layer, or None if there is none."""
    if isinstance(layer, NormAct):
        return _read_norm_act if _reader(layer.norm) is not None else None
    defining = next(cls for cls in type(layer).__mro__ if "forward" in cls.__dict__)
    return _READERS.get((defining.__module__, defining.__qualname__))
