"""The places in a network where the papers' authors put whitening layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn


def placements(network: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Callable[[], list[str]]]:
    """Return functions that choose among the names of a network's normalization layers.

    - "all": every layer, as in IterNorm's paper for small images.
    - "first": the first layer in the order of definition, as in IterNorm's paper for ImageNet.
    - "middle": the second of the three layers of each block, as in the group whitening paper. A block is a module with
      three normalization layers of its own, such as the bottleneck blocks of ResNet and ResNeXt.
    """
    return {
        "all": lambda: [*layers],
        "first": lambda: [*layers][:1],
        "middle": lambda: _middle_layers(network, layers),
    }


def _middle_layers(network: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    blocks: dict[str, list[str]] = {}
    for name in layers:
        blocks.setdefault(name.rpartition(".")[0], []).append(name)
    middle = [names[1] for names in blocks.values() if len(names) == 3]
    if not middle:
        raise ValueError(
            f"where='middle' chooses the second of three normalization layers of a block, and {type(network).__name__} "
            "has no block with three: use patterns of names, such as where='layer*.bn2'"
        )
    return middle
