"""Experiment 7: one network evaluated by several statistics after each epoch, at the small scale.

The larger runs of `training` and `resnet` make the same comparison by themselves.
"""

from study import training
from study.fitting import Fit, FitSettings, fit, scaled_lr
from study.norms import bn, dbn, iter_norm
from study.runs import Experiment

RECOMPUTED_OVER = {"tiny": 128, "small": 2000}
RATES = (1, training.HIGH_LR)  # weights move faster at the higher one


def plan(size: str, seeds: int) -> list[list[FitSettings]]:
    """Return the settings of all runs, a list for each seed."""
    plan = training.SIZES[size]
    fixed = plan.fixed | {"batch_size": plan.batch_size, "recomputed_over": RECOMPUTED_OVER[size]}

    def settings(factor: int, seed: int) -> list[FitSettings]:
        lr = scaled_lr(plan.batch_size, factor)
        return [FitSettings(**vars(norm), **fixed, lr=lr, seed=seed) for norm in (iter_norm(), bn(), dbn(16))]

    return [[each for factor in RATES for each in settings(factor, seed)] for seed in range(seeds)]


EXPERIMENT = Experiment(
    "evaluation",
    "One network evaluated by several statistics.",
    FitSettings,
    Fit,
    plan,
    fit,
    sizes=("tiny", "small"),
    seeds={},
)
