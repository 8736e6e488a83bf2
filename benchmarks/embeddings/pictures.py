"""Pictures as vectors: scikit-learn's digits, and CIFAR-10 from a file at a lower resolution."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit

SIDE = 8  # pixels of a CIFAR-10 picture's side after averaging: 192 dimensions
TRAIN, TEST = 3000, 2000  # pictures of each split of CIFAR-10
SPLITS = 5


@dataclass(frozen=True)
class Split:
    """Vectors and classes to fit on, and to test on."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def splits_of(x: np.ndarray, y: np.ndarray) -> Iterator[Split]:
    """Yield random splits of labelled vectors, in which every fifth one is for the test."""
    for train, test in StratifiedShuffleSplit(SPLITS, test_size=0.2, random_state=0).split(x, y):
        yield Split(x[train], y[train], x[test], y[test])


def digits() -> Iterator[Split]:
    x, y = load_digits(return_X_y=True)
    return splits_of((x / 16).astype(np.float32), y)


def cifar(path: Path) -> Iterator[Split]:
    """Yield random parts of the training pictures, each with a random part of the test pictures."""
    with np.load(path) as file:
        x_train, x_test = (_reduced(file[name]) for name in ("x_train", "x_test"))
        y_train, y_test = (file[name].ravel() for name in ("y_train", "y_test"))
    for seed in range(SPLITS):
        rng = np.random.default_rng(seed)
        train, test = rng.permutation(len(x_train))[:TRAIN], rng.permutation(len(x_test))[:TEST]
        yield Split(x_train[train], y_train[train], x_test[test], y_test[test])


def _reduced(pictures: np.ndarray) -> np.ndarray:
    """Return pictures (N, side, side, 3) as float32 (N, SIDE * SIDE * 3), averaged over squares of pixels."""
    count, side, width, channels = pictures.shape
    if side != width or side % SIDE or channels != 3:
        raise ValueError(f"pictures of shape {pictures.shape}: square colour ones with a multiple of {SIDE} are needed")
    squares = pictures.reshape(count, SIDE, side // SIDE, SIDE, side // SIDE, channels)
    return (squares.mean((2, 4), dtype=np.float32) / 255).reshape(count, -1)
