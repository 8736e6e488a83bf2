"""Experiment 3: a VGG-style network with batch normalization, with DBN and with IterNorm."""

from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import Norm, bn, dbn, iter_norm
from study.runs import Experiment

SIZES = {
    "tiny": {"width": 16, "side": 8, "pictures": 256, "test_pictures": 64, "epochs": 2},  # a quick trial
    "small": {"width": 32, "side": 16, "pictures": 5000, "test_pictures": 2000, "epochs": 8},
    "large": {"width": 64, "side": 32, "pictures": 20_000, "test_pictures": 10_000, "epochs": 10},
}
ITERATIONS = (1, 3, 5, 7, 9)
GROUP_SIZES = (8, 16, 64, 0)
BATCH_SIZES = (16, 64, 256)
BATCH_SIZE = 64
COMPARED = (bn(), dbn(16), iter_norm())  # these are compared at every batch size and learning rate
HIGH_LR = 10


def plan(size: str, seeds: int) -> list[FitSettings]:
    """Return the settings of all runs: every run of one seed comes before those of the next."""
    fixed = SIZES[size] | {"network": "vgg", "depth": 4}
    wanted: dict[tuple[Norm, int, float], None] = {}
    for norm in (*COMPARED, dbn(0), *map(iter_norm, GROUP_SIZES), *(iter_norm(iterations=t) for t in ITERATIONS)):
        wanted[norm, BATCH_SIZE, 1] = None
    for norm in COMPARED:
        wanted |= {(norm, batch_size, 1): None for batch_size in BATCH_SIZES}
        wanted[norm, BATCH_SIZE, HIGH_LR] = None
    return [
        FitSettings(**vars(norm), **fixed, batch_size=batch_size, lr=scaled_lr(batch_size, factor), seed=seed)
        for seed in range(seeds)
        for norm, batch_size, factor in wanted
    ]


EXPERIMENT = Experiment("training", "BN, DBN and IterNorm in a VGG-style network.", FitSettings, Fit, plan, fit)
