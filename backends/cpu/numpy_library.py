"""NumPy's arrays, as the compiled kernels see them."""

from __future__ import annotations

from typing import Any

import numpy as np

from polywhiten._types import Array, Shape
from polywhiten.cpu.library import ArrayKey, Strided, check_shape
from polywhiten.cpu.runtime.parallel import address, num_threads

_DTYPES = np.float32, np.float64


class NumPyLibrary:
    """What the compiled kernels need to know of NumPy's arrays, see `polywhiten.cpu.library.Library`."""

    def can_read(self, x: Array, *others: Array | None) -> bool:
        """Return whether arrays are NumPy's own, of one dtype that kernels are compiled for, and aligned."""
        dtype = x.dtype
        if x.size == 0 or dtype.type not in _DTYPES or not dtype.isnative:
            return False
        arrays = [x, *(array for array in others if array is not None)]
        return all(
            type(a) is np.ndarray
            and a.dtype == dtype
            and a.flags.aligned
            and not any(stride % dtype.itemsize for stride in a.strides)
            for a in arrays
        )

    def can_convert(self, *arrays: Array | None) -> bool:
        """Return True: NumPy converts any array."""
        return True

    def key(self, array: Array) -> ArrayKey:
        return ArrayKey(array.shape, array.strides, array.dtype)

    def strided(self, key: ArrayKey) -> Strided:
        return Strided(key.shape, [stride // key.dtype.itemsize for stride in key.strides])

    def dtype_name(self, dtype: Any) -> str:
        return str(dtype)

    def dense(self, array: Strided, shape: Shape) -> tuple[Strided, Strided]:
        view = np.lib.stride_tricks.as_strided(np.empty(1, "u1"), array.shape, array.strides)
        result = np.empty_like(view, order="K")
        reshaped = result.reshape(shape)
        if not np.may_share_memory(reshaped, result):  # can't be reshaped in this order without a copy
            result = np.empty(array.shape, view.dtype)
            reshaped = result.reshape(shape)
        return Strided(array.shape, result.strides), Strided(shape, reshaped.strides)

    def address(self, array: Array) -> int:
        return address(array)

    def empty(self, shape: Shape, like: Array) -> Array:
        return np.empty(shape, like.dtype)

    def empty_strided(self, array: Strided, like: Array) -> Array:
        itemsize = like.dtype.itemsize
        return np.ndarray(array.shape, like.dtype, None, 0, [stride * itemsize for stride in array.strides])

    def copied(self, array: Array, to: Array) -> Array:
        to[...] = array
        return to

    def converted(self, array: Array, shape: Shape, like: Array) -> Array:
        check_shape(array, shape)
        return np.ascontiguousarray(array, like.dtype)

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def from_numpy(self, array: Array, like: Array) -> Array:
        return array.astype(like.dtype)

    def num_threads(self) -> int:
        return num_threads()
