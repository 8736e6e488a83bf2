"""CIFAR-10, from a file, in part and at a lower resolution; the data's checks are the demo's."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from polywhiten.cli.demo.data import Data, load_npz


@dataclass(frozen=True)
class Pictures:
    """Standardized pictures (N, 3, side, side), channels last in memory, and their classes."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


class Source:
    """The pictures of a file, read when they are first needed."""

    def __init__(self, path: Path | None, device: str) -> None:
        self._path, self._device = path, device
        self._read = lru_cache(maxsize=1)(load_npz)
        self.pictures = lru_cache(maxsize=2)(self._pictures)

    def _pictures(self, side: int, train: int, test: int) -> Pictures:
        """The first ones of each part, averaged over squares of positions to `side` x `side`."""
        if self._path is None:
            raise ValueError("pictures are needed: say by --data where they are")
        data: Data = self._read(self._path)
        parts = []
        for x, y, count in ((data.x_train, data.y_train, train), (data.x_test, data.y_test, test)):
            if count > len(x) or x.shape[1] % side or x.shape[1] != x.shape[2] or x.shape[3] != 3:
                raise ValueError(f"{self._path} has {x.shape}: {count} square colour pictures of n x {side} are needed")
            given = torch.from_numpy(x[:count]).to(self._device).permute(0, 3, 1, 2)
            small = avg_pool2d(given, x.shape[1] // side).contiguous(memory_format=torch.channels_last)
            parts += [small, torch.from_numpy(y[:count]).to(self._device)]
        return Pictures(*parts, classes=data.classes)
