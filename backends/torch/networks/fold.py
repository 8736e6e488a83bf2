"""Fold the normalization layers of a network into its convolutions and linear layers, for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from polywhiten import checks
from polywhiten.conversion import Change, Report
from polywhiten.torch.networks.affine import AffineMap
from polywhiten.torch.networks.channel_map import ChannelMap, RowsOnly
from polywhiten.torch.networks.convert import replace_module
from polywhiten.torch.networks.copies import copy_network, evaluate, modules_in_containers
from polywhiten.torch.networks.fold_plan import Foldable, FoldPlan, peculiarity
from polywhiten.torch.networks.graph import traces
from polywhiten.torch.networks.normalization import (
    GROUP_NORM,
    GROUP_WHITENING,
    ITER_NORM,
    Normalization,
    check_initialized,
    describe,
    normalization_layers,
    read_normalization,
)
from polywhiten.torch.norm_layers import NormAct


@overload
def fold(
    model: nn.Module, *, example_inputs: Any = None, inplace: bool = False, return_report: Literal[True]
) -> tuple[nn.Module, Report]: ...


@overload
def fold(
    model: nn.Module, *, example_inputs: Any = None, inplace: bool = False, return_report: Literal[False] = False
) -> nn.Module: ...


def fold(
    model: nn.Module,
    *,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
    return_report: bool = False,
) -> nn.Module | tuple[nn.Module, Report]:
    """Fold the normalization layers of a network into other layers, for evaluation.

    In evaluation, `IterNorm` and batch normalization are affine maps of the channels. Such a map becomes part of the
    convolution or linear layer before it. Where this isn't possible, it becomes part of the one after it, or else
    `IterNorm` becomes a 1 x 1 convolution of its own, and batch normalization is left as it is, which takes less time.
    The network has the same outputs as before, up to rounding.

    Parameters
    ----------
    model : Module
        The network, in evaluation mode. Its layers `IterNorm`, `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d` and
        `SyncBatchNorm`, torchvision's `FrozenBatchNorm2d` and timm's `BatchNormAct2d` are folded, if they have running
        averages. Layers that normalize each sample by itself, such as `GroupWhitening`, are left, and so are layers
        whose channels are at another axis than 1.
    example_inputs : Tensor or tuple, optional
        An input of the network, or the tuple of all arguments. The network runs on it before and after, and its outputs
        have to be the same.
    inplace : bool
        Whether to change the model itself, not a copy of it.
    return_report : bool
        Whether to return also a report of where each layer went, and why. `print(report)` shows it as a table.

    Returns
    -------
    Module, or tuple of Module and Report
        The model, or a copy, with other weights and with `torch.nn.Identity` in the places of folded layers. Layers
        with an activation leave a `NormAct` with the activation. If the model is itself a normalization layer, this is
        what replaces it.

    Raises
    ------
    ValueError
        A layer is in training mode or has no values yet, or outputs for `example_inputs` would change. The model is as
        it was.
    TypeError
        The model isn't a module or is compiled by TorchScript.

    Warns
    -----
    UserWarning
        There is nothing to fold.

    Notes
    -----
    `torch.fx` finds out which layer comes after which, but the network keeps its own class and code. If code can't be
    traced, each part of the network that can be is traced by itself. This assumes that the code calls these parts as a
    whole, and doesn't, for example, use only the first layers of an `nn.Sequential`. Code is traced with the defaults
    of its arguments, and `torch.fx` doesn't see everything: a branch on the type of an argument, a loop over
    `conv.parameters()`, or what code stores in attributes. Where code does more than call one layer after another, pass
    `example_inputs`, and an error tells if outputs would change.

    A layer is folded only where that is exact:

    - The two layers are next to each other, and nothing else uses what is between them.
    - Each is called once, has one name in the network, and has neither hooks nor parametrizations.
    - The other layer's class is one of PyTorch's, or a subclass that has its `forward`.
    - A grouped convolution's groups have all channels that are whitened together. Groups of single channels, as in
      depthwise convolutions, take diagonal maps.
    - A convolution after the layer has no padding with zeros, unless the map has no offset.

    In place of a layer that is folded into a linear layer, there is a module that accepts only inputs (N, C).

    The new weights are computed in float64, are new parameters, and have the dtype, device, memory format and
    `requires_grad` of the old ones. Layers get a bias if they have none. Folded networks aren't for further training,
    and their state doesn't fit a network that was folded with other weights: save the unfolded network, or all of the
    folded one by `torch.save` or an export.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from polywhiten.torch import IterNorm, fold
    >>> network = nn.Sequential(nn.Conv2d(3, 16, 3), IterNorm(16), nn.ReLU(), IterNorm(16))
    >>> x = torch.randn(8, 3, 32, 32)
    >>> y = network(x)  # a training step, which updates the running averages
    >>> folded, report = fold(network.eval(), return_report=True)
    >>> print(report)
    layer  before                       after              note
    -----  ---------------------------  -----------------  --------------------------------------------
    1      IterNorm(16, group_size=64)  folded into 0
    3      IterNorm(16, group_size=64)  1 x 1 convolution  no convolution or linear layer is next to it
    >>> torch.allclose(folded(x), network(x), atol=1e-5)
    True
    """
    _check_model(model)
    if not inplace:
        model = copy_network(model)
    expected = None if example_inputs is None else evaluate(copy_network(model, share_parameters=True), example_inputs)
    layers = dict(normalization_layers(model))
    in_containers = modules_in_containers(model)
    read = {
        layer: f"it is also in the attribute {in_containers[layer]}" if layer in in_containers else _read(name, layer)
        for name, layer in layers.items()
    }
    affine = {layer: old for layer, old in read.items() if isinstance(old, Normalization)}
    plan = FoldPlan(model, {layer: _foldable(old) for layer, old in affine.items()})
    for trace in traces(model, set(layers.values())):
        plan.add(trace)
    replaced = {layer: place for layer, old in affine.items() if (place := _place(layer, old, plan)) is not None}
    report = Report(_change(name, layer, read[layer], replaced, plan) for name, layer in layers.items())
    parameters = {host: weights.parameters_for(host) for host, weights in plan.weights.items()}
    _take_notice(model, report)
    before = {host: (host.weight, host.bias) for host in parameters}
    folded = _swap(model, {name: replaced[layer] for name, layer in layers.items() if layer in replaced}, parameters)
    if example_inputs is not None and (change := _change_of_outputs(folded, example_inputs, expected)):
        _swap(folded, {name: layer for name, layer in layers.items() if layer in replaced}, before)
        raise ValueError(
            f"the outputs of {type(model).__name__} for example_inputs would change by {change:.1e} of their largest "
            "value, as its code does something with the folded layers that torch.fx doesn't see. Fold the parts of the "
            "model that call one layer after another"
        )
    return (folded, report) if return_report else folded


def _swap(model: nn.Module, modules: Mapping[str, nn.Module], parameters: Mapping[Any, tuple[Any, Any]]) -> nn.Module:
    """Put modules at these names and parameters, weight and bias, into layers, and return the network."""
    for host, (weight, bias) in parameters.items():
        host.weight, host.bias = weight, bias
    for name, module in modules.items():
        model = replace_module(model, name, module)
    return model


def _change_of_outputs(model: nn.Module, example_inputs: Any, expected: Any) -> float:
    """Return by how much of their largest value outputs differ from those expected, or 0 for what rounding explains."""
    outputs = evaluate(copy_network(model, share_parameters=True), example_inputs)
    change = 0.0
    for y, wanted in zip(tree_leaves(outputs), tree_leaves(expected), strict=True):
        if isinstance(wanted, Tensor) and wanted.is_floating_point() and wanted.numel():
            difference = (y.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-300)
            limit = torch.finfo(wanted.dtype).eps ** 0.5
            change = max(change, difference.item() if not difference <= limit else 0.0)
    return change


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise checks.wrong_type(model, "model", "a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is compiled by TorchScript, so its layers can't be folded: fold it before")
    check_initialized(model)


def _read(name: str, layer: nn.Module) -> Normalization | str:
    """Return what a layer computes, or why it can't be folded."""
    norm = layer.norm if isinstance(layer, NormAct) else layer
    if found := peculiarity(layer) or peculiarity(norm):
        return f"it {found}"
    old = read_normalization(layer, name)
    if old.kind in (GROUP_NORM, GROUP_WHITENING):
        return "it normalizes each sample by itself"
    if old.averages is None:
        return "it has no running averages"
    if old.axis != 1:
        return f"it has its channels at axis={old.axis}"
    is_frozen = old.weight is not None and not isinstance(old.weight, nn.Parameter)
    if norm.training and not is_frozen:
        raise ValueError(
            f"layer {name!r}, {describe(layer)}, is in training mode, where it doesn't use its running averages: call "
            "model.eval() first"
        )
    if old.averages.mean.is_meta:
        raise ValueError(f"layer {name!r}, {describe(layer)}, is on the meta device, so it has no values to fold")
    return old


def _foldable(old: Normalization) -> Foldable:
    assert old.averages is not None
    return Foldable(AffineMap.of(old, old.averages), any(type(module) is not nn.Identity for module in old.activation))


def _place(layer: nn.Module, old: Normalization, plan: FoldPlan) -> nn.Module | None:
    """Return what takes the place of a layer, in its mode and with its activation; None if the layer stays."""
    place: nn.Module
    if layer in plan.hosts:
        place = RowsOnly() if isinstance(plan.hosts[layer], nn.Linear) else nn.Identity()
    elif old.kind == ITER_NORM:
        assert old.averages is not None
        affine = plan.layers[layer].map
        place = ChannelMap(affine.grouped().to(old.averages.mean), affine.offset.to(old.averages.mean))
        place.requires_grad_(any(parameter.requires_grad for parameter in layer.parameters()))
    else:
        return None
    place.eval()
    if old.activation:
        place = NormAct(place, *old.activation)
        place.training = layer.training
    return place


def _change(
    name: str, layer: nn.Module, read: Normalization | str, replaced: Mapping[nn.Module, nn.Module], plan: FoldPlan
) -> Change:
    before = describe(layer)
    if isinstance(read, str):
        return Change(name, before, "", read)
    if layer in plan.hosts:
        return Change(name, before, f"folded into {plan.name(plan.hosts[layer])}")
    note = plan.objections.get(
        layer, "the code that torch.fx can trace doesn't call it" if name else "it is the whole model"
    )
    return Change(name, before, "1 x 1 convolution" if layer in replaced else "", note)


def _take_notice(model: nn.Module, report: Report) -> None:
    """Warn if nothing was folded, and say why."""
    if report.replaced:
        return
    names: dict[str, list[str]] = {}
    for change in report:
        names.setdefault(change.note, []).append(change.name or type(model).__name__)
    reasons = "; ".join(f"{', '.join(layers)}: {note}" for note, layers in names.items())
    warnings.warn(
        f"fold leaves {type(model).__name__} as it is: " + (reasons or "it has no layers that fold knows"), stacklevel=3
    )
