"""Reads part of CIFAR-10 from a file at a lower resolution. The demo's code checks the file."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from polywhiten.cli.demo.data import Data, load_npz


@dataclass(frozen=True)
class Pictures:
    """Standardized images (N, 3, side, side), with channels last in memory, and their classes."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


class Source:
    """The images of a file, which is read when they are first needed."""

    def __init__(self, path: Path | None, device: str) -> None:
        self._path, self._device = path, device
        self._read = lru_cache(maxsize=1)(load_npz)
        self.pictures = lru_cache(maxsize=2)(self._pictures)

    def _pictures(self, side: int, train: int, test: int) -> Pictures:
        """Return the first images of each part, averaged over squares of pixels to `side` x `side`."""
        if self._path is None:
            raise ValueError("this experiment needs images: give their file with --data")
        data: Data = self._read(self._path)
        parts = []
        for x, y, count in ((data.x_train, data.y_train, train), (data.x_test, data.y_test, test)):
            if count > len(x) or x.shape[1] % side or x.shape[1] != x.shape[2] or x.shape[3] != 3:
                raise ValueError(
                    f"{self._path} has images of shape {x.shape}, but the experiment needs "
                    f"{count} square colour images, whose sides are a multiple of {side}"
                )
            images = torch.from_numpy(x[:count]).to(self._device).permute(0, 3, 1, 2)
            small = avg_pool2d(images, x.shape[1] // side).contiguous(memory_format=torch.channels_last)
            parts += [small, torch.from_numpy(y[:count]).to(self._device)]
        return Pictures(*parts, classes=data.classes)
