"""Copies of a network, what it returns for an example, and which of its modules it holds in plain containers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def copy_network(network: Module, *, share_parameters: bool = False) -> Module:
    """Return a copy of a network, with modules in the same modes, and with its own parameters or the network's."""
    # A ProcessGroup can't be copied.
    shared: list[Any] = [module.process_group for module in network.modules() if isinstance(module, nn.SyncBatchNorm)]
    if share_parameters:
        shared += network.parameters()
    copied = copy.deepcopy(network, {id(each): each for each in shared})
    modes = {name: module.training for name, module in network.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes[name]  # a copy of a torch.fx.GraphModule is in training mode
    return copied


def evaluate(network: nn.Module, example_inputs: Any) -> Any:
    """Return what a network returns for a tensor, or for a tuple of all arguments, and leave it in evaluation mode."""
    network.eval()
    with torch.no_grad():
        return network(*(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)))


def modules_in_containers(network: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that plain attributes, lists, tuples, sets or dicts hold, and the names of these attributes.

    A network's code can call modules there, but whoever replaces a module of the network doesn't replace it there.
    """
    found: dict[nn.Module, str] = {}
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            entries: Iterable[Any] = value.values() if isinstance(value, dict) else value
            for entry in entries if isinstance(value, dict | list | tuple | set) else [value]:
                if isinstance(entry, nn.Module):
                    found.setdefault(entry, f"{name}.{attribute}" if name else attribute)
    return found
