"""Trains a network on images, and gives the loss and the accuracies of every epoch as a row."""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polywhiten.cli.demo.training import MOMENTUM, Settings, batches, learning_rate
from study import checkpoints
from study.averages import CovarianceAverages, has_averages, recomputed
from study.networks import mlp, resnet, vgg
from study.norms import Norm, converted, layer
from study.runs import Place, Progress, Run

LR, LR_BATCH = 0.05, 64  # for all networks; the rate is proportional to the batch, because larger ones make fewer steps
TEST_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class FitSettings(Norm):
    """The network, its data and its training."""

    network: str  # mlp, vgg or resnet
    width: int
    depth: int  # hidden layers of mlp, convolutions of vgg, blocks per stage of resnet
    side: int  # height and width of an image
    pictures: int
    test_pictures: int
    batch_size: int
    lr: float  # the highest one; it falls to 0 along half a cosine
    epochs: int
    seed: int  # of the initial weights and the batches
    where: str = "all"  # the layers of resnet that have the norm, in place of batch normalization: all, first or middle
    shift: int = 0  # pixels by which training pictures are shifted at most; they are flipped too unless it is 0
    warmup: float = 0.0  # epochs in which the learning rate grows from 0
    recomputed_over: int = 0  # pictures that statistics are computed again for after each epoch; 0 compares no averages


@dataclass(frozen=True, kw_only=True)
class Fit(FitSettings, Run):
    """The results by epoch. For a run that diverged, they end with the epoch in which it did."""

    train_losses: tuple[float, ...]  # mean over an epoch's steps
    train_accuracies: tuple[float, ...]  # over the same steps
    test_accuracies: tuple[float, ...]  # by the running averages of the network's own layers
    covariance_accuracies: tuple[float, ...] = ()  # by running averages of covariances, where whiteners are averaged
    recomputed_accuracies: tuple[float, ...] = ()  # by statistics that were computed again
    ms_per_step: float  # median over the epochs

    @property
    def diverged(self) -> bool:
        return not all(map(math.isfinite, self.train_losses))

    @property
    def finished(self) -> bool:
        return self.diverged or len(self.train_losses) == self.epochs


class Epoch(NamedTuple):
    """The results of an epoch; None stands for what wasn't measured."""

    train_loss: float
    train_accuracy: float
    test_accuracy: float
    covariance_accuracy: float | None
    recomputed_accuracy: float | None
    ms_per_step: float
    seconds: float


def scaled_lr(batch_size: int, factor: float = 1) -> float:
    return factor * LR * batch_size / LR_BATCH


def network(settings: FitSettings, classes: int) -> nn.Module:
    """Return the network, whose initial weights depend on the seed but not on the norm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.network == "resnet":
            return converted(resnet(settings.width, settings.depth, classes), settings, settings.where)
        layers = partial(layer, settings, dimensions=2 if settings.network == "mlp" else 4)
        if settings.network == "mlp":
            return mlp(layers, 3 * settings.side**2, settings.width, settings.depth, classes)
        return vgg(layers, settings.width, settings.depth, classes)


def fit(settings: FitSettings, place: Place) -> Iterator[Progress]:
    """Train, and yield the results after each epoch. A run that has a checkpoint continues there."""
    for epochs in Training(settings, place).run(place.checkpoint(settings)):
        yield len(epochs) / settings.epochs, results(epochs)


def results(epochs: list[Epoch]) -> dict[str, Any]:
    """Return the fields of `Fit` after its settings."""
    columns = {
        "train_losses": [epoch.train_loss for epoch in epochs],
        "train_accuracies": [epoch.train_accuracy for epoch in epochs],
        "test_accuracies": [epoch.test_accuracy for epoch in epochs],
        "covariance_accuracies": [e.covariance_accuracy for e in epochs if e.covariance_accuracy is not None],
        "recomputed_accuracies": [e.recomputed_accuracy for e in epochs if e.recomputed_accuracy is not None],
    }
    rounded = {name: tuple(float(f"{value:.6g}") for value in column) for name, column in columns.items()}
    ms = round(median(epoch.ms_per_step for epoch in epochs), 4)
    return rounded | {"ms_per_step": ms, "seconds": round(sum(epoch.seconds for epoch in epochs), 3)}


class Training:
    """A network in training by stochastic gradient descent.

    All that is random in an epoch depends on the seed and the epoch alone, so a run that was interrupted continues as
    if it hadn't been.
    """

    def __init__(self, settings: FitSettings, place: Place) -> None:
        self._settings, self._device = settings, place.device
        self._data = place.source.pictures(settings.side, settings.pictures, settings.test_pictures)
        self._plan = Settings(settings.epochs, settings.batch_size, settings.lr, settings.seed, place.device)
        self.model = network(settings, self._data.classes).to(place.device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=settings.lr, momentum=MOMENTUM)
        compared = self.model if settings.recomputed_over else nn.Module()
        self._covariances = CovarianceAverages(compared).to(place.device)

    def run(self, checkpoint: Path | None) -> Iterator[list[Epoch]]:
        """Train until the end or until a loss isn't finite, and yield the epochs so far after each one."""
        epochs = self._continue(checkpoint)
        if epochs:
            yield epochs
        while len(epochs) < self._settings.epochs and (not epochs or math.isfinite(epochs[-1].train_loss)):
            epochs.append(self._epoch(len(epochs)))
            checkpoints.save(checkpoint, self._state | {"epochs": [tuple(epoch) for epoch in epochs]})
            yield epochs

    @property
    def _state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self._optimizer, "covariances": self._covariances}
        return {name: part.state_dict() for name, part in parts.items()}

    def _continue(self, checkpoint: Path | None) -> list[Epoch]:
        state = checkpoints.load(checkpoint, self._device)
        if state is None:
            return []
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._covariances.load_state_dict(state["covariances"])
        return [Epoch(*epoch) for epoch in state["epochs"]]

    def _epoch(self, number: int) -> Epoch:
        start = time.perf_counter()
        loss, accuracy, ms = self._train(number)
        evaluate = math.isfinite(loss)
        own = self._accuracy() if evaluate else math.nan
        by_covariance = by_recomputed = None
        if evaluate and self._covariances:
            with self._covariances.evaluating():
                by_covariance = self._accuracy()
        if evaluate and self._settings.recomputed_over and has_averages(self.model):
            with recomputed(self.model, self._first_batches(number)):
                by_recomputed = self._accuracy()
        return Epoch(loss, accuracy, own, by_covariance, by_recomputed, ms, time.perf_counter() - start)

    def _train(self, number: int) -> tuple[float, float, float]:
        """Return the mean loss of the steps of an epoch, their accuracy, and the milliseconds of a step."""
        chosen = torch.from_numpy(np.stack(batches(self._data, self._plan, number + 1))).to(self._device)
        moves = self._moves(number, chosen.shape)
        self.model.train()
        losses, right = torch.empty(len(chosen), device=self._device), torch.zeros((), device=self._device)
        start = time.perf_counter()
        with self._covariances.following() if self._covariances else nullcontext():
            for step, batch in enumerate(chosen):
                self._optimizer.param_groups[0]["lr"] = self._rate(number + step / len(chosen))
                classes = self._data.y_train[batch]
                scores = self.model(self._pictures(batch, None if moves is None else moves[step]))
                loss = cross_entropy(scores, classes)
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                losses[step] = loss.detach()
                right += (scores.detach().argmax(1) == classes).sum()
        accuracy = right.item() / chosen.numel()  # waits for the device
        return losses.mean().item(), accuracy, 1000 * (time.perf_counter() - start) / len(chosen)

    def _rate(self, epochs: float) -> float:
        """Return the learning rate after a number of epochs."""
        warmup = self._settings.warmup
        if epochs < warmup:
            return self._settings.lr * epochs / warmup
        return learning_rate(self._plan, (epochs - warmup) / (self._settings.epochs - warmup))

    def _moves(self, number: int, shape: torch.Size) -> Tensor | None:
        """Return shifts and flips for all pictures of an epoch, or None if they aren't augmented."""
        shift = self._settings.shift
        if not shift:
            return None
        random = np.random.default_rng((self._settings.seed, number, 1))  # 1: batches has the others
        moves = random.integers([2 * shift + 1, 2 * shift + 1, 2], size=(*shape, 3))
        return torch.from_numpy(moves).to(self._device)

    def _pictures(self, batch: Tensor, moves: Tensor | None) -> Tensor:
        if moves is None:
            return self._data.standardized(self._data.x_train[batch])
        return self._data.augmented(batch, moves, self._settings.shift)

    def _first_batches(self, number: int) -> Iterator[Tensor]:
        """Yield the pictures that statistics are computed again for, augmented as in training."""
        size = self._settings.batch_size
        chosen = torch.arange(self._settings.recomputed_over // size * size, device=self._device).reshape(-1, size)
        moves = self._moves(number, chosen.shape)
        for step, batch in enumerate(chosen):
            yield self._pictures(batch, None if moves is None else moves[step])

    @torch.no_grad()
    def _accuracy(self) -> float:
        self.model.eval()
        parts = self._data.x_test.split(TEST_BATCH)
        scores = torch.cat([self.model(self._data.standardized(part)) for part in parts])
        return (scores.argmax(1) == self._data.y_test).float().mean().item()
