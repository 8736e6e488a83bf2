"""Convolution and dense layers that take in an affine map of their outputs or of their inputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from polywhiten.keras.networks.normalization import AffineMap, Values, values_of

Layer = Any

_layers = keras.layers
_CONVOLUTIONS = _layers.Conv1D, _layers.Conv2D, _layers.Conv3D
_TRANSPOSED = _layers.Conv1DTranspose, _layers.Conv2DTranspose, _layers.Conv3DTranspose
_DEPTHWISE = _layers.DepthwiseConv1D, _layers.DepthwiseConv2D
_SEPARABLE = _layers.SeparableConv1D, _layers.SeparableConv2D


class LinearLayer:
    """What a built layer computes without its activation, in float64: kernels and bias.

    A kernel has the shape (*positions, inputs of a group, outputs), as that of `Conv2D` has.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._kernel, self._groups = self._read_kernel()
        self.bias = np.zeros(self._num_outputs) if layer.bias is None else values_of(layer.bias)

    def _read_kernel(self) -> tuple[Values, int]:
        """Return the kernel and its number of groups."""
        return values_of(self.layer.kernel), getattr(self.layer, "groups", 1)

    @property
    def _num_outputs(self) -> int:
        return int(self._kernel.shape[-1])

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in inputs and outputs."""
        return 1 if getattr(self.layer, "data_format", "channels_last") == "channels_first" else -1

    @property
    def _is_padded(self) -> bool:
        """Whether outputs at the border see zeros in place of inputs."""
        return getattr(self.layer, "padding", "valid") != "valid" and any(n > 1 for n in self._kernel.shape[:-2])

    def objection_to_outputs(self, affine: AffineMap) -> str:
        """Return why the layer can't compute an affine map of its outputs; "" if it can."""
        return _objection(affine.matrix, self._groups, self.layer)

    def objection_to_inputs(self, affine: AffineMap) -> str:
        """Return why the layer can't compute what it does from an affine map of its inputs; "" if it can."""
        if self._is_padded and np.any(affine.offset):
            return f"{self.layer.name} pads its input with zeros"
        return _objection(affine.matrix, self._groups, self.layer)

    def map_outputs(self, affine: AffineMap) -> None:
        """Make the layer compute an affine map of its outputs."""
        self._kernel = _map_outputs(self._kernel, affine.matrix, self._groups)
        self.bias = affine.matrix @ self.bias + affine.offset

    def map_inputs(self, affine: AffineMap) -> None:
        """Make the layer compute what it does from an affine map of its inputs."""
        self.bias = self.bias + _constant_response(self._kernel, affine.offset, self._groups)
        self._kernel = _map_inputs(self._kernel, affine.matrix, self._groups)

    def new_layer(self) -> Layer:
        """Return a layer of the same kind with a bias, not built yet."""
        return type(self.layer).from_config(self.layer.get_config() | {"use_bias": True})

    def set_weights(self, layer: Layer) -> None:
        """Set the weights of such a layer, once it is built."""
        layer.bias.assign(self.bias)
        self._set_kernels(layer)

    def _set_kernels(self, layer: Layer) -> None:
        layer.kernel.assign(self._kernel)


class _TransposedLayer(LinearLayer):
    """A transposed convolution, whose kernel has the shape (*positions, outputs, inputs)."""

    def _read_kernel(self) -> tuple[Values, int]:
        return np.swapaxes(values_of(self.layer.kernel), -1, -2), 1

    def objection_to_inputs(self, affine: AffineMap) -> str:
        """Return why not: positions of the output see different numbers of inputs."""
        one_each = all(n == 1 for n in (*self._kernel.shape[:-2], *self.layer.strides))
        if not one_each and np.any(affine.offset):
            return f"positions of {self.layer.name}'s output depend on different numbers of inputs"
        return super().objection_to_inputs(AffineMap(affine.matrix, np.zeros_like(affine.offset)))

    def _set_kernels(self, layer: Layer) -> None:
        layer.kernel.assign(np.swapaxes(self._kernel, -1, -2))


class _DepthwiseLayer(LinearLayer):
    """A depthwise convolution, as a convolution in as many groups as it has inputs."""

    def _read_kernel(self) -> tuple[Values, int]:
        return _as_grouped(values_of(self.layer.kernel))

    def _set_kernels(self, layer: Layer) -> None:
        layer.kernel.assign(self._kernel.reshape(layer.kernel.shape))


class _SeparableLayer(LinearLayer):
    """A depthwise convolution, which takes the inputs, then a pointwise one, whose outputs the layer returns."""

    def _read_kernel(self) -> tuple[Values, int]:
        self._pointwise = values_of(self.layer.pointwise_kernel)
        return _as_grouped(values_of(self.layer.depthwise_kernel))

    @property
    def _num_outputs(self) -> int:
        return int(self._pointwise.shape[-1])

    def objection_to_outputs(self, affine: AffineMap) -> str:
        """Return "": the pointwise kernel takes any map."""
        return ""

    def map_outputs(self, affine: AffineMap) -> None:
        """Make the pointwise convolution compute an affine map of its outputs."""
        self._pointwise = _map_outputs(self._pointwise, affine.matrix, 1)
        self.bias = affine.matrix @ self.bias + affine.offset

    def map_inputs(self, affine: AffineMap) -> None:
        """Make the depthwise convolution compute what it does from an affine map of its inputs."""
        constant = _constant_response(self._kernel, affine.offset, self._groups)
        self.bias = self.bias + constant @ self._pointwise.reshape(self._pointwise.shape[-2:])
        self._kernel = _map_inputs(self._kernel, affine.matrix, self._groups)

    def _set_kernels(self, layer: Layer) -> None:
        layer.depthwise_kernel.assign(self._kernel.reshape(layer.depthwise_kernel.shape))
        layer.pointwise_kernel.assign(self._pointwise)


_KINDS: dict[type[Any], type[LinearLayer]] = {
    **dict.fromkeys((*_CONVOLUTIONS, _layers.Dense), LinearLayer),
    **dict.fromkeys(_TRANSPOSED, _TransposedLayer),
    **dict.fromkeys(_DEPTHWISE, _DepthwiseLayer),
    **dict.fromkeys(_SEPARABLE, _SeparableLayer),
}


def is_linear(operation: Any) -> bool:
    """Return whether this is a convolution or dense layer; subclasses may compute something else."""
    return type(operation) in _KINDS


def read_linear(layer: Layer) -> LinearLayer:
    """Return what a convolution or dense layer computes."""
    return _KINDS[type(layer)](layer)


def has_no_activation(layer: Layer) -> bool:
    """Return whether the layer returns what its kernel and bias compute."""
    return layer.activation in (None, keras.activations.linear)


def has_plain_weights(layer: Layer) -> bool:
    """Return whether the layer's kernel is a variable of numbers that aren't quantized or a sum of variables."""
    return not (getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None))


def misplaces_bias(shape: tuple[int | None, ...], channel_axis: int) -> bool:
    """Return whether Keras adds a bias along the wrong axis of outputs of this shape.

    Its TensorFlow backend looks for the axis of this length, and finds the last one before that of the channels.
    """
    return keras.backend.backend() == "tensorflow" and len(shape) > 2 and channel_axis == 1 and shape[1] == shape[-1]


def _as_grouped(kernel: Values) -> tuple[Values, int]:
    """Return a depthwise kernel (*positions, inputs, multiplier) as that of a grouped convolution, and the groups."""
    return kernel.reshape(*kernel.shape[:-2], 1, -1), kernel.shape[-2]


def _objection(matrix: Values, groups: int, layer: Layer) -> str:
    if np.count_nonzero(matrix) == np.count_nonzero(diagonal_blocks(matrix, groups)):
        return ""
    return f"it mixes channels of different groups of {layer.name}"


def diagonal_blocks(matrix: Values, groups: int) -> Values:
    """Return the square blocks (groups, d, d) on the diagonal."""
    d = len(matrix) // groups
    blocks = matrix.reshape(groups, d, groups, d)
    return blocks[np.arange(groups), :, np.arange(groups)]


def _by_groups(kernel: Values, groups: int) -> Values:
    """Return a kernel as (positions, groups, inputs, outputs), each of one group."""
    inputs, outputs = kernel.shape[-2:]
    return kernel.reshape(-1, inputs, groups, outputs // groups).transpose(0, 2, 1, 3)


def _from_groups(kernel: Values, shape: tuple[int, ...]) -> Values:
    return kernel.transpose(0, 2, 1, 3).reshape(shape)


def _map_outputs(kernel: Values, matrix: Values, groups: int) -> Values:
    blocks = diagonal_blocks(matrix, groups).transpose(0, 2, 1)
    return _from_groups(_by_groups(kernel, groups) @ blocks, kernel.shape)


def _map_inputs(kernel: Values, matrix: Values, groups: int) -> Values:
    blocks = diagonal_blocks(matrix, groups).transpose(0, 2, 1)
    return _from_groups(blocks @ _by_groups(kernel, groups), kernel.shape)


def _constant_response(kernel: Values, inputs: Values, groups: int) -> Values:
    """Return the outputs (channels,) of a convolution whose input is the same at all positions."""
    summed = _by_groups(kernel, groups).sum(axis=0)
    outputs: Values = inputs.reshape(groups, 1, -1) @ summed
    return outputs.reshape(-1)
