"""Experiment 6: the time and the memory of a training step of the other experiments' networks, on an idle device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.utils.benchmark import Timer

from polywhiten.cli.demo.training import MOMENTUM
from study import resnet, training
from study.fitting import FitSettings, network
from study.norms import Norm
from study.runs import Experiment, Place, Progress, Run

CLASSES = 10
WARM_STEPS = 3
SECONDS = {"tiny": 0.01}  # of measurement; 1 for the others


@dataclass(frozen=True, kw_only=True)
class StepSettings(Norm):
    """The network, and how long its steps are measured."""

    network: str
    width: int
    depth: int
    where: str
    side: int
    batch_size: int
    measured_seconds: float


@dataclass(frozen=True, kw_only=True)
class Steps(StepSettings, Run):
    """What a step takes. The peak of memory is that of the whole network, with its batch and the optimizer's state."""

    median_ms: float
    iqr_ms: float  # between the quartiles
    peak_bytes: int | None  # None on a CPU


def plan(size: str, seeds: int) -> list[list[StepSettings]]:
    """Return the settings of all networks in the plans of `training` and `resnet`; seeds make no difference."""
    plans = [experiment.wanted(size, 1) for experiment in (training.EXPERIMENT, resnet.EXPERIMENT)]
    wanted = dict.fromkeys(step_settings(fit, SECONDS.get(size, 1.0)) for plan in plans for fit in plan)
    return [list(wanted)]


def step_settings(fit: FitSettings, measured_seconds: float) -> StepSettings:
    names = "norm", "group_size", "iterations", "num_groups", "network", "width", "depth", "where", "side", "batch_size"
    return StepSettings(**{name: getattr(fit, name) for name in names}, measured_seconds=measured_seconds)


def perform(settings: StepSettings, place: Place) -> Iterator[Progress]:
    """Measure steps on random pictures."""
    on_cuda = place.device == "cuda"
    before = torch.cuda.memory_allocated() if on_cuda else 0
    shape = settings.batch_size, 3, settings.side, settings.side
    x = torch.randn(shape, device=place.device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, shape[:1], device=place.device)
    model = network(trained_as(settings), CLASSES).to(place.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(WARM_STEPS):  # compiles kernels, and chooses convolutions
        step()
    peak = None
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    found = timer.blocked_autorange(min_run_time=settings.measured_seconds)
    median, iqr = (float(f"{1000 * seconds:.4g}") for seconds in (found.median, found.iqr))
    yield 1.0, {"median_ms": median, "iqr_ms": iqr, "peak_bytes": peak}


def trained_as(settings: StepSettings) -> FitSettings:
    """Return settings with this network, whose data and training don't matter."""
    own = {name: value for name, value in vars(settings).items() if name != "measured_seconds"}
    return FitSettings(**own, pictures=0, test_pictures=0, lr=0.0, epochs=1, seed=0)


EXPERIMENT = Experiment(
    "steps",
    "Time and peak memory of a training step, which nothing else may disturb.",
    StepSettings,
    Steps,
    plan,
    perform,
    sizes=("tiny", "cpu", "gpu", "large"),
    seeds={},
    needs_pictures=False,
)
