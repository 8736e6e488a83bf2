"""Keeps pictures of CIFAR-10 on the device, and makes batches of them there, with or without augmentation."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from polywhiten.cli.demo.data import DataError, read_npz


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, side, side, 3) from 0 to 255, as uint8 at their full size, and their classes.

    Batches are float32 (N, 3, side, side) with channels last in memory. Each channel is standardized by its mean and
    deviation over all training pictures of the file.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    mean: Tensor
    deviation: Tensor

    def standardized(self, pictures: Tensor) -> Tensor:
        return ((pictures.float() - self.mean) / self.deviation).permute(0, 3, 1, 2)

    def augmented(self, batch: Tensor, moves: Tensor, shift: int) -> Tensor:
        """Return training pictures that are shifted and flipped on the device.

        `moves` (N, 3) has the rows and the columns of each picture's shift, from 0 to twice `shift`, and 1 where it is
        flipped. Pixels from outside are black.
        """
        side = self.x_train.shape[1]
        places = torch.arange(side, device=batch.device)
        row, column, flipped = moves.T[..., None]
        rows = places + row - shift
        columns = torch.where(flipped == 1, side - 1 - places, places) + column - shift
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
        rows, columns = rows.clamp(0, side - 1), columns.clamp(0, side - 1)
        taken = self.x_train[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
        return self.standardized(taken * inside[..., None])


class Source:
    """The pictures of a file, which is read when they are first needed."""

    def __init__(self, path: Path | None, device: str) -> None:
        self._path, self._device = path, device
        self._read = lru_cache(maxsize=1)(read_npz)
        self.pictures = lru_cache(maxsize=3)(self._pictures)

    def __reduce__(self) -> tuple[type, tuple[Path | None, str]]:
        return Source, (self._path, self._device)  # another process reads the file itself

    def _pictures(self, side: int, train: int, test: int) -> Pictures:
        """Return the first pictures of each part, averaged over squares of pixels to `side` x `side`."""
        if self._path is None:
            raise DataError("this experiment needs images: give their file with --data")
        x_train, y_train, x_test, y_test = self._read(self._path)
        parts = []
        for x, y, count in ((x_train, y_train, train), (x_test, y_test, test)):
            if x.dtype != np.uint8:
                raise DataError(f"{self._path} has images of dtype {x.dtype}, but the experiment needs uint8")
            if count > len(x) or x.shape[1] % side or x.shape[1] != x.shape[2] or x.shape[3:] != (3,):
                raise DataError(
                    f"{self._path} has images of shape {x.shape}, but the experiment needs "
                    f"{count} square colour images, whose sides are a multiple of {side}"
                )
            images = torch.from_numpy(x[:count]).to(self._device)
            parts += [images if x.shape[1] == side else smaller(images, side)]
            parts += [torch.from_numpy(y[:count].reshape(-1).astype(np.int64)).to(self._device)]
        mean, deviation = (
            torch.tensor(np.array(values), dtype=torch.float32, device=self._device) for values in moments(x_train)
        )
        return Pictures(*parts, classes=int(y_train.max()) + 1, mean=mean, deviation=deviation)


def smaller(images: Tensor, side: int) -> Tensor:
    """Return images averaged over squares of pixels to `side` x `side`, in float32."""
    channels_first = images.permute(0, 3, 1, 2).float()
    return avg_pool2d(channels_first, images.shape[1] // side).permute(0, 2, 3, 1).contiguous()


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each channel's mean and deviation, from how often it has each of the 256 values."""
    values = np.arange(256)
    counts = np.stack([np.bincount(x[..., channel].reshape(-1), minlength=256) for channel in range(x.shape[-1])])
    mean = counts @ values / counts[0].sum()
    variance = counts @ values**2 / counts[0].sum() - mean**2
    return mean, np.sqrt(np.maximum(variance, 1))
