"""The parts of what is measured on a GPU, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpu_arrays import array_cases, array_library
from gpu_cases import Case
from gpu_host import host_cases
from gpu_layers import copy_case, inverse_sqrt_cases, layer_cases
from gpu_networks import maker, network_cases

PARTS = ("layers", "inverse_sqrt", "cupy", "host", "networks")
# A graph's capture that fails can harm others, so those come later; networks that are compiled, which takes long, last.
MODES = ("eager", "graph", "compiled", "reduce-overhead")


def cases(device: torch.device, parts: Sequence[str], tell: Callable[[str], object]) -> list[Case]:
    """Of those parts; `tell` is told what is left out, and why."""
    found: list[Case] = []
    if "layers" in parts:
        found += [copy_case(device), *layer_cases(device)]
    if "inverse_sqrt" in parts:
        found += inverse_sqrt_cases(device)
    if "cupy" in parts:
        library = array_library(device)
        if isinstance(library, str):
            tell(library)
        else:
            found += array_cases(device, library)
    if "host" in parts:
        found += host_cases(device)
    networks: list[Case] = []
    if "networks" in parts:
        make = maker(device)
        if isinstance(make, str):
            tell(make)
        else:
            networks += network_cases(device, make)
    eager, others = ([case for case in networks if (case.mode == "eager") is which] for which in (True, False))
    return [*eager, *sorted(found, key=lambda case: MODES.index(case.mode)), *others]
