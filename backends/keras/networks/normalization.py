"""What a normalization layer computes, read from the layers of Keras and of polywhiten."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from numpy.typing import NDArray

from polywhiten.dispatch import backend_of
from polywhiten.keras.layers import GroupWhitening, IterNorm
from polywhiten.solvers import regularized_solver
from polywhiten.statistics import whitener_of

Layer = Any
Values = NDArray[np.float64]

BATCH_NORM, GROUP_NORM, ITER_NORM, GROUP_WHITENING = "batch_norm", "group_norm", "iter_norm", "group_whitening"
OVER_BATCHES, WITHIN_SAMPLES = (BATCH_NORM, ITER_NORM), (GROUP_NORM, GROUP_WHITENING)
CLASSES: dict[str, type[Any]] = {
    ITER_NORM: IterNorm,
    GROUP_WHITENING: GroupWhitening,
    BATCH_NORM: keras.layers.BatchNormalization,
    GROUP_NORM: keras.layers.GroupNormalization,
}


class Averages(NamedTuple):
    """What a layer normalizes by in inference.

    Attributes
    ----------
    mean : ndarray, shape (channels,)
    whitener : ndarray, shape (blocks, d, d)
        Inverse square roots of the blocks' covariances, with d = 1 for batch normalization. Where the last block has
        fewer channels, the identity fills the rest.
    """

    mean: Values
    whitener: Values


class AffineMap(NamedTuple):
    """What a layer computes of the channels in inference: matrix @ x + offset.

    Attributes
    ----------
    matrix : ndarray, shape (channels, channels)
    offset : ndarray, shape (channels,)
    """

    matrix: Values
    offset: Values


def kind_of(layer: Layer) -> str | None:
    """Return the kind of a normalization layer that can be read, or None.

    The class that defines `call` decides: a subclass with a `call` of its own may compute something else.
    """
    defining = next(cls for cls in type(layer).__mro__ if "call" in cls.__dict__)
    return next((kind for kind, cls in CLASSES.items() if cls is defining), None)


def channels_of(layer: Layer) -> int:
    """Return the number of channels of a built normalization layer."""
    (channels,) = layer.input_spec.axes.values()
    return int(channels)


def channel_axis(layer: Layer) -> int:
    """Return the channel axis of a built normalization layer, counted from the front."""
    return int(layer.axis % layer.input_spec.ndim)


def describe(layer: Layer) -> str:
    """Return a normalization layer's class with its sizes, such as "IterNorm(64, group_size=16)"."""
    if not layer.built:  # as parts of other layers may be
        return type(layer).__name__
    groups = [f"{name}={getattr(layer, name)}" for name in ("groups", "group_size") if hasattr(layer, name)]
    return f"{type(layer).__name__}({', '.join([str(channels_of(layer)), *groups])})"


def values_of(variable: Any) -> Values:
    """Return the values of a variable in float64."""
    return np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float64)


def read_averages(layer: Layer) -> Averages | None:
    """Return what a built layer normalizes by in inference; None for normalization within samples."""
    kind = kind_of(layer)
    if kind == BATCH_NORM:
        whitener = (values_of(layer.moving_variance) + layer.epsilon) ** -0.5
        return Averages(values_of(layer.moving_mean), whitener[:, None, None])
    if kind == ITER_NORM:
        mean, matrices = values_of(layer.moving_mean), values_of(getattr(layer, f"moving_{layer.track}"))
        if layer.track == "covariance":
            solver, shift = regularized_solver(layer.method, layer.iterations, layer.epsilon, layer.relative_epsilon)
            matrices = whitener_of(backend_of(matrices, "covariance").kernels, matrices, len(mean), solver, shift)
        return Averages(mean, matrices)
    return None


def affine_map(layer: Layer) -> AffineMap:
    """Return what a built layer of batch normalization or IterNorm computes in inference."""
    averages = read_averages(layer)
    assert averages is not None, "only layers that normalize by averages"
    mean, blocks = averages
    channels, d = len(mean), blocks.shape[-1]
    matrix = np.zeros((channels, channels))
    for block, start in zip(blocks, range(0, channels, d), strict=True):
        size = min(d, channels - start)
        matrix[start : start + size, start : start + size] = block[:size, :size]
    if layer.gamma is not None:
        matrix *= values_of(layer.gamma)[:, None]
    offset = -matrix @ mean
    if layer.beta is not None:
        offset += values_of(layer.beta)
    return AffineMap(matrix, offset)


def is_diagonal(matrices: Values) -> bool:
    """Return whether all matrices (..., d, d) are diagonal."""
    return bool(np.all(matrices[..., ~np.eye(matrices.shape[-1], dtype=bool)] == 0))
