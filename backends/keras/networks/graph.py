"""What calls what in Sequential and functional models, and the layers of models that are nested in each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

Layer = Any
Node = Any  # Keras' record of one call: operation, arguments, input_tensors, outputs


class Graph:
    """The calls of one model, without those inside of models that are nested in it."""

    def __init__(self, model: Layer) -> None:
        functional = model._functional if isinstance(model, keras.Sequential) else model
        self._calls: dict[int, list[Node]] = {}
        self._consumers: dict[int, list[Node]] = {}
        self._outputs = {id(tensor) for tensor in functional.outputs}
        for nodes in functional._nodes_by_depth.values():
            for node in nodes:
                self._calls.setdefault(id(node.operation), []).append(node)
                for tensor in node.input_tensors:
                    self._consumers.setdefault(id(tensor), []).append(node)

    def calls(self, operation: Any) -> list[Node]:
        """Return the calls of an operation in this model."""
        return self._calls.get(id(operation), [])

    def is_used_once(self, tensor: Any) -> bool:
        """Return whether one call alone uses the tensor, and the model doesn't return it."""
        return len(self._consumers.get(id(tensor), [])) == 1 and id(tensor) not in self._outputs

    def operation_before(self, call: Node) -> Any:
        """Return the operation whose output a call uses, or None if another one uses that too."""
        tensor = call.input_tensors[0]
        return tensor._keras_history.operation if self.is_used_once(tensor) else None

    def operation_after(self, call: Node) -> Any:
        """Return the operation that uses a call's output, or None if there are several or the model returns it."""
        tensor = call.outputs[0]
        return self._consumers[id(tensor)][0].operation if self.is_used_once(tensor) else None


class Place(NamedTuple):
    """Where a layer is.

    Attributes
    ----------
    name : str
        The layer's name after those of the nested models that have it, such as "backbone/conv1_bn".
    layer : Layer
    graph : Graph
        That of the model that calls the layer.
    owner : str
        Name of the layer that this one is a part of; "" for a layer that a model calls.
    """

    name: str
    layer: Layer
    graph: Graph
    owner: str = ""

    @property
    def calls(self) -> list[Node]:
        """The calls of the layer, which are unknown for a part of another layer."""
        return self.graph.calls(self.layer)


def is_model_of_layers(layer: Layer) -> bool:
    """Return whether this is a Sequential or functional model, whose layers can be replaced."""
    return isinstance(layer, keras.Sequential) or (isinstance(layer, keras.Model) and isinstance(layer, keras.Function))


def check_model(model: Any) -> None:
    """Raise an error if the model's layers and calls aren't known."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model is a {type(model).__name__}: a keras.Model is needed")
    if not is_model_of_layers(model):
        raise ValueError(
            f"model {model.name!r} is the subclassed model {type(model).__name__}, whose calls are code that Keras "
            "can't change: define it as a Sequential or functional model, or use the new layers in its code"
        )
    _check_built(model)


def _check_built(model: Layer) -> None:
    if isinstance(model, keras.Sequential) and model._functional is None:
        raise ValueError(f"the Sequential model {model.name!r} isn't built: call it on a batch, or give it an Input")
    for layer in model.layers:
        if is_model_of_layers(layer):
            _check_built(layer)


def places(model: Layer) -> Iterator[Place]:
    """Yield all layers of a model, each followed by its own layers or parts.

    A layer that has several names is yielded under the first one.
    """
    seen: set[int] = set()
    for place in _all_places(model):
        if id(place.layer) not in seen:
            seen.add(id(place.layer))
            yield place


def _all_places(model: Layer, prefix: str = "") -> Iterator[Place]:
    graph = Graph(model)
    for layer in model.layers:
        name = prefix + layer.name
        yield Place(name, layer, graph)
        if is_model_of_layers(layer):
            yield from _all_places(layer, f"{name}/")
        else:
            for part in layer._flatten_layers(include_self=False):
                yield Place(f"{name}/{part.name}", part, graph, name)


def normalizes_by_batch(call: Node) -> bool:
    """Return whether this call of a normalization layer has the fixed argument `training=True`."""
    arguments = call.arguments
    return bool(arguments.kwargs.get("training")) or any(each is True for each in arguments.args[1:])


def has_mask(tensor: Any) -> bool:
    """Return whether a mask goes along with a tensor in its model."""
    return getattr(tensor, "_keras_mask", None) is not None
