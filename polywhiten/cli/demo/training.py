"""What all frameworks train alike: the network's shape, the batches, the learning rate, and the results of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from polywhiten.cli.demo.data import Data

# The names that users type, and those in tables and pictures.
NORMS = {"bn": "BN", "gn": "GN", "iternorm": "IterNorm", "gw": "GW", "dbn": "DBN"}
OTHER_NORMS = {"bn", "gn"}  # the framework's own layers

WIDTHS = (32, 32, 64, 64)
NUM_GROUPS = 16  # of group normalization and group whitening
DBN_GROUP_SIZE = 16  # as in the paper on decorrelated batch normalization
MOMENTUM = 0.9


@dataclass(frozen=True)
class Settings:
    """The options of training, which all networks share."""

    epochs: int
    batch_size: int
    lr: float
    seed: int
    device: str


class Epoch(NamedTuple):
    """The results of an epoch; the fields are the columns of the CSV file."""

    norm: str
    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    ms_per_step: float

    @property
    def diverged(self) -> bool:
        return not (math.isfinite(self.train_loss) and math.isfinite(self.test_loss))


class Framework(Protocol):
    """A module that trains in a framework.

    Attributes
    ----------
    TITLE : str
        The framework's name, for users.
    SHOWS_PROGRESS : bool
        Whether `train` itself shows its progress on a terminal.
    """

    TITLE: str
    SHOWS_PROGRESS: bool

    def check_device(self, device: str) -> None:
        """Raise ValueError, with a message of one line, if the framework can't compute on the device."""

    def train(self, norm: str, data: Data, settings: Settings, step_done: Callable[[], None]) -> Iterator[Epoch]:
        """Train the network with one norm, and yield an `Epoch` after each epoch until one diverges.

        Call `step_done` after each step. For one seed, every norm starts from the same weights.
        """


def convolutions(height: int, width: int) -> list[tuple[int, bool]]:
    """Return the output channels of each 3 x 3 convolution, and whether its maps, of 8 x 8 or more, are halved."""
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
    """Return the indices of an epoch's batches of equal size; every epoch leaves out other pictures."""
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(data.x_train))
    steps = steps_per_epoch(data, settings)
    return list(order[: steps * settings.batch_size].reshape(steps, settings.batch_size))


def learning_rate(settings: Settings, progress: float) -> float:
    """Return half a cosine from `lr` to 0, at `progress` from 0 to 1."""
    return settings.lr * (1 + math.cos(math.pi * progress)) / 2
