"""Trains a network on images, and gives the loss and the accuracies of every epoch as a row."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polywhiten.cli.demo.training import MOMENTUM, Settings, batches, learning_rate
from study.networks import mlp, resnet, vgg
from study.norms import Norm, layer
from study.pictures import Pictures, Source
from study.runs import Run

LR, LR_BATCH = 0.05, 64  # for all networks; the rate is proportional to the batch, because larger ones make fewer steps
TEST_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class FitSettings(Norm):
    """The network, its data and its training."""

    network: str  # mlp, vgg or resnet
    width: int
    depth: int  # hidden layers of mlp, blocks per stage of resnet
    side: int  # height and width of an image
    pictures: int
    test_pictures: int
    batch_size: int
    lr: float  # at the start; it falls to 0 along half a cosine
    epochs: int
    seed: int  # of the initial weights and the batches


@dataclass(frozen=True, kw_only=True)
class Fit(FitSettings, Run):
    """The results by epoch. For a run that diverged, they end with the epoch in which it did."""

    train_losses: tuple[float, ...]  # mean over an epoch's steps
    train_accuracies: tuple[float, ...]  # over the same steps
    test_accuracies: tuple[float, ...]
    ms_per_step: float  # median over the epochs

    @property
    def diverged(self) -> bool:
        return not all(map(math.isfinite, self.train_losses))


def scaled_lr(batch_size: int, factor: float = 1) -> float:
    return factor * LR * batch_size / LR_BATCH


def network(settings: FitSettings, classes: int) -> nn.Module:
    """Return the network, whose initial weights depend on the seed but not on the norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers = partial(layer, settings, dimensions=2 if settings.network == "mlp" else 4)
        if settings.network == "mlp":
            return mlp(layers, 3 * settings.side**2, settings.width, settings.depth, classes)
        if settings.network == "vgg":
            return vgg(layers, settings.width, classes)
        return resnet(layers, settings.width, settings.depth, classes)


def fit(settings: FitSettings, progress: Callable[[float], None], source: Source, device: str) -> dict[str, Any]:
    """Train with stochastic gradient descent, until the end or until a loss isn't finite, and return the results."""
    data = source.pictures(settings.side, settings.pictures, settings.test_pictures)
    model = network(settings, data.classes).to(device, memory_format=torch.channels_last)
    epochs = []
    for losses, accuracy, ms in trained(model, data, settings, device):
        loss = losses.mean().item()
        epochs.append((loss, accuracy, _accuracy(model, data) if math.isfinite(loss) else math.nan, ms))
        progress(len(epochs) / settings.epochs)
    found = [tuple(float(f"{value:.6g}") for value in column) for column in zip(*epochs, strict=True)]
    names = "train_losses", "train_accuracies", "test_accuracies"
    return dict(zip(names, found[:3], strict=True)) | {"ms_per_step": sorted(found[3])[len(epochs) // 2]}


def trained(
    model: nn.Module, data: Pictures, settings: FitSettings, device: str
) -> Iterator[tuple[Tensor, float, float]]:
    """Train, and yield after each epoch the losses of its steps, their accuracy, and the milliseconds per step."""
    plan = Settings(settings.epochs, settings.batch_size, settings.lr, settings.seed, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=MOMENTUM)
    for epoch in range(settings.epochs):
        chosen = torch.from_numpy(np.stack(batches(data, plan, epoch + 1))).to(device)
        model.train()
        losses, right = torch.empty(len(chosen), device=device), torch.zeros((), device=device)
        start = time.perf_counter()
        for step, batch in enumerate(chosen):
            optimizer.param_groups[0]["lr"] = learning_rate(plan, (epoch + step / len(chosen)) / settings.epochs)
            scores, classes = model(data.x_train[batch]), data.y_train[batch]
            loss = cross_entropy(scores, classes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            right += (scores.detach().argmax(1) == classes).sum()
        accuracy = right.item() / chosen.numel()  # waits for the device
        yield losses, accuracy, 1000 * (time.perf_counter() - start) / len(chosen)
        if not torch.isfinite(losses).all():
            return


@torch.no_grad()
def _accuracy(model: nn.Module, data: Pictures) -> float:
    model.eval()
    scores = torch.cat([model(part) for part in data.x_test.split(TEST_BATCH)])
    return (scores.argmax(1) == data.y_test).float().mean().item()
