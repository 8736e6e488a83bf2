"""Replace the normalization layers of a network."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from polywhiten import checks
from polywhiten.conversion import Change, Report, Where, select
from polywhiten.feasibility import InfeasibleWarning
from polywhiten.torch.networks.copies import copy_network, evaluate, modules_in_containers
from polywhiten.torch.networks.normalization import (
    check_initialized,
    describe,
    normalization_layers,
    read_normalization,
)
from polywhiten.torch.networks.placements import placements
from polywhiten.torch.networks.replacement import (
    BATCH_NORMS,
    TARGETS,
    Replacement,
    accepted_arguments,
    check_replaceable,
    make_replacement,
)

Shape = tuple[int, ...]


@overload
def convert(model: nn.Module, to: str, *, return_report: Literal[True], **options: Any) -> tuple[nn.Module, Report]: ...


@overload
def convert(model: nn.Module, to: str, *, return_report: Literal[False] = False, **options: Any) -> nn.Module: ...


def convert(
    model: nn.Module,
    to: str,
    *,
    where: Where = None,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    inplace: bool = False,
    strict: bool = False,
    return_report: bool = False,
    **arguments: Any,
) -> nn.Module | tuple[nn.Module, Report]:
    """Replace the normalization layers of a network, and keep what they have learnt.

    Parameters
    ----------
    model : Module
        The network. Its layers `BatchNorm1d`, `BatchNorm2d`, `BatchNorm3d`, `SyncBatchNorm` and `GroupNorm`,
        torchvision's `FrozenBatchNorm2d`, timm's `BatchNormAct2d` and `GroupNormAct` (whose activation is kept), and
        `IterNorm` and `GroupWhitening` can be replaced.
    to : {"iter_norm", "group_whitening", "batch_norm", "group_norm"}
        The kind of the new layers.
    where : callable, str or sequence of str, optional
        Which layers to replace; all by default. A callable gets a layer's name and the layer, and returns whether to
        replace it. A string is a pattern of names, such as "layer*.bn2", or one of the papers' choices: "all"; "first",
        the network's first normalization layer; "middle", the second of the three layers of every block, as ResNet-50
        and ResNeXt-50 have them. A sequence has several patterns.
    example_inputs : Tensor or tuple, optional
        A batch as in training, or the tuple of all arguments of `model`. A copy of the network runs on it
        once, in evaluation mode, to find out how many samples every layer gets, and so which groups are feasible.
    inplace : bool
        Whether to change the model itself, not a copy of it.
    strict : bool
        Whether to raise an error where a layer can't have the groups that are wanted, in place of a warning.
    return_report : bool
        Whether to return also a report of what was replaced. `print(report)` shows it as a table.
    **arguments
        Arguments of the new layers: `group_size`, `method` and others of `IterNorm`, `num_groups` and others of
        `GroupWhitening`, and so on. `eps`, `momentum`, `track_running_stats`, `process_group` and `num_groups` are
        those of the old layer by default, if it has them. "batch_norm" also accepts `dimensions=1`, 2 or 3, for
        `BatchNorm1d` and so on; by default they are those of the example inputs, or else 2.

    Returns
    -------
    Module, or tuple of Module and Report
        The model, or a copy with other layers. If the model is itself a normalization layer, this is the new one.

    Raises
    ------
    ValueError
        An argument is invalid, a pattern matches no layer, or, with `strict=True`, groups are infeasible. The model is
        as it was.
    TypeError
        The model isn't a module or is compiled by TorchScript, an argument isn't known, or `where` can't be understood.

    Warns
    -----
    polywhiten.analysis.InfeasibleWarning
        Layers get fewer groups, or smaller ones, than wanted, because their channels or samples don't allow more. The
        warning names each layer and its value, and has them in its attribute `layers`.
    UserWarning
        There is nothing to replace.

    Notes
    -----
    Weight, bias and the number of batches are those of the old layers. Parameters are the same objects, so an optimizer
    that updates them continues to do so. If batch normalization is converted to IterNorm, the network has the same
    output in evaluation: its whiteners are diagonal matrices of 1 / sqrt(var + eps) until training changes them. With
    `track="covariance"`, this needs `method="eigh"`. Where outputs in evaluation change, the report says so.

    Layers of timm that include an activation become a `NormAct`, which has normalization and activation as children
    `norm`, `drop` and `act`, also after a conversion back.

    The new layers don't have the hooks of the old ones. Subclasses with a `forward` of their own may compute something
    else, so they are left as they are.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from polywhiten.torch import convert
    >>> network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU()).eval()
    >>> converted, report = convert(network, "iter_norm", group_size=16, return_report=True)
    >>> print(report)
    layer  before           after                        note
    -----  ---------------  ---------------------------  ----
    1      BatchNorm2d(64)  IterNorm(64, group_size=16)
    >>> x = torch.randn(8, 3, 32, 32)
    >>> torch.allclose(converted(x), network(x), atol=1e-5)
    True
    """
    _check_arguments(model, to, arguments)
    if not inplace:
        model = copy_network(model)
    layers = dict(normalization_layers(model))
    chosen = {name: layers[name] for name in select(where, layers, placements(model, layers))}
    shapes = None if example_inputs is None else _input_shapes(model, chosen, example_inputs)
    in_containers = modules_in_containers(model)
    made: dict[nn.Module, Replacement] = {}
    report = []
    for name, layer in chosen.items():
        old = read_normalization(layer, name)
        if old.kind == to:
            report.append(Change(name, describe(layer), "", "is of this kind already"))
            continue
        check_replaceable(old, name, to)
        if layer in in_containers:
            raise ValueError(
                f"layer {name!r} is also in the attribute {in_containers[layer]!r}, where it can't be replaced: make "
                "that a torch.nn.ModuleList or ModuleDict, or leave the layer out with where="
            )
        if layer not in made:  # else the network has this layer under another name, too
            made[layer] = make_replacement(old, to, arguments, () if shapes is None else shapes.get(name, ()))
            made[layer].layer.train(layer.training)
        new, notes = made[layer].layer, [made[layer].adjustment, *made[layer].losses]
        if shapes is not None and name not in shapes:
            notes.append("the example doesn't reach it")
        report.append(Change(name, describe(layer), describe(new), "; ".join(note for note in notes if note)))
    _take_notice(model, to, {name: made[layer].adjustment for name, layer in chosen.items() if layer in made}, strict)
    for name, layer in chosen.items():
        if layer in made:
            model = replace_module(model, name, made[layer].layer)
    return (model, Report(report)) if return_report else model


def replace_module(network: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put another module in the place of this name, and return the network: the new module itself if the name is ""."""
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)
    return network


def _check_arguments(model: nn.Module, to: str, arguments: Mapping[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise checks.wrong_type(model, "model", "a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is compiled by TorchScript, so its layers can't be replaced: convert it before")
    check_initialized(model)
    checks.check_choice("to", to, [*TARGETS])
    accepted = accepted_arguments(to)
    for name, value in arguments.items():
        if name not in accepted:
            raise TypeError(f"{name}={value!r} is no argument for to={to!r}, which accepts {', '.join(accepted)}")
    for name in ("group_size", "num_groups"):
        if name in arguments:
            checks.check_positive(name, arguments[name])
    if arguments.get("dimensions", 2) not in [*BATCH_NORMS]:
        raise ValueError(f"dimensions={arguments['dimensions']!r} is not one of 1, 2, 3")


def _input_shapes(model: nn.Module, names: Iterable[str], example_inputs: Any) -> dict[str, set[Shape]]:
    """Return the shapes of the inputs that layers of these names get, from a copy that evaluates an example."""
    shapes: dict[str, set[Shape]] = {}
    model = copy_network(model, share_parameters=True)
    for name in names:

        def note(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            shapes.setdefault(name, set()).add(tuple(inputs[0].shape))

        model.get_submodule(name).register_forward_pre_hook(note)
    evaluate(model, example_inputs)
    return shapes


def _take_notice(model: nn.Module, to: str, adjustments: Mapping[str, str], strict: bool) -> None:
    """Warn if nothing was replaced; warn, or raise an error, if layers can't have the groups that are wanted."""
    if not adjustments:
        names = [type(module).__name__ for module in model.modules() if not isinstance(module, nn.Sequential)]
        others = Counter(name for name in names if "Norm" in name)
        found = ", ".join(f"{count} {name}" for name, count in sorted(others.items())) or "none"
        warnings.warn(
            f"convert(..., {to!r}) replaces no layer of {type(model).__name__}. Its normalization layers: {found}",
            stacklevel=3,
        )
    adjusted = {name or type(model).__name__: adjustment for name, adjustment in adjustments.items() if adjustment}
    if not adjusted:
        return
    layers: dict[str, list[str]] = {}
    for name, adjustment in adjusted.items():
        layers.setdefault(adjustment, []).append(name)
    listed = "; ".join(f"{adjustment} in {', '.join(names)}" for adjustment, names in layers.items())
    if strict:
        raise ValueError(f"some layers can't have the groups that are wanted. With strict=False: {listed}")
    message = f"some layers can't have the groups that are wanted, and get the nearest: {listed}"
    warnings.warn(InfeasibleWarning(message, adjusted), stacklevel=3)
