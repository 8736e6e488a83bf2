"""Copy a model by Keras' `clone_model`, with other layers in the places of some, and with all weights."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from polywhiten.keras.networks.graph import is_model_of_layers, places

Layer = Any


def clone_with(model: Layer, replacements: Mapping[int, Layer | None]) -> Layer:
    """Return a copy of a model with other layers, whose weights the caller has to set.

    All other layers have the weights of the old ones and are trainable if these are. The copy is compiled if the model
    is, with an optimizer in its initial state.

    Parameters
    ----------
    model : Model
        One that `check_model` accepts.
    replacements : mapping
        New layers, not built yet, by the `id` of the old ones. None leaves a layer out.

    Raises
    ------
    ValueError
        A layer can't be copied.

    Warns
    -----
    UserWarning
        The copy has another class than the model, or can't be compiled as the model is.
    """
    copies = _Copies(replacements)
    new = copies.of_model(model)
    _copy_state(model, new, copies, replacements)
    if type(new) is not type(model):
        warnings.warn(
            f"the new model is a {type(new).__name__}, which has the layers of {type(model).__name__} {model.name!r} "
            "but not the methods of this class",
            stacklevel=3,
        )
    if model.compiled:
        _compile_alike(model, new)
    return new


class _Copies:
    """Copies of the operations of a model, one each, however often it is called."""

    def __init__(self, replacements: Mapping[int, Layer | None]) -> None:
        self._replacements = replacements
        self._copies: dict[int, Any] = {}

    def of(self, operation: Any) -> Any:
        """Return the copy of an operation; None if it is left out."""
        key = id(operation)
        if key not in self._copies:
            if key in self._replacements:
                self._copies[key] = self._replacements[key]
            else:
                self._copies[key] = self.of_model(operation) if is_model_of_layers(operation) else _copy(operation)
        return self._copies[key]

    def of_model(self, model: Layer) -> Layer:
        """Return a copy of a model, in which nothing but replacements differs."""
        if isinstance(model, keras.Sequential):  # where `clone_model` could leave no layer out
            first = keras.layers.InputLayer.from_config(model.inputs[0]._keras_history.operation.get_config())
            layers = [copy for copy in map(self.of, model.layers) if copy is not None]
            return keras.Sequential([first, *layers], name=model.name)
        with _not_compiled(model):
            return keras.models.clone_model(model, clone_function=self.of, call_function=_call)


def _call(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a copy as the original was called, but without arguments that only the original has."""
    if operation is None:
        return args[0] if args else kwargs["inputs"]
    accepted = inspect.signature(operation.call).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        return operation(*args, **kwargs)
    return operation(*args, **{name: value for name, value in kwargs.items() if name in accepted})


def _copy(operation: Any) -> Any:
    """Return a copy of a layer or another operation, made from its configuration."""
    if isinstance(operation, keras.layers.Lambda):  # which Keras doesn't copy, because its function may be unsafe
        names = ("function", "mask", "arguments", "name", "trainable")
        options = {name: getattr(operation, name) for name in names}
        return keras.layers.Lambda(**options, output_shape=operation._output_shape, dtype=operation.dtype_policy)
    try:
        return type(operation).from_config(operation.get_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            f"layer {operation.name!r} can't be copied, because its class {type(operation).__name__} doesn't make a "
            f"layer from what its `get_config` returns: {error}"
        ) from error


@contextmanager
def _not_compiled(model: Layer) -> Iterator[None]:
    """Make `clone_model` copy no losses, which fails for functions that Keras can't find by name."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def _copy_state(model: Layer, new: Layer, copies: _Copies, replaced: Collection[int]) -> None:
    """Set which layers can be trained, and the weights of those that aren't replaced."""
    new.trainable = model.trainable
    for place in places(model):  # a model before its layers, as it sets theirs too
        if place.owner:
            continue
        layer, copy = place.layer, copies.of(place.layer)
        if copy is None:
            continue
        copy.trainable = layer.trainable
        if id(layer) in replaced or is_model_of_layers(layer):
            continue
        for old_part, new_part in zip(layer._flatten_layers(), copy._flatten_layers(), strict=True):
            new_part.trainable = old_part.trainable
            _copy_weights(old_part, new_part)


def _copy_weights(layer: Layer, copy: Layer) -> None:
    """Copy what Keras saves of a layer: its variables, and assets such as vocabularies."""
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    if store:  # copies, because JAX deletes arrays that a model's own functions have used up
        copy.load_own_variables({key: np.array(keras.ops.convert_to_numpy(value)) for key, value in store.items()})
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            copy.load_assets(folder)


def _compile_alike(model: Layer, new: Layer) -> None:
    try:
        new.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0]
        warnings.warn(
            f"the new model isn't compiled, because Keras can't copy what {model.name!r} is compiled with: call its "
            f"`compile`. Keras says: {reason}",
            stacklevel=4,
        )
