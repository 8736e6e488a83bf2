"""Experiment 1: how stochastic normalization disturbance (SND) depends on batch size, group size and T.

Small runs normalize independent Gaussian features, and outputs of a linear layer with its initial weights for images.
Runs on a GPU normalize what a trained network gives its norms, and Gaussian data of the same shape.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from polywhiten.analysis import sample_batches, stochastic_normalization_disturbance
from study import training
from study.averages import BATCH_NORMS
from study.fitting import Training, network
from study.norms import Norm, bn, dbn, gn, gw, iter_norm, layer
from study.runs import Experiment, Place, Progress, Run

GAUSSIAN, PICTURES, ACTIVATIONS = "gaussian", "pictures", "activations"
DATA_LABELS = {GAUSSIAN: "Gaussian data", PICTURES: "images", ACTIVATIONS: "activations"}
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NUM_GROUPS = 16
SIDE = 16
ITERATIONS = (3, 5, 7, 9)  # where all features are one group
ROWS, ROWS_TINY = {"dimension": 512, "data_size": 10_000}, {"dimension": 64, "data_size": 128}
FEW, MANY = {"samples": 10, "batches": 10}, {"samples": 50, "batches": 50}


@dataclass(frozen=True)
class Layers:
    """The norms of a trained network whose inputs are normalized, counted from 1."""

    network: str  # a size of the experiment `training`, whose first run with BN makes the network
    numbers: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    data_size: int


@dataclass(frozen=True)
class Size:
    """The runs of a size: `rows` of features in groups of all sizes, features in one group, and trained layers."""

    counts: dict[str, int]
    rows: dict[str, int] | None = None
    one_group_of: tuple[int, ...] = ()
    layers: Layers | None = None


SIZES = {
    "tiny": Size({"samples": 2, "batches": 2}, ROWS_TINY, (16, 64), Layers("tiny", (2,), (8, 32), 64)),
    "small": Size(FEW, ROWS, (16, 32, 64, 128, 256, 512)),
    "cpu": Size(FEW, None, (), Layers("cpu", (4, 6, 8), (4, 16, 64, 256, 1024), 2000)),
    "gpu": Size(FEW, None, (), Layers("gpu", (2, 8), (4, 16, 64, 256), 2000)),
    "large": Size(MANY, ROWS, (16, 32, 64, 128, 256, 512), Layers("gpu", (2, 4, 6, 8), (4, 16, 64, 256, 1024), 4000)),
}


@dataclass(frozen=True, kw_only=True)
class DisturbanceSettings(Norm):
    """The data that are normalized, and how many batches of them are drawn."""

    data: str  # gaussian: independent features; pictures: outputs of a linear layer with its initial weights; or
    dimension: int  # activations: inputs of a trained network's norm. The dimension is the number of channels.
    data_size: int
    batch_size: int
    samples: int
    batches: int  # for each sample
    seed: int
    network: str | None = None  # as in Layers; Gaussian data have the shape of the activations too
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class Disturbance(DisturbanceSettings, Run):
    """The disturbance divided by the number of elements, and its standard error over the samples."""

    value: float
    standard_error: float
    output_norm: float | None = None  # mean over the same outputs; rows of early versions don't have it


def plan(size: str, seeds: int) -> list[list[DisturbanceSettings]]:
    """Return the settings of all runs, a list for each seed."""
    runs = ((*of_rows(SIZES[size], seed), *of_layers(SIZES[size], seed)) for seed in range(seeds))
    return [list(dict.fromkeys(of_seed)) for of_seed in runs]


def of_rows(size: Size, seed: int) -> Iterator[DisturbanceSettings]:
    """Yield the runs on rows of features."""
    if size.rows is None:
        return
    norms = [bn(), gn(NUM_GROUPS), gw(NUM_GROUPS)]
    norms += [kind(d) for kind in (iter_norm, dbn) for d in GROUP_SIZES if d <= size.rows["dimension"]]
    for data in (GAUSSIAN, PICTURES):
        for batch_size in BATCH_SIZES:
            for norm in norms if batch_size <= size.rows["data_size"] else ():
                fixed = vars(norm) | size.rows | size.counts
                yield DisturbanceSettings(**fixed, data=data, batch_size=batch_size, seed=seed)
    data_size = size.rows["data_size"]
    for dimension in size.one_group_of:
        for norm in (bn(), dbn(0), *(iter_norm(0, t) for t in ITERATIONS)):
            fixed = vars(norm) | size.counts | {"dimension": dimension, "data_size": data_size}
            yield DisturbanceSettings(**fixed, data=GAUSSIAN, batch_size=min(1024, data_size), seed=seed)


def of_layers(size: Size, seed: int) -> Iterator[DisturbanceSettings]:
    """Yield the runs on a trained network's activations, and on Gaussian data beside them."""
    layers = size.layers
    if layers is None:
        return
    for number in layers.numbers:
        channels = norms_of(layers.network)[number - 1].num_features
        groups = [d for d in (16, 64) if d < channels]
        norms = [bn(), *map(iter_norm, (*groups, 0)), *(iter_norm(0, t) for t in (3, 7)), *map(dbn, (*groups, 0)[:2])]
        for data in (ACTIVATIONS, GAUSSIAN):
            for batch_size in layers.batch_sizes:
                for norm in norms:
                    fixed = vars(norm) | size.counts | {"dimension": channels, "data_size": layers.data_size}
                    yield DisturbanceSettings(
                        **fixed, data=data, batch_size=batch_size, seed=seed, network=layers.network, layer=number
                    )


def perform(settings: DisturbanceSettings, place: Place) -> Iterator[Progress]:
    """Measure the disturbance of one norm. The batches don't depend on the norm, only on the data, size and seed."""
    data = features(data_of(settings), place)
    batches = sample_batches(
        data,
        settings.batch_size,
        num_samples=settings.samples,
        num_batches=settings.batches,
        seed=settings.seed,
    )
    normalize = layer(settings, settings.dimension, dimensions=data.ndim).to(place.device)
    norms: list[float] = []

    def recorded(batch: Tensor) -> Tensor:
        y: Tensor = normalize(batch)
        norms.append(y[0].norm().item())
        return y

    with torch.no_grad():
        found = stochastic_normalization_disturbance(recorded, batches)
    mean = float(f"{sum(norms) / len(norms):.6g}")
    yield 1.0, {"value": found.value, "standard_error": found.standard_error, "output_norm": mean}


def data_of(settings: DisturbanceSettings) -> tuple[Any, ...]:
    """Return the settings that the data depend on."""
    return settings.data, settings.dimension, settings.data_size, settings.seed, settings.network, settings.layer


@lru_cache(maxsize=1)
def features(wanted: tuple[Any, ...], place: Place) -> Tensor:
    """Return samples (data_size, dimension, ...), cached because consecutive runs of a plan use the same ones."""
    data, dimension, data_size, seed, size, number = wanted
    generator = torch.Generator().manual_seed(seed)
    if data == ACTIVATIONS:
        return activations(size, number, data_size, place)
    if data == GAUSSIAN:
        return torch.randn((data_size, dimension, *positions_of(size, number)), generator=generator).to(place.device)
    source = place.source.pictures(SIDE, data_size, 1)
    pictures = source.standardized(source.x_train).flatten(1)
    inputs = pictures.shape[1]
    weight = torch.randn(inputs, dimension, generator=generator) / inputs**0.5
    return pictures @ weight.to(place.device)


def first_run(size: str) -> Any:
    """Return the settings of the run that makes the network: of `training`, with BN and the first seed."""
    return training.plan(size, 1)[0][0]


@lru_cache(maxsize=1)
def untrained(size: str) -> nn.Module:
    return network(first_run(size), 10)


def norms_of(size: str) -> list[Any]:
    return [part for part in untrained(size).modules() if isinstance(part, BATCH_NORMS)]


@lru_cache
def positions_of(size: str | None, number: int | None) -> tuple[int, ...]:
    """Return the height and width of what a norm of the network gets, or nothing for rows of features."""
    if size is None or number is None:
        return ()
    side = first_run(size).side
    return tuple(inputs_of(untrained(size), number, torch.zeros(1, 3, side, side)).shape[2:])


def outputs_of(settings: DisturbanceSettings) -> int:
    """Return the number of outputs of one sample."""
    return settings.dimension * math.prod(positions_of(settings.network, settings.layer))


def activations(size: str, number: int, count: int, place: Place) -> Tensor:
    """Return the inputs of a norm of the trained network for the first pictures."""
    settings = first_run(size)
    pictures = place.source.pictures(settings.side, settings.pictures, settings.test_pictures)
    parts = pictures.x_train[:count].split(100)
    model = trained(size, place)
    return torch.cat([inputs_of(model, number, pictures.standardized(part)) for part in parts])


@lru_cache(maxsize=1)
def trained(size: str, place: Place) -> nn.Module:
    """Return the trained network. Its checkpoint stays, because every process that measures it needs it."""
    settings = first_run(size)
    run = Training(settings, place)
    for _ in run.run(place.checkpoint(settings, name="network")):
        pass
    return run.model.eval()


@torch.no_grad()
def inputs_of(model: nn.Module, number: int, pictures: Tensor) -> Tensor:
    """Return what the norm of this number gets in evaluation."""
    found: list[Tensor] = []
    norm = [part for part in model.modules() if isinstance(part, BATCH_NORMS)][number - 1]
    handle = norm.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].contiguous()))
    try:
        model.eval()(pictures)
    finally:
        handle.remove()
    return found[0]


EXPERIMENT = Experiment(
    "disturbance",
    "Stochastic normalization disturbance, by batch size, group size and T.",
    DisturbanceSettings,
    Disturbance,
    plan,
    perform,
    sizes=("tiny", "small", "cpu", "gpu", "large"),
    seeds=dict.fromkeys(("tiny", "small", "cpu", "gpu", "large"), 1),  # enough, because each value has a standard error
    together=lambda settings: (settings.network, settings.seed, settings.network is None and settings),
)
