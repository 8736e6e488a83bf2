"""Make a normalization layer of one kind from what a layer of another kind has learnt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from polywhiten.conversion import feasible_group_size, feasible_num_groups
from polywhiten.keras.networks.normalization import (
    BATCH_NORM,
    CLASSES,
    ITER_NORM,
    OVER_BATCHES,
    WITHIN_SAMPLES,
    Averages,
    Values,
    channel_axis,
    channels_of,
    is_diagonal,
    kind_of,
    read_averages,
    values_of,
)

Layer = Any
Shape = tuple[int | None, ...]

DEFAULT_GROUPS = 32  # of the group normalization paper, and what the group whitening paper compares with it
_TAKEN_FROM_LAYER = ("axis", "name", "trainable", "dtype", "activity_regularizer")


class Replacement(NamedTuple):
    """A new layer, not built yet.

    Attributes
    ----------
    layer : Layer
    adjustment : str
        Which argument was infeasible and what it became, such as "groups=24 instead of 32"; often "".
    losses : list of str
        What the new layer doesn't keep of the old one.
    """

    layer: Layer
    adjustment: str
    losses: list[str]


def accepted_arguments(to: str) -> list[str]:
    """Return the names of the arguments that a user may choose for new layers of a kind."""
    names = inspect.signature(CLASSES[to]).parameters
    return [name for name in names if name not in (*_TAKEN_FROM_LAYER, "kwargs") and not name.startswith("renorm")]


def make_replacement(
    old: Layer, to: str, arguments: Mapping[str, Any], shapes: Collection[Shape], batch_size: int | None = None
) -> Replacement:
    """Return a layer of the kind `to` in place of a built one; `take_weights` sets its weights once it is built.

    Parameters
    ----------
    old : Layer
    to : str
        A key of `CLASSES`.
    arguments : mapping
        Arguments of the new layer. Those that are missing and that both layers have are taken from the old one.
    shapes : collection of shapes
        The inputs that the layer gets in the model.
    batch_size : int, optional
        That of training.
    """
    accepted = (*accepted_arguments(to), *_TAKEN_FROM_LAYER)
    config = {name: value for name, value in old.get_config().items() if name in accepted} | dict(arguments)
    wanted = _wanted_groups(old, to, arguments)
    values = _feasible(old, to, wanted, shapes, batch_size)
    try:
        layer = CLASSES[to].from_config(config | values)
    except TypeError as error:  # Keras puts the whole configuration before the message of the layer's own error
        raise error.__context__ or error from None
    adjusted = [f"{name}={values[name]} instead of {value}" for name, value in wanted.items() if values[name] != value]
    return Replacement(layer, ", ".join(adjusted), _losses(old, layer))


def take_weights(layer: Layer, old: Layer) -> None:
    """Give a built layer what the old one has learnt: gamma, beta, and averages if both kinds have them."""
    for name in ("gamma", "beta"):
        if getattr(old, name) is not None and getattr(layer, name) is not None:
            getattr(layer, name).assign(values_of(getattr(old, name)))
    averages = read_averages(old)
    if averages is None or kind_of(layer) in WITHIN_SAMPLES:
        return
    layer.moving_mean.assign(averages.mean)
    if kind_of(layer) == BATCH_NORM:
        layer.moving_variance.assign(np.maximum(_variances(averages) - layer.epsilon, 0))
    else:
        getattr(layer, f"moving_{layer.track}").assign(_tracked_matrices(layer, averages))


def _wanted_groups(old: Layer, to: str, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return the size or number of groups that the user, the old layer or the new layer's defaults ask for."""
    channels = channels_of(old)
    if to in WITHIN_SAMPLES:
        groups = arguments.get("groups", getattr(old, "groups", DEFAULT_GROUPS))
        return {"groups": channels if groups == -1 else groups}
    if to == ITER_NORM:
        default = inspect.signature(CLASSES[to]).parameters["group_size"].default
        return {"group_size": arguments.get("group_size", default)}
    return {}


def _feasible(
    old: Layer, to: str, wanted: Mapping[str, int], shapes: Collection[Shape], batch_size: int | None
) -> dict[str, int]:
    """Return the size or number of groups that a layer's channels and inputs allow, as near as possible to `wanted`."""
    channels, axis = channels_of(old), channel_axis(old)
    if to in WITHIN_SAMPLES:
        values = _smallest_product(shape[1:] for shape in shapes)
        return {"groups": feasible_num_groups(to, wanted["groups"], channels, values)}
    if to == ITER_NORM:
        samples = _smallest_product((batch_size, *shape[1:axis], *shape[axis + 1 :]) for shape in shapes)
        size = min(wanted["group_size"], channels)  # a layer with fewer channels has groups of all of them
        feasible = feasible_group_size(size, samples)
        return {"group_size": feasible if feasible < size else wanted["group_size"]}
    return {}


def _smallest_product(shapes: Iterable[Shape]) -> int | None:
    """Return the smallest number of elements of shapes, or None if there is none of known size."""
    known = ([size for size in shape if size is not None] for shape in shapes if None not in shape)
    return min(map(math.prod, known), default=None)


def _variances(averages: Averages) -> Values:
    """Return the channels' variances plus epsilon."""
    inverse = np.linalg.inv(averages.whitener)
    return np.diagonal(inverse @ inverse, axis1=1, axis2=2).reshape(-1)[: len(averages.mean)]


def _tracked_matrices(layer: Layer, averages: Averages) -> Values:
    """Return the moving matrices of an IterNorm layer for the averages of batch normalization."""
    scales = averages.whitener.reshape(-1)
    tracked = scales if layer.track == "whitener" else scales**-2 - layer.epsilon
    groups, d, _ = getattr(layer, f"moving_{layer.track}").shape
    padded = np.concatenate([tracked, np.ones(groups * d - len(tracked))])
    return padded.reshape(groups, d, 1) * np.eye(d)


def _losses(old: Layer, layer: Layer) -> list[str]:
    """Return what the new layer doesn't keep of the old one."""
    losses = [f"{name} is dropped" for name in _dropped_weights(old, layer)]
    averages = read_averages(old)
    if kind_of(layer) in WITHIN_SAMPLES:
        losses.append("outputs change")
    elif averages is None:
        losses.append("has no statistics yet")
    elif kind_of(layer) == ITER_NORM and layer.track == "covariance":
        exact = layer.method == "eigh" and layer.epsilon == old.epsilon and not layer.relative_epsilon
        losses.append("" if exact else "whitens the old variances in another way: outputs in inference change")
    elif not is_diagonal(averages.whitener):
        losses.append("has the variances alone, without correlations: outputs in inference change")
    elif kind_of(layer) == BATCH_NORM and np.any(_variances(averages) < layer.epsilon * (1 - 1e-6)):
        losses.append("its epsilon is larger than some variances: outputs in inference change")
    if getattr(layer, "synchronized", False) and kind_of(layer) in OVER_BATCHES:
        losses.append("has synchronized=True")
    return [loss for loss in losses if loss]


def _dropped_weights(old: Layer, layer: Layer) -> list[str]:
    wanted = {"gamma": layer.scale, "beta": layer.center}
    return [name for name, kept in wanted.items() if getattr(old, name) is not None and not kept]
