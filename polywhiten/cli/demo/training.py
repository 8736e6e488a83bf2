"""What is trained, whichever framework trains it: the network's shape, the batches, and what an epoch reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from polywhiten.cli.demo.data import Data

# As users type them, and as tables and pictures show them.
NORMS = {"bn": "BN", "gn": "GN", "iternorm": "IterNorm", "gw": "GW", "dbn": "DBN"}

WIDTHS = (32, 32, 64, 64)
NUM_GROUPS = 16  # of GN and GW
DBN_GROUP_SIZE = 16  # as in the paper of DBN
MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """How each network is trained."""

    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: str


class Epoch(NamedTuple):
    """What an epoch gave; its fields are the columns of the CSV file."""

    norm: str
    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    ms_per_step: float

    @property
    def diverged(self) -> bool:
        return not (math.isfinite(self.train_loss) and math.isfinite(self.test_loss))


class Trainer(Protocol):
    """Trains the network with one norm: yields one `Epoch` after each, the last one if it diverged.

    It calls `step_done` after each step. For one seed, every norm starts from the same weights.
    """

    def __call__(self, norm: str, data: Data, settings: Settings, step_done: Callable[[], None]) -> Iterator[Epoch]: ...


class Framework(Protocol):
    """A module that trains in a framework.

    Attributes
    ----------
    TITLE : str
        The framework, as users know it.
    SHOWS_PROGRESS : bool
        Whether `train` itself shows on a terminal how far it is.
    train : Trainer
    """

    TITLE: str
    SHOWS_PROGRESS: bool
    train: Trainer

    def check_device(self, device: str) -> None:
        """ValueError, in one line, where the framework can't compute on `device`."""


def convolutions(height: int, width: int) -> list[tuple[int, bool]]:
    """Of each 3 x 3 convolution: its output channels, and whether maps are halved after it, as 8 x 8 and larger are."""
    layers = []
    for channels in WIDTHS:
        halve = min(height, width) >= 8
        layers.append((channels, halve))
        if halve:
            height, width = height // 2, width // 2
    return layers


def steps_per_epoch(data: Data, settings: Settings) -> int:
    return len(data.x_train) // settings.batch_size


def batches(data: Data, settings: Settings, epoch: int) -> list[NDArray[np.int64]]:
    """Indices of an epoch's batches, of equal size: the pictures that are left over are others in every epoch."""
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(data.x_train))
    steps = steps_per_epoch(data, settings)
    return list(order[: steps * settings.batch_size].reshape(steps, settings.batch_size))


def learning_rate(settings: Settings, progress: float) -> float:
    """Half a cosine from `lr` to 0, at `progress` from 0 to 1."""
    return settings.lr * (1 + math.cos(math.pi * progress)) / 2
