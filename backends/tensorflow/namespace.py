"""The part of the array API that the core uses, over TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import tensorflow as tf

Tensor = Any  # tf.Tensor, of which TensorFlow has no types


class _Namespace(ModuleType):
    """The functions and dtypes of the array API that whitening needs."""

    float32 = tf.float32
    float64 = tf.float64
    int8, uint8, int16, uint16 = tf.int8, tf.uint8, tf.int16, tf.uint16
    abs = staticmethod(tf.abs)
    all = staticmethod(tf.reduce_all)
    expand_dims = staticmethod(tf.expand_dims)
    isfinite = staticmethod(tf.math.is_finite)
    linalg = SimpleNamespace(eigh=tf.linalg.eigh)
    matrix_transpose = staticmethod(tf.linalg.matrix_transpose)
    max = staticmethod(tf.reduce_max)
    maximum = staticmethod(tf.maximum)
    ones_like = staticmethod(tf.ones_like)
    permute_dims = staticmethod(tf.transpose)
    reshape = staticmethod(tf.reshape)
    sqrt = staticmethod(tf.sqrt)
    where = staticmethod(tf.where)
    zeros_like = staticmethod(tf.zeros_like)

    @staticmethod
    def asarray(values: Any, *, device: str) -> Tensor:
        with tf.device(device):
            return tf.convert_to_tensor(values)

    @staticmethod
    def astype(x: Tensor, dtype: tf.DType, *, copy: bool = True) -> Tensor:
        """Cast; tensors never change, so a copy isn't needed."""
        del copy
        return tf.cast(x, dtype)

    @staticmethod
    def clip(x: Tensor, *, min: float) -> Tensor:
        return tf.maximum(x, min)

    @staticmethod
    def concat(tensors: Sequence[Tensor], *, axis: int = 0) -> Tensor:
        return tf.concat(tensors, axis)

    @staticmethod
    def finfo(dtype: tf.DType) -> Any:
        return ml_dtypes.finfo(dtype.as_numpy_dtype)

    @staticmethod
    def flip(x: Tensor, *, axis: int) -> Tensor:
        return tf.reverse(x, [axis])

    @staticmethod
    def full_like(x: Tensor, value: Any) -> Tensor:
        return tf.fill(tf.shape(x), tf.cast(value, x.dtype))

    @staticmethod
    def isdtype(dtype: tf.DType, kind: str) -> bool:
        return {"real floating": bool(dtype.is_floating), "complex floating": bool(dtype.is_complex)}[kind]

    @staticmethod
    def sum(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Sum over the last axes first: over axes that aren't adjacent, TensorFlow takes ten times as long."""
        if isinstance(axis, int) or axis is None:
            return tf.reduce_sum(x, axis, keepdims)
        rank = x.shape.rank
        first = sorted(i % rank for i in axis)
        last: list[int] = []
        while first and first[-1] == rank - 1 - len(last):
            last.append(first.pop())
        for axes in (last, first):
            if axes:
                x = tf.reduce_sum(x, axes, keepdims)
        return x

    @staticmethod
    def take(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
        return tf.gather(x, indices, axis=axis)

    @staticmethod
    def tril(x: Tensor) -> Tensor:
        return tf.linalg.band_part(x, -1, 0)

    @staticmethod
    def triu(x: Tensor) -> Tensor:
        return tf.linalg.band_part(x, 0, -1)


class _ForSmallMatrices(_Namespace):
    """A namespace for small matrices on CPUs.

    There a product with the identity takes a fifth of the time of TensorFlow's transposition.
    """

    @staticmethod
    def matrix_transpose(x: Tensor) -> Tensor:
        return tf.matmul(x, tf.eye(x.shape[-1], dtype=x.dtype), transpose_a=True)


xp = _Namespace("polywhiten.tensorflow.namespace.xp")
small_xp = _ForSmallMatrices("polywhiten.tensorflow.namespace.small_xp")
