"""Experiment 5: residual networks with group whitening in the middle of each block, and with only BN."""

from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import bn, gw
from study.runs import Experiment

SIZES = {
    "tiny": {"width": 16, "depth": 1, "side": 8, "pictures": 128, "test_pictures": 64, "epochs": 2},  # a quick trial
    "small": {"width": 16, "depth": 2, "side": 16, "pictures": 5000, "test_pictures": 2000, "epochs": 12},
    "large": {"width": 64, "depth": 2, "side": 32, "pictures": 50_000, "test_pictures": 10_000, "epochs": 10},
}
BATCH_SIZE, NUM_GROUPS = 64, 16
NORMS = (bn(), gw(NUM_GROUPS))


def plan(size: str, seeds: int) -> list[FitSettings]:
    """Return the settings of all runs: every run of one seed comes before those of the next."""
    fixed = SIZES[size] | {"network": "resnet", "batch_size": BATCH_SIZE, "lr": scaled_lr(BATCH_SIZE)}
    return [FitSettings(**vars(norm), **fixed, seed=seed) for seed in range(seeds) for norm in NORMS]


EXPERIMENT = Experiment(
    "resnet", "GW in the middle of every residual block, and BN in all of it.", FitSettings, Fit, plan, fit
)
