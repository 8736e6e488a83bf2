"""Experiment 5: residual networks with group whitening in the middle of each block, with IterNorm, and with only BN."""

from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import Norm, bn, gw, iter_norm
from study.runs import Experiment

GPU = {"width": 16, "depth": 2, "side": 32, "pictures": 50_000, "test_pictures": 10_000, "epochs": 10, "shift": 4}
GPU |= {"warmup": 2.0, "recomputed_over": 10_000}
SIZES = {
    "tiny": {"width": 16, "depth": 1, "side": 8, "pictures": 128, "test_pictures": 64, "epochs": 2},  # a quick trial
    "small": {"width": 16, "depth": 2, "side": 16, "pictures": 5000, "test_pictures": 2000, "epochs": 12},
    "cpu": GPU | {"side": 16, "epochs": 5, "shift": 2},  # the network of "small" on all pictures
    "gpu": GPU,
    "large": GPU,
}
BATCH_SIZES = {"cpu": 256, "gpu": 256, "large": 256}  # 64 for the others
BN, GW = (bn(), "all"), (gw(16), "middle")
ITER_NORM_FIRST, ITER_NORM = (iter_norm(), "first"), (iter_norm(), "all")


def plan(size: str, seeds: int) -> list[list[FitSettings]]:
    """Return the settings of all runs, a list for each seed."""
    batch_size = BATCH_SIZES.get(size, 64)
    fixed = SIZES[size] | {"network": "resnet", "batch_size": batch_size, "lr": scaled_lr(batch_size)}
    placed: list[tuple[Norm, str]] = [BN, GW] if size == "small" else [BN, GW, ITER_NORM_FIRST, ITER_NORM]
    return [
        [FitSettings(**vars(norm), **fixed, where=where, seed=seed) for norm, where in placed] for seed in range(seeds)
    ]


EXPERIMENT = Experiment(
    "resnet",
    "GW in the middle of every residual block, IterNorm in place of the first norm or of all, and BN.",
    FitSettings,
    Fit,
    plan,
    fit,
    sizes=("tiny", "small", "cpu", "gpu", "large"),
    seeds={},
)
