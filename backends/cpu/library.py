"""What the compiled kernels need to know of a library's arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from polywhiten._types import Array, Shape


class Strided(NamedTuple):
    """The shape of an array, and its strides in elements."""

    shape: Shape
    strides: Sequence[int]


class ArrayKey(NamedTuple):
    """What a plan depends on: an array's shape, its strides as the library has them, and its dtype."""

    shape: Shape
    strides: tuple[int, ...]
    dtype: Any


class Library(Protocol):
    """A library of arrays in the CPU's memory; its kernels have float32 and float64."""

    def __hash__(self) -> int: ...

    def can_read(self, x: Array, *others: Array | None) -> bool:
        """Return whether kernels may read all of these from memory, x not empty, the others in the dtype of x."""

    def can_convert(self, *arrays: Array | None) -> bool:
        """Return whether `converted` serves these arrays."""

    def key(self, array: Array) -> ArrayKey:
        """Return what a plan for this array depends on."""

    def strided(self, key: ArrayKey) -> Strided:
        """Return the shape, and the strides in elements."""

    def dtype_name(self, dtype: Any) -> str:
        """Return "float32" or "float64"."""

    def dense(self, array: Strided, shape: Shape) -> tuple[Strided, Strided]:
        """Return how a new array lies with its axes in memory in the order of this one's, and when reshaped.

        Where an array in that order can't be reshaped, it lies in C order.
        """

    def address(self, array: Array) -> int: ...

    def empty(self, shape: Shape, like: Array) -> Array:
        """Return a contiguous array in the dtype of `like`."""

    def empty_strided(self, array: Strided, like: Array) -> Array:
        """Return an array that lies so, in the dtype of `like`; it may be large."""

    def copied(self, array: Array, to: Array) -> Array:
        """Copy an array to another one of its shape, and return that."""

    def converted(self, array: Array, shape: Shape, like: Array) -> Array:
        """Return an array of as many elements as `shape`, contiguous and in the dtype of `like`."""

    def contiguous(self, array: Array) -> Array:
        """Return an array in C order."""

    def from_numpy(self, array: npt.NDArray[np.float64], like: Array) -> Array:
        """Return a NumPy array as one of this library, in the dtype of `like`."""

    def num_threads(self) -> int:
        """Return how many threads may work on one call."""


def check_shape(array: Array, shape: Shape) -> None:
    """Raise ValueError for statistics or values of channels of another shape than kernels would read."""
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"statistics or values of channels have shape {tuple(array.shape)}: they need {tuple(shape)}")
