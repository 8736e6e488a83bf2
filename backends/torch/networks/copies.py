"""Copies of a network, what it returns for an example, and which of its modules it holds in plain containers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # its own modules, parameters, buffers and hooks


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
    """Return the modules that plain attributes and containers in them hold, and the names of these attributes.

    Containers are lists, tuples, sets and dicts, at any depth. A method of a module holds the module. A network's code
    can call modules there, but whoever replaces a module of the network doesn't replace it there.
    """
    found: dict[nn.Module, str] = {}
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _OF_EVERY_MODULE:
                for held in _modules_in(value, set()):
                    found.setdefault(held, f"{name}.{attribute}" if name else attribute)
    return found


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules in a value, which may contain itself."""
    if isinstance(value, MethodType):
        value = value.__self__
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict | list | tuple | set | frozenset) and id(value) not in seen:
        seen.add(id(value))
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(entry, seen)
