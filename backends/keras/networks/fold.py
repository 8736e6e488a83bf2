"""Fold normalization layers into the convolution and dense layers beside them, for inference."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, overload

from polywhiten.conversion import Change, Report
from polywhiten.keras.networks.cloning import clone_with
from polywhiten.keras.networks.graph import Place, check_model, has_mask, normalizes_by_batch, places
from polywhiten.keras.networks.linear_layers import (
    LinearLayer,
    has_no_activation,
    has_plain_weights,
    is_linear,
    misplaces_bias,
    read_linear,
)
from polywhiten.keras.networks.normalization import (
    BATCH_NORM,
    OVER_BATCHES,
    AffineMap,
    affine_map,
    channel_axis,
    channels_of,
    describe,
    is_diagonal,
    kind_of,
)
from polywhiten.keras.networks.pointwise import describe_pointwise, pointwise_layer, set_pointwise
from polywhiten.keras.networks.replacement import make_replacement, take_weights

Model = Any
Layer = Any

NO_NEIGHBOUR = "no convolution or dense layer is next to it alone"


@overload
def fold(model: Model, *, return_report: Literal[True]) -> tuple[Model, Report]: ...


@overload
def fold(model: Model, *, return_report: Literal[False] = False) -> Model: ...


def fold(model: Model, *, return_report: bool = False) -> Model | tuple[Model, Report]:
    """Returns a copy of a model for inference, without normalization layers where other layers can do their work.

    In inference `IterNorm` and `BatchNormalization` multiply the channels by a
    matrix and add an offset. The convolution or dense layer before such a layer
    computes this with another kernel and bias; or else the one after it does,
    if it pads no zeros. Elsewhere, a convolution 1 x 1 or a dense layer takes
    the place of `IterNorm` where there is one for its axis, and
    `BatchNormalization` stays. Outputs in inference are the same
    up to rounding. Training would differ: train the model itself, and fold it
    again.

    Args:
        model: A Sequential or functional model, built. It stays as it is.
        return_report: Whether to return also a report of what became of each
            layer. `print(report)` shows it as a table. Defaults to `False`.

    Returns:
        The new model, or a tuple of it and the report. It is compiled if the
        model is.

    Raises:
        ValueError: The model is subclassed, isn't built, or has a layer that
            Keras can't copy.
        TypeError: The model isn't a model.

    Warns:
        UserWarning: There is nothing to fold; or Keras can't copy what the model
            is compiled with, or its class.

    These layers take in a normalization layer: `Conv1D`, `Conv2D` and `Conv3D`,
    the transposed, depthwise and separable ones, and `Dense`. They don't if they
    have an activation between, are called several times, have other users of
    their output, compute in another dtype, or are quantized. A convolution in
    groups, and a depthwise one, takes in a normalization layer that doesn't mix
    channels of different groups: batch normalization always, `IterNorm` if its
    groups fit.

    Example:

    >>> import keras, numpy as np
    >>> from polywhiten.keras import IterNorm, fold
    >>> layers = [keras.layers.Conv2D(64, 3, name="conv"), IterNorm(group_size=16, name="norm"), keras.layers.ReLU()]
    >>> model = keras.Sequential([keras.Input((32, 32, 3)), *layers])
    >>> folded, report = fold(model, return_report=True)
    >>> print(report)
    layer  before                       after                     note
    -----  ---------------------------  ------------------------  ----
    norm   IterNorm(64, group_size=16)  a part of conv before it
    >>> x = np.random.normal(size=(8, 32, 32, 3))
    >>> np.allclose(folded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    True
    """
    check_model(model)
    folding = _Folding(model)
    report = Report([folding.fold(place) for place in folding.normalization_layers()])
    if not report.replaced:
        warnings.warn(f"no layer of {model.name!r} is folded", stacklevel=2)
    new = folding.new_model()
    return (new, report) if return_report else new


class _Folding:
    """A model, and what has been decided about its layers."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._places = [*places(model)]
        self._graphs = {id(place.graph): place.graph for place in self._places}
        self._linear: dict[int, LinearLayer] = {}  # those that have taken in others, by the `id` of the layer
        self._left_out: set[int] = set()
        self._others: dict[int, tuple[Layer, Callable[[Layer], None]]] = {}  # new layers, and what sets their weights

    def normalization_layers(self) -> list[Place]:
        """Return the places of all normalization layers that can be read."""
        return [place for place in self._places if kind_of(place.layer)]

    def fold(self, place: Place) -> Change:
        """Decide what becomes of a normalization layer."""
        before = describe(place.layer)
        reason = self._reason_to_leave(place)
        if reason:
            return Change(place.name, before, "", reason)
        affine, objections = affine_map(place.layer), []
        for is_before in (True, False):
            neighbour = self._neighbour(place, is_before)
            objection = self._objection(neighbour, place, affine, is_before)
            if not objection:
                linear = self._linear.setdefault(id(neighbour), read_linear(neighbour))
                (linear.map_outputs if is_before else linear.map_inputs)(affine)
                self._left_out.add(id(place.layer))
                return Change(place.name, before, f"a part of {neighbour.name} {'before' if is_before else 'after'} it")
            objections.append(objection)
        reason = "; ".join([each for each in objections if each != NO_NEIGHBOUR] or [NO_NEIGHBOUR])
        return self._replace(place, affine, reason)

    def new_model(self) -> Model:
        """Return a copy of the model in which all of that is done."""
        new_layers = {key: (linear.new_layer(), linear.set_weights) for key, linear in self._linear.items()}
        new_layers |= self._others
        left_out: dict[int, Layer | None] = dict.fromkeys(self._left_out)
        new = clone_with(self._model, left_out | {key: layer for key, (layer, _) in new_layers.items()})
        for layer, set_weights in new_layers.values():
            set_weights(layer)
        return new

    def _is_called_once(self, layer: Layer) -> bool:
        return sum(len(graph.calls(layer)) for graph in self._graphs.values()) == 1

    def _reason_to_leave(self, place: Place) -> str:
        """Return why what the layer computes isn't known; "" if it is."""
        if place.owner:
            return f"is a part of the layer {place.owner}, which Keras copies as a whole"
        if kind_of(place.layer) not in OVER_BATCHES:
            return "normalizes every sample by itself"
        if not self._is_called_once(place.layer):
            return "is called several times"
        return "is called with training=True" if normalizes_by_batch(place.calls[0]) else ""

    def _neighbour(self, place: Place, is_before: bool) -> Any:
        """Return the operation before or after a layer, past those that are left out; None if there are several."""
        step = place.graph.operation_before if is_before else place.graph.operation_after
        operation = step(place.calls[0])
        while id(operation) in self._left_out:
            operation = step(place.graph.calls(operation)[0])
        return operation

    def _objection(self, neighbour: Any, place: Place, affine: AffineMap, is_before: bool) -> str:
        """Return why a layer before or after a normalization layer can't do its work; "" if it can."""
        if not is_linear(neighbour):
            return NO_NEIGHBOUR
        norm, linear = place.layer, self._linear.get(id(neighbour)) or read_linear(neighbour)
        if not self._is_called_once(neighbour):
            return f"{neighbour.name} is called several times"
        if is_before and not has_no_activation(neighbour):
            return f"{neighbour.name} has an activation"
        if neighbour.compute_dtype != norm.compute_dtype or not has_plain_weights(neighbour):
            return f"{neighbour.name} has another dtype, quantized weights, or LoRA weights"
        if linear.channel_axis % norm.input_spec.ndim != channel_axis(norm):
            return f"{neighbour.name} has its channels at another axis"
        if misplaces_bias(place.graph.calls(neighbour)[0].outputs[0].shape, linear.channel_axis):
            return f"Keras would add the bias of {neighbour.name} along the width, which is as large as its channels"
        return linear.objection_to_outputs(affine) if is_before else linear.objection_to_inputs(affine)

    def _replace(self, place: Place, affine: AffineMap, reason: str) -> Change:
        """Put a simpler layer in the place of IterNorm, if there is one."""
        norm, before = place.layer, describe(place.layer)
        if kind_of(norm) == BATCH_NORM:
            return Change(place.name, before, "", reason)
        if is_diagonal(affine.matrix):
            layer, adjustment, losses = make_replacement(norm, BATCH_NORM, {}, [])
            assert not adjustment, "only groups are adjusted"
            if not losses:
                self._others[id(norm)] = layer, lambda layer: take_weights(layer, norm)
                return Change(place.name, before, f"BatchNormalization({channels_of(norm)})", reason)
        shape = place.calls[0].outputs[0].shape
        pointwise = pointwise_layer(norm, has_mask(place.calls[0].input_tensors[0]))
        if pointwise is None or misplaces_bias(shape, channel_axis(norm)):
            return Change(place.name, before, "", reason)
        self._others[id(norm)] = pointwise, lambda layer: set_pointwise(layer, affine)
        return Change(place.name, before, describe_pointwise(pointwise), reason)
