"""Lists the cases of each part of the GPU measurements, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpu_arrays import array_cases, array_library
from gpu_cases import Case
from gpu_host import host_cases
from gpu_layers import copy_case, inverse_sqrt_cases, layer_cases
from gpu_networks import maker, network_cases

PARTS = ("layers", "inverse_sqrt", "cupy", "host", "networks")
# A failed graph capture can disturb later measurements, so graphs come after eager cases. Networks that are compiled
# come last of all, because that takes long.
MODES = ("eager", "graph", "compiled", "reduce-overhead")


def cases(device: torch.device, parts: Sequence[str], tell: Callable[[str], object]) -> list[Case]:
    """Return the cases of these parts, and call `tell` with the reason for each part that is skipped."""
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
