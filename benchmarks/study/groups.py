"""Experiment 4: group whitening, group and batch normalization in a multilayer perceptron, by batch size and groups."""

from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import Norm, bn, gn, gw
from study.runs import Experiment

SIZES = {
    "tiny": {"width": 128, "side": 8, "pictures": 256, "test_pictures": 64, "epochs": 1},  # a quick trial
    "small": {"width": 128, "side": 16, "pictures": 2000, "test_pictures": 2000, "epochs": 8},
    "large": {"width": 256, "side": 32, "pictures": 10_000, "test_pictures": 10_000, "epochs": 10},
}
HIDDEN = 4
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
GROUPS = (2, 4, 8, 16, 32, 64)
NUM_GROUPS, BATCH_SIZE = 8, 32  # each is fixed while the other varies


def plan(size: str, seeds: int) -> list[FitSettings]:
    """Return the settings of all runs: every run of one seed comes before those of the next."""
    fixed = SIZES[size] | {"network": "mlp", "depth": HIDDEN}
    wanted: dict[tuple[Norm, int], None] = {}
    for norm in (bn(), gn(NUM_GROUPS), gw(NUM_GROUPS)):
        wanted |= {(norm, batch_size): None for batch_size in BATCH_SIZES}
    for num_groups in GROUPS:
        wanted |= {(kind(num_groups), BATCH_SIZE): None for kind in (gn, gw)}
    return [
        FitSettings(**vars(norm), **fixed, batch_size=batch_size, lr=scaled_lr(batch_size), seed=seed)
        for seed in range(seeds)
        for norm, batch_size in wanted
    ]


EXPERIMENT = Experiment(
    "groups", "GW, GN and BN in a perceptron, by batch size and groups.", FitSettings, Fit, plan, fit
)
