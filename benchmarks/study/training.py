"""Experiment 3: a VGG-style network with batch and group normalization, DBN, IterNorm and group whitening."""

from dataclasses import dataclass
from typing import Any

from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import Norm, bn, dbn, gn, gw, iter_norm
from study.runs import Experiment

HIGH_LR = 10


@dataclass(frozen=True)
class Size:
    """What the runs of a size have in common, and in what they differ."""

    fixed: dict[str, Any]
    batch_size: int  # where nothing else is said
    compared: tuple[Norm, ...]  # with all seeds
    variants: tuple[Norm, ...]  # of one of these
    variants_have_all_seeds: bool = False
    others: tuple[Norm, ...] = ()  # those of `compared` that are also trained as the following fields say
    batch_sizes: tuple[int, ...] = ()
    high_lr: bool = False  # whether with HIGH_LR times the learning rate
    others_have_all_seeds: bool = False


TINY = {"network": "vgg", "depth": 4, "width": 16, "side": 8, "pictures": 256, "test_pictures": 64, "epochs": 2}
SMALL = {"network": "vgg", "depth": 4, "width": 32, "side": 16, "pictures": 5000, "test_pictures": 2000, "epochs": 8}
ALL_PICTURES = {"network": "vgg", "depth": 8, "side": 32, "pictures": 50_000, "test_pictures": 10_000, "shift": 4}
ALL_PICTURES |= {"warmup": 2.0, "recomputed_over": 10_000}
GPU = ALL_PICTURES | {"width": 64, "epochs": 10}
IN_BATCHES = (bn(), iter_norm(), dbn(16))
FIVE = (bn(), iter_norm(), dbn(16), gn(16), gw(16))
VARIANTS = (iter_norm(iterations=3), iter_norm(iterations=7), iter_norm(16), iter_norm(0), gw(8), gw(32))
SMALL_VARIANTS = (dbn(0), *map(iter_norm, (8, 16, 0)), *(iter_norm(iterations=t) for t in (1, 3, 7, 9)))
NARROW_FIVE = (*IN_BATCHES, gn(8), gw(8))  # for networks that have too few channels for 16 groups
SIZES = {
    "tiny": Size(  # a quick trial of everything
        TINY | {"shift": 1, "warmup": 0.5, "recomputed_over": 128},
        64,
        NARROW_FIVE,
        VARIANTS[:2],
        others=NARROW_FIVE,
        batch_sizes=(32,),
    ),
    "small": Size(SMALL, 64, IN_BATCHES, SMALL_VARIANTS, True, IN_BATCHES, (16, 256), True, True),
    "cpu": Size(
        ALL_PICTURES | {"width": 16, "epochs": 5},
        256,
        NARROW_FIVE,
        (iter_norm(iterations=7), iter_norm(iterations=3), dbn(0)),
        True,
        others=IN_BATCHES,
        batch_sizes=(16,),
        high_lr=True,
        others_have_all_seeds=True,
    ),
    "gpu": Size(GPU, 256, FIVE, VARIANTS),
    "large": Size(GPU, 256, FIVE, (*VARIANTS, dbn(0)), True, FIVE, (64, 1024, 16), True),
}


def plan(size: str, seeds: int) -> list[list[FitSettings]]:
    """Return the settings of all runs, a list for each seed of the main comparison and then the others."""
    plan = SIZES[size]

    def settings(norm: Norm, seed: int, batch_size: int = plan.batch_size, factor: int = 1) -> FitSettings:
        lr = scaled_lr(batch_size, factor)
        return FitSettings(**vars(norm), **plan.fixed, batch_size=batch_size, lr=lr, seed=seed)

    of_variants = range(seeds if plan.variants_have_all_seeds else 1)
    seeds_of_others = range(seeds if plan.others_have_all_seeds else 1)
    others = [(norm, seed) for seed in seeds_of_others for norm in plan.others]
    rounds = [[settings(norm, seed) for norm in plan.compared] for seed in range(seeds)]
    rounds.append([settings(norm, seed) for seed in of_variants for norm in plan.variants])
    if plan.high_lr:
        rounds.append([settings(norm, seed, factor=HIGH_LR) for norm, seed in others])
    for batch_size in plan.batch_sizes:
        rounds.append([settings(norm, seed, batch_size) for norm, seed in others])
    return rounds


EXPERIMENT = Experiment(
    "training",
    "BN, DBN, IterNorm, GN and GW in a VGG-style network.",
    FitSettings,
    Fit,
    plan,
    fit,
    sizes=("tiny", "small", "cpu", "gpu", "large"),
    seeds={},
)
