"""Group whitening in graphs: a few operations that TensorFlow differentiates, and keeps what their gradients need.

The result is that of `polywhiten.reference`, which keeps the input alone for the gradient. Here the graph keeps the
centred and the whitened array, instead of computing them again.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from polywhiten._types import Shape
from polywhiten.blocks import SampleGroups, channel_shape
from polywhiten.spec import WhiteningSpec
from polywhiten.statistics import Statistics
from polywhiten.tensorflow.kernels import TensorFlowKernels, is_for_cpus, sums_of_rows
from polywhiten.tensorflow.namespace import Tensor, xp

MAX_SHORT_RUN = 3  # as measured on a CPU


def supports(spec: WhiteningSpec) -> bool:
    """Return whether this is group whitening in a graph; eager tapes would keep more than the input."""
    return isinstance(spec.blocks, SampleGroups) and not tf.executing_eagerly()


def whiten_samples(
    kernels: TensorFlowKernels, spec: WhiteningSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Statistics]:
    """Return y = W (x - mean) of every sample, times weight (C,) plus bias (C,), and the statistics."""
    blocks = kernels.split(spec.blocks, kernels.to_accumulation_dtype(x))  # (N, before, g, after)
    count = kernels.sample_count(blocks, 0, least=1)
    in_rows = blocks.shape[3] == 1
    samples = tf.squeeze(blocks, 3) if in_rows else _columns(kernels, blocks)
    centred, mean = _centred(samples, count, in_rows)
    cov = _products(centred, in_rows) / count
    whitener = kernels.inverse_sqrt(spec.solver, cov, spec.eps)
    white = tf.matmul(centred, whitener, transpose_b=True) if in_rows else tf.matmul(whitener, centred)
    restored = white if in_rows else _from_columns(white, kernels.shape(blocks))
    y = tf.reshape(restored, kernels.shape(x))
    scale, shift = (None if values is None else tf.cast(values, y.dtype) for values in (weight, bias))
    y = _times_plus(y, scale, shift, spec.blocks.axis)
    return tf.cast(y, x.dtype), Statistics(tf.reshape(mean, tf.shape(cov)[:2]), cov, whitener)


def _columns(kernels: TensorFlowKernels, blocks: Tensor) -> Tensor:
    """Return blocks (N, before, g, after) as (N, g, M), a copy if there are positions before the channels."""
    batch, before, groups, after = kernels.shape(blocks)
    if not _is_one(before):
        blocks = _moved(blocks, (batch, before, groups, after))
    return tf.reshape(blocks, (batch, groups, before * after))


def _from_columns(samples: Tensor, shape: Shape) -> Tensor:
    """Undo `_columns`, up to the shape."""
    batch, before, groups, after = shape
    if _is_one(before):
        return samples
    return _moved(samples, (batch, groups * after, before, 1) if _is_short(after) else (batch, groups, before, after))


def _moved(array: Tensor, shape: Shape) -> Tensor:
    """Return an array of this shape with its axes 1 and 2 exchanged, or, if they are short, axis 1 at the end."""
    batch, first, second, last = shape
    if _is_short(last):
        return tf.transpose(tf.reshape(array, (batch, first, second * last)), (0, 2, 1))
    return tf.transpose(tf.reshape(array, shape), (0, 2, 1, 3))


def _is_short(run: Any) -> bool:
    """Return whether adjacent elements that stay together are too few for them to be moved as one."""
    return isinstance(run, int) and run <= MAX_SHORT_RUN


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _centred(samples: Tensor, count: Any, in_rows: bool) -> tuple[Tensor, Tensor]:
    """Return samples minus their means, and the means."""

    def means(samples: Tensor) -> Tensor:
        if in_rows:
            return sums_of_rows(samples)[:, None, :] / count
        return tf.reduce_sum(samples, -1, keepdims=True) / count

    @tf.custom_gradient
    def run(samples: Tensor) -> Any:
        mean = means(samples)

        def gradient(dcentred: Tensor, dmean: Tensor) -> Tensor:
            return dcentred + (dmean / count - means(dcentred))

        return (samples - mean, mean), gradient

    centred, mean = run(samples)
    return centred, mean


def _products(centred: Tensor, in_rows: bool) -> Tensor:
    """Return X X' of every sample, with a gradient of one product instead of two."""

    @tf.custom_gradient
    def run(centred: Tensor) -> Any:
        def gradient(grad: Tensor) -> Tensor:
            grad += xp.matrix_transpose(grad)
            return tf.matmul(centred, grad) if in_rows else tf.matmul(grad, centred)

        return tf.matmul(centred, centred, transpose_a=in_rows, transpose_b=not in_rows), gradient

    return run(centred)


def _times_plus(y: Tensor, scale: Tensor | None, shift: Tensor | None, axis: int) -> Tensor:
    """Return y scale + shift, of the channels at `axis`."""
    rank = y.shape.rank
    if scale is None and shift is None:
        return y
    if rank > 2 and axis == rank - 1 and y.dtype == tf.float32 and is_for_cpus():
        return _times_plus_in_one_pass(y, scale, shift)

    def laid(values: Tensor) -> Tensor:
        if axis != 1 or rank == 2:
            return tf.reshape(values, channel_shape(rank, axis))
        # With a copy for each sample, gradients are sums over adjacent positions first. Over axes that aren't adjacent,
        # TensorFlow takes ten times as long.
        copies = tf.tile(values[None], (tf.shape(y)[0], 1))
        return tf.reshape(copies, (-1, values.shape[0], *[1] * (rank - 2)))

    if scale is not None:
        y *= laid(scale)
    return y if shift is None else y + laid(shift)


def _times_plus_in_one_pass(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return y scale + shift of the last axis, as batch normalization with mean 0 and variance 1.

    This is one pass, and the gradients of all three arguments are another.
    """
    channels = y.shape[-1]
    one, zero = tf.ones(channels), tf.zeros(channels)
    result = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(y, (1, 1, -1, channels)),
        scale=one if scale is None else scale,
        offset=zero if shift is None else shift,
        mean=zero,
        variance=one,
        epsilon=0.0,
        is_training=False,
    )
    return tf.reshape(result.y, tf.shape(y))
