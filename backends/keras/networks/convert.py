"""Replace the normalization layers of a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import keras

from polywhiten import checks
from polywhiten.conversion import Change, Report, Where, select
from polywhiten.feasibility import InfeasibleWarning
from polywhiten.keras.networks.cloning import clone_with
from polywhiten.keras.networks.graph import Place, check_model, normalizes_by_batch, places
from polywhiten.keras.networks.normalization import CLASSES, OVER_BATCHES, describe, kind_of
from polywhiten.keras.networks.replacement import Replacement, accepted_arguments, make_replacement, take_weights

Model = Any


@overload
def convert(model: Model, to: str, *, return_report: Literal[True], **options: Any) -> tuple[Model, Report]: ...


@overload
def convert(model: Model, to: str, *, return_report: Literal[False] = False, **options: Any) -> Model: ...


def convert(
    model: Model,
    to: str,
    *,
    where: Where = None,
    batch_size: int | None = None,
    strict: bool = False,
    return_report: bool = False,
    **arguments: Any,
) -> Model | tuple[Model, Report]:
    """Returns a copy of a model with other normalization layers, which keep what the old ones have learnt.

    The model is a Sequential or functional model, built, whose nested models
    are of these kinds too. It stays as it is: the copy is made by
    `keras.models.clone_model`, and all weights are carried over. In inference,
    batch normalization that was converted to IterNorm computes the same as
    before: the whiteners are diagonal matrices of
    `1 / sqrt(variance + epsilon)` until training changes them. With
    `track="covariance"`, this needs `method="eigh"`. Where outputs in inference
    change, the report says so.

    Args:
        model: The model, whose `BatchNormalization`, `GroupNormalization`,
            `IterNorm` and `GroupWhitening` layers can be replaced.
        to: The kind of the new layers: `"iter_norm"`, `"group_whitening"`,
            `"batch_norm"` or `"group_norm"`.
        where: Which layers to replace. A function gets a layer's name and the
            layer, and returns whether to replace it. A string is a pattern of
            names, such as `"*_2_bn"`; or `"all"`; or `"first"`, the first
            normalization layer of `model.layers`. A sequence has several
            patterns. Layers of nested models are named as
            `"backbone/conv1_bn"`. Defaults to `None`, all layers.
        batch_size: Integer, the batch size of training, which alone isn't known
            of a built model's shapes. With it, `group_size` is reduced where a
            batch would have fewer samples than whitening needs. Defaults to
            `None`, where `group_size` stays as it is, and layers that turn out
            to be infeasible warn in training.
        strict: Whether to raise an error where a layer can't have the groups
            that are wanted, in place of a warning. Defaults to `False`.
        return_report: Whether to return also a report of what was replaced.
            `print(report)` shows it as a table. Defaults to `False`.
        **arguments: Arguments of the new layers: `group_size`, `method` and
            others of `IterNorm`, `groups` and others of `GroupWhitening`, and
            so on. Those that are missing, such as `epsilon` and `momentum`, are
            the old layer's, if it has them.

    Returns:
        The new model, or a tuple of it and the report. Its layers have the old
        names, dtype policies and values of `trainable`. If the model is
        compiled, so is the new one, but its optimizer starts anew.

    Raises:
        ValueError: An argument is invalid; a pattern matches no layer; the model
            is subclassed, isn't built, or has a layer that Keras can't copy;
            or, with `strict=True`, groups are infeasible.
        TypeError: The model isn't a model, an argument isn't known, or `where`
            can't be understood.

    Warns:
        polywhiten.analysis.InfeasibleWarning: Layers get fewer groups, or
            smaller ones, than wanted, because their channels or samples don't
            allow more. The warning names each layer and its value, and has them
            in its attribute `layers`.
        UserWarning: There is nothing to replace; or Keras can't copy what the
            model is compiled with, or its class.

    Layers inside of other layers, such as `TimeDistributed`, and those with
    `renorm=True` are left as they are.

    Example:

    >>> import keras, numpy as np
    >>> from polywhiten.keras import convert
    >>> layers = [keras.layers.Conv2D(64, 3), keras.layers.BatchNormalization(name="norm"), keras.layers.ReLU()]
    >>> model = keras.Sequential([keras.Input((32, 32, 3)), *layers])
    >>> converted, report = convert(model, "iter_norm", group_size=16, return_report=True)
    >>> print(report)
    layer  before                  after                        note
    -----  ----------------------  ---------------------------  ----
    norm   BatchNormalization(64)  IterNorm(64, group_size=16)
    >>> x = np.random.normal(size=(8, 32, 32, 3))
    >>> np.allclose(converted.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    True
    """
    _check_arguments(model, to, batch_size, arguments)
    found = {place.name: place for place in places(model) if kind_of(place.layer)}
    chosen = [found[name] for name in select(where, {n: p.layer for n, p in found.items()}, _placements(found))]
    left = {place.name: reason for place in chosen if (reason := _reason_to_leave(place, to))}
    made = {
        place.name: make_replacement(
            place.layer, to, arguments, [call.input_tensors[0].shape for call in place.calls], batch_size
        )
        for place in chosen
        if place.name not in left
    }
    _take_notice(model, made, strict)
    new = clone_with(model, {id(found[name].layer): replacement.layer for name, replacement in made.items()})
    for name, replacement in made.items():
        take_weights(replacement.layer, found[name].layer)
    report = Report(_change(place, made.get(place.name), left.get(place.name, "")) for place in chosen)
    return (new, report) if return_report else new


def _check_arguments(model: Model, to: str, batch_size: int | None, arguments: Mapping[str, Any]) -> None:
    check_model(model)
    checks.check_choice("to", to, [*CLASSES])
    if batch_size is not None:
        checks.check_positive("batch_size", batch_size)
    accepted = accepted_arguments(to)
    for name, value in arguments.items():
        if name not in accepted:
            raise TypeError(f"{name}={value!r} is no argument for to={to!r}, which accepts {', '.join(accepted)}")
        if name == "group_size" or (name == "groups" and value != -1):
            checks.check_positive(name, value)


def _placements(found: Mapping[str, Place]) -> dict[str, Callable[[], list[str]]]:
    """Return functions that choose layers as the papers' authors do."""

    def middle() -> list[str]:
        raise ValueError(
            "where='middle' needs blocks that are modules, which a Keras model doesn't have: use a pattern of names, "
            "such as where='*_2_bn' for keras.applications.ResNet50. The normalization layers here: "
            + (", ".join(found) or "none")
        )

    return {"all": lambda: [*found], "first": lambda: [*found][:1], "middle": middle}


def _reason_to_leave(place: Place, to: str) -> str:
    """Return why a layer isn't replaced; "" if it is."""
    if place.owner:
        return f"is a part of the layer {place.owner}, which Keras copies as a whole"
    if getattr(place.layer, "renorm", False):
        return "has renorm=True, which other layers don't have"
    return "is of this kind already" if kind_of(place.layer) == to else ""


def _change(place: Place, replacement: Replacement | None, reason: str) -> Change:
    """Return the report's line for a layer, once the new one is built."""
    if replacement is None:
        return Change(place.name, describe(place.layer), "", reason)
    new, notes = replacement.layer, [replacement.adjustment, *replacement.losses]
    if kind_of(new) in OVER_BATCHES and any(map(normalizes_by_batch, place.calls)):
        notes.append("is called with training=True: outputs in inference change")
    return Change(place.name, describe(place.layer), describe(new), "; ".join(note for note in notes if note))


def _take_notice(model: Model, made: Mapping[str, Replacement], strict: bool) -> None:
    """Warn if nothing is replaced; warn, or raise an error, if layers can't have the groups that are wanted."""
    if not made:
        others = Counter(
            type(layer).__name__
            for layer in model._flatten_layers(include_self=False)
            if "Norm" in type(layer).__name__ and not isinstance(layer, keras.layers.Normalization)
        )
        names = ", ".join(f"{count} {name}" for name, count in sorted(others.items())) or "none"
        warnings.warn(f"no layer of {model.name!r} is replaced. Its normalization layers: {names}", stacklevel=3)
    adjusted = {name: replacement.adjustment for name, replacement in made.items() if replacement.adjustment}
    if not adjusted:
        return
    listed = "; ".join(f"{name}: {adjustment}" for name, adjustment in adjusted.items())
    if strict:
        raise ValueError(f"{len(adjusted)} layers can't have the groups that are wanted. With strict=False: {listed}")
    message = f"{len(adjusted)} layers can't have the groups that are wanted, and get the nearest: {listed}"
    warnings.warn(InfeasibleWarning(message, adjusted), stacklevel=3)
