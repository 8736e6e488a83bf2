"""What the core uses of the array API, over TensorFlow: so much and no more."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import tensorflow as tf

Tensor = Any  # tf.Tensor, of which TensorFlow has no types


class _Namespace(ModuleType):
    """A namespace of the array API, as far as whitening goes."""

    float32 = tf.float32
    float64 = tf.float64
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
        """Tensors never change, so that a copy is as good as x itself."""
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
        return {"real floating": bool(dtype.is_floating)}[kind]

    @staticmethod
    def sum(x: Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        """Over the last axes first: TensorFlow's sum over axes that aren't adjacent takes ten times as long."""
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
    """On CPUs a product with the identity takes a fifth of a small transposition's time in TensorFlow."""

    @staticmethod
    def matrix_transpose(x: Tensor) -> Tensor:
        return tf.matmul(x, tf.eye(x.shape[-1], dtype=x.dtype), transpose_a=True)


xp = _Namespace("polywhiten.tensorflow.namespace.xp")
small_xp = _ForSmallMatrices("polywhiten.tensorflow.namespace.small_xp")
