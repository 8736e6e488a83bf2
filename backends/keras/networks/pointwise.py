"""A layer of its own for an affine map of the channels: a convolution 1 x 1, or a dense layer."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from polywhiten.keras.networks.linear_layers import diagonal_blocks
from polywhiten.keras.networks.normalization import AffineMap, channel_axis, channels_of

Layer = Any

_CONVOLUTIONS = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}


def pointwise_layer(norm: Layer, has_mask: bool) -> Layer | None:
    """Return a layer, not built yet, that can compute what IterNorm does in inference; None if Keras has none.

    Convolutions multiply each group of channels by itself, but drop masks, which dense layers keep.
    """
    channels, axis, ndim = channels_of(norm), channel_axis(norm), norm.input_spec.ndim
    options = {"name": norm.name, "dtype": norm.dtype_policy, "trainable": norm.trainable}
    if ndim - 2 in _CONVOLUTIONS and axis in (1, ndim - 1) and not has_mask:
        size = min(norm.group_size, channels)
        groups = channels // size if channels % size == 0 else 1
        layout = "channels_last" if axis == ndim - 1 else "channels_first"
        if layout == "channels_first" and groups == 1 and _convolves_channels_last_only():
            return None
        return _CONVOLUTIONS[ndim - 2](channels, 1, groups=groups, data_format=layout, **options)
    return keras.layers.Dense(channels, **options) if axis == ndim - 1 else None


def _convolves_channels_last_only() -> bool:
    """Return whether this is TensorFlow on a CPU."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def describe_pointwise(layer: Layer) -> str:
    """Return the class of such a layer with its sizes."""
    if isinstance(layer, keras.layers.Dense):
        return f"Dense({layer.units})"
    size = " x ".join("1" * layer.rank)
    return f"{type(layer).__name__}({layer.filters}, {size}, groups={layer.groups})"


def set_pointwise(layer: Layer, affine: AffineMap) -> None:
    """Set the weights of such a layer, once it is built."""
    blocks = diagonal_blocks(affine.matrix, getattr(layer, "groups", 1))  # (groups, outputs, inputs)
    layer.kernel.assign(np.reshape(blocks.transpose(2, 0, 1), layer.kernel.shape))
    layer.bias.assign(affine.offset)
