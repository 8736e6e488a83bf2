"""Train the demo's network in PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polywhiten.cli.demo.data import Data
from polywhiten.cli.demo.training import (
    DBN_GROUP_SIZE,
    MOMENTUM,
    NUM_GROUPS,
    Epoch,
    Settings,
    batches,
    convolutions,
    learning_rate,
    steps_per_epoch,
)
from polywhiten.torch.modules import GroupWhitening, IterNorm

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "gn": lambda channels: nn.GroupNorm(NUM_GROUPS, channels),
    "iternorm": IterNorm,
    "gw": lambda channels: GroupWhitening(NUM_GROUPS, channels),
    "dbn": lambda channels: IterNorm(channels, method="eigh", group_size=DBN_GROUP_SIZE, track="covariance"),
}

TITLE = "PyTorch"
SHOWS_PROGRESS = False

TEST_BATCH = 500


def check_device(device: str) -> None:
    """Raise ValueError, with a message of one line, if PyTorch can't compute on the device."""
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:  # the latter if PyTorch was built without CUDA
        reason = str(error).splitlines()[0]
        usable = ["cpu"]
        if torch.accelerator.is_available():
            usable.append(str(torch.accelerator.current_accelerator()))
        raise ValueError(f"PyTorch can't compute on {device!r} ({reason}): use {' or '.join(usable)}") from error


def network(norm: str, data: Data, seed: int) -> nn.Sequential:
    """Return convolutions, each followed by a norm and ReLU, then the mean over the map and a linear layer."""
    layers: list[nn.Module] = []
    _, height, width, channels = data.x_train.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for outputs, halve in convolutions(height, width):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), LAYERS[norm](outputs), nn.ReLU()]
            if halve:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, data.classes))


def train(norm: str, data: Data, settings: Settings, step_done: Callable[[], None]) -> Iterator[Epoch]:
    """Train with stochastic gradient descent; see `polywhiten.cli.demo.training.Framework.train`."""
    device = torch.device(settings.device)
    x_train, x_test = (_pictures(x).to(device) for x in (data.x_train, data.x_test))
    y_train, y_test = (torch.from_numpy(y).to(device) for y in (data.y_train, data.y_test))
    model = network(norm, data, settings.seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=MOMENTUM)
    steps = settings.epochs * steps_per_epoch(data, settings)
    step = 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        losses, seconds = [], []
        for batch in batches(data, settings, epoch):
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = learning_rate(settings, step / steps)
            chosen = torch.from_numpy(batch).to(device)
            loss = cross_entropy(model(x_train[chosen]), y_train[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # waits for the device, so that the time is that of the complete step
            seconds.append(time.perf_counter() - start)
            step += 1
            step_done()
            if not math.isfinite(losses[-1]):
                break
        test_loss, accuracy = _test(model, x_test, y_test)
        result = Epoch(norm, epoch, fmean(losses), test_loss, accuracy, 1000 * median(seconds))
        yield result
        if result.diverged:
            return


@torch.no_grad()
def _test(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    scores = torch.cat([model(part) for part in x.split(TEST_BATCH)])
    return cross_entropy(scores, y).item(), (scores.argmax(1) == y).float().mean().item()


def _pictures(x: object) -> Tensor:
    """Return pictures (N, H, W, C) as a tensor (N, C, H, W), which is channels-last in memory, without a copy."""
    return torch.from_numpy(x).permute(0, 3, 1, 2)
