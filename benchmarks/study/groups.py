"""Experiment 4: group whitening, group and batch normalization by batch size, and by groups in a perceptron."""

from dataclasses import dataclass
from typing import Any

from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import Norm, bn, gn, gw
from study.runs import Experiment


@dataclass(frozen=True)
class Size:
    """What the runs of a size have in common, and in what they differ."""

    fixed: dict[str, Any]
    num_groups: int  # while the batch size varies
    batch_sizes: tuple[int, ...]
    groups: tuple[int, ...] = ()  # tried at BATCH_SIZE


BATCH_SIZE = 32
BATCH_SIZES, GROUPS = (2, 4, 8, 16, 32, 64, 128, 256), (2, 4, 8, 16, 32, 64)
MLP = {"network": "mlp", "depth": 4, "width": 128, "test_pictures": 2000}
VGG = {"network": "vgg", "depth": 4, "width": 64, "side": 32, "pictures": 10_000, "test_pictures": 10_000, "epochs": 4}
SIZES = {
    "tiny": Size(MLP | {"side": 8, "pictures": 256, "test_pictures": 64, "epochs": 1}, 8, (2, 32, 256), (8, 64)),
    "small": Size(MLP | {"side": 16, "pictures": 2000, "epochs": 8}, 8, BATCH_SIZES, GROUPS),
    "cpu": Size(VGG | {"width": 16, "shift": 4}, 8, BATCH_SIZES[::2] + BATCH_SIZES[-1:]),
    "gpu": Size(VGG | {"shift": 4}, 16, BATCH_SIZES[::2] + BATCH_SIZES[-1:]),
    "large": Size(VGG | {"shift": 4}, 16, BATCH_SIZES),
}


def plan(size: str, seeds: int) -> list[list[FitSettings]]:
    """Return the settings of all runs, a list for each seed."""
    plan = SIZES[size]
    wanted: dict[tuple[Norm, int], None] = {}
    for batch_size in plan.batch_sizes:
        wanted |= {(norm, batch_size): None for norm in (bn(), gn(plan.num_groups), gw(plan.num_groups))}
    for num_groups in plan.groups:
        wanted |= {(kind(num_groups), BATCH_SIZE): None for kind in (gn, gw)}

    def settings(norm: Norm, batch_size: int, seed: int) -> FitSettings:
        return FitSettings(**vars(norm), **plan.fixed, batch_size=batch_size, lr=scaled_lr(batch_size), seed=seed)

    return [[settings(norm, batch_size, seed) for norm, batch_size in wanted] for seed in range(seeds)]


EXPERIMENT = Experiment(
    "groups",
    "GW, GN and BN by batch size, and by groups in a perceptron.",
    FitSettings,
    Fit,
    plan,
    fit,
    sizes=("tiny", "small", "cpu", "gpu", "large"),
    seeds={"gpu": 1},
)
