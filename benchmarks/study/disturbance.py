"""Experiment 1: how stochastic normalization disturbance (SND) depends on batch size and group size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from polywhiten.analysis import sample_batches, stochastic_normalization_disturbance
from study.norms import Norm, bn, dbn, gn, gw, iter_norm, layer
from study.pictures import Source
from study.runs import Experiment, Run

GAUSSIAN, PICTURES = "gaussian", "pictures"
DATA_LABELS = {GAUSSIAN: "Gaussian data", PICTURES: "images"}
SIZES = {
    "tiny": {"dimension": 64, "data_size": 128, "samples": 2, "batches": 2},  # a quick trial
    "small": {"dimension": 512, "data_size": 10_000, "samples": 10, "batches": 10},
    "large": {"dimension": 512, "data_size": 10_000, "samples": 50, "batches": 50},
}
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NUM_GROUPS = 16
SIDE = 16


@dataclass(frozen=True, kw_only=True)
class DisturbanceSettings(Norm):
    """The data that are normalized, and how many batches of them are drawn."""

    data: str  # gaussian: independent features; pictures: outputs of a linear layer with its initial weights
    dimension: int
    data_size: int
    batch_size: int
    samples: int
    batches: int  # for each sample
    seed: int


@dataclass(frozen=True, kw_only=True)
class Disturbance(DisturbanceSettings, Run):
    """The disturbance, and its standard error over the samples."""

    value: float
    standard_error: float


def plan(size: str, seeds: int) -> list[DisturbanceSettings]:
    """Return the settings of all runs: every run of one seed comes before those of the next."""
    fixed = SIZES[size]
    norms = [bn(), gn(NUM_GROUPS), gw(NUM_GROUPS)]
    norms += [kind(d) for kind in (iter_norm, dbn) for d in GROUP_SIZES if d <= fixed["dimension"]]
    return [
        DisturbanceSettings(**vars(norm), **fixed, data=data, batch_size=batch_size, seed=seed)
        for seed in range(seeds)
        for data in (GAUSSIAN, PICTURES)
        for batch_size in BATCH_SIZES
        if batch_size <= fixed["data_size"]
        for norm in norms
    ]


def perform(
    settings: DisturbanceSettings, progress: Callable[[float], None], source: Source, device: str
) -> dict[str, Any]:
    """Measure the disturbance of one norm. The batches don't depend on the norm, only on the data, size and seed."""
    batches = sample_batches(
        features(settings.data, settings.dimension, settings.data_size, settings.seed, source, device),
        settings.batch_size,
        num_samples=settings.samples,
        num_batches=settings.batches,
        seed=settings.seed,
    )
    normalize = layer(settings, settings.dimension, dimensions=2).to(device)
    with torch.no_grad():
        found = stochastic_normalization_disturbance(normalize, batches)
    progress(1)
    return {"value": found.value, "standard_error": found.standard_error}


@lru_cache(maxsize=1)
def features(data: str, dimension: int, data_size: int, seed: int, source: Source, device: str) -> Tensor:
    """Return samples of shape (data_size, dimension), cached because consecutive runs of a plan use the same ones."""
    generator = torch.Generator().manual_seed(seed)
    if data == GAUSSIAN:
        return torch.randn(data_size, dimension, generator=generator).to(device)
    pictures = source.pictures(SIDE, data_size, 1).x_train.flatten(1)
    inputs = pictures.shape[1]
    weight = torch.randn(inputs, dimension, generator=generator) / inputs**0.5
    return pictures @ weight.to(device)


EXPERIMENT = Experiment(
    "disturbance",
    "Stochastic normalization disturbance, by batch and group size.",
    DisturbanceSettings,
    Disturbance,
    plan,
    perform,
)
