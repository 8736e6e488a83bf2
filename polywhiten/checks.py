"""Checks of what users pass. Every error names the argument, its value, and what would be accepted."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

from polywhiten._types import Array, Namespace, Shape
from polywhiten.blocks import divisors

Layer = TypeVar("Layer")


def wrong_type(values: Any, name: str, wanted: str) -> TypeError:
    """Return the error to raise for values of a class that isn't accepted."""
    return TypeError(f"{name} is a {type(values).__module__}.{type(values).__qualname__}: pass {wanted}")


def check_array(xp: Namespace, x: Array, name: str = "x") -> None:
    if not hasattr(x, "dtype"):
        raise wrong_type(x, name, "an array")
    try:
        real = xp.isdtype(x.dtype, "real floating")
    except TypeError:  # the library doesn't know the dtype, as NumPy doesn't know bfloat16
        real = False
    if not real:
        raise TypeError(f"{name} has dtype {x.dtype}: whitening needs real floating-point values, convert it first")
    if x.ndim < 0:
        raise ValueError(f"{name} has an unknown number of dimensions: it has to be known while a graph is traced")


def check_channels(x: Array, channels: int, name: str, axis: int = 1, first: int = 0) -> int:
    """Check that the input of a layer has the layer's number of channels; return their axis, counted from the front."""
    if axis == 1 and (x.ndim < 2 or x.shape[1] != channels):
        raise ValueError(f"x has shape {tuple(x.shape)}: (N, {channels}, ...) is needed for {name}={channels}")
    normalized = check_channel_axis(x, axis, first)
    if x.shape[normalized] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}: {name}={channels} channels are needed at axis={axis}")
    return normalized


def check_channel_axis(x: Array, axis: int, first: int = 0) -> int:
    """Return `axis` counted from the front; `first` is the first axis that may hold channels."""
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: at least 2 dimensions are needed, samples and channels")
    axis = check_integer("axis", axis)
    normalized = axis + x.ndim if axis < 0 else axis
    if not first <= normalized < x.ndim:
        raise ValueError(f"axis={axis} holds no channels in shape {tuple(x.shape)}: use {first} to {x.ndim - 1}")
    if x.shape[normalized] is None:
        raise ValueError(f"x has shape {tuple(x.shape)}: the channels, at axis={axis}, have to be known")
    if x.shape[normalized] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: at least 1 channel is needed at axis={axis}")
    return normalized


def check_eps(eps: float, name: str = "eps") -> float:
    eps = _number(name, eps)
    if not 0 <= eps < math.inf:  # NaN too
        raise ValueError(f"{name}={eps} must be 0 or more, and finite")
    return eps


def check_momentum(momentum: float, alternative: str = "") -> float:
    momentum = _number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be from 0 to 1{alternative}")
    return momentum


def check_positive(name: str, value: int) -> int:
    value = check_integer(name, value)
    if value < 1:
        raise ValueError(f"{name}={value} must be 1 or more")
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, choices))}")
    return value


def check_num_groups(num_groups: int, channels: int, name: str = "num_groups") -> int:
    num_groups = check_integer(name, num_groups)
    if num_groups < 1 or channels % num_groups:
        fitting = ", ".join(map(str, divisors(channels)))
        raise ValueError(f"{name}={num_groups} doesn't divide {channels} channels: use one of {fitting}")
    return num_groups


def check_per_channel(xp: Namespace, values: Array, name: str, channels: int) -> None:
    check_array(xp, values, name)
    shape = tuple(values.shape)
    if shape != (channels,):
        raise ValueError(f"{name} has shape {shape}: one value for each of x's {channels} channels is needed")


def check_gradient(xp: Namespace, dy: Array, shape: tuple[int, ...]) -> None:
    """Check that dy has the shape of y. Sizes can be None, for unknown, while a graph is traced."""
    check_array(xp, dy, "dy")
    actual, wanted = tuple(dy.shape), tuple(shape)
    if len(actual) != len(wanted) or any(
        None not in sizes and sizes[0] != sizes[1] for sizes in zip(actual, wanted, strict=True)
    ):
        raise ValueError(f"dy has shape {actual}: y has {wanted}, and dy needs the same")


def check_batch(x: Array, axis: int) -> None:
    """Check that there are enough samples for a covariance."""
    sizes = [*x.shape[:axis], *x.shape[axis + 1 :]]
    check_sample_count(sizes, x.shape, "samples a channel", "use a larger batch, or frozen statistics")


def check_sample_count(sizes: Sequence[Any], shape: Shape, what: str, hint: str) -> None:
    """Check that the product of `sizes` is 2 or more, unless one of them is unknown while a graph is traced."""
    if not all(isinstance(size, Real) for size in sizes):
        return
    count = math.prod(sizes)
    if count < 2:
        raise ValueError(f"x of shape {tuple(shape)} gives {count} {what}: at least 2 are needed; {hint}")


def check_sample_groups(x: Array, num_groups: int, axis: int) -> int:
    """Return a number of groups that divides the channels, with enough values in every group for a covariance."""
    channels = x.shape[axis]
    num_groups = check_num_groups(num_groups, channels)
    sizes = [channels // num_groups, *x.shape[1:axis], *x.shape[axis + 1 :]]
    hint = f"use fewer than {num_groups} groups" if num_groups > 1 else "use inputs with more channels or positions"
    check_sample_count(sizes, x.shape, "values a group", hint)
    return num_groups


def check_statistics(xp: Namespace, channels: int, mean: Array, whitener: Array) -> None:
    """Check that the statistics' shapes fit the channels, in groups of which the last one may be smaller."""
    check_array(xp, mean, "stats.mean")
    check_array(xp, whitener, "stats.whitener")
    if tuple(mean.shape) != (channels,):
        raise ValueError(
            f"stats.mean has shape {tuple(mean.shape)}: x has {channels} channels, so ({channels},) is needed"
        )
    size = whitener.shape[-1] if whitener.ndim == 3 else 0
    groups = len(range(0, channels, size)) if size else 0
    if tuple(whitener.shape) != (groups, size, size):
        raise ValueError(
            f"stats.whitener has shape {tuple(whitener.shape)}: (groups, d, d) is needed, "
            f"d channels a group for x's {channels} channels"
        )


def check_layers(names: Sequence[str] | None, found: Mapping[str, Layer]) -> dict[str, Layer]:
    """Return the layers to track: of those `found` in a model, the ones with these names, or all of them for None."""
    if not found:
        raise ValueError("model has no layer to track: an IterNorm, GroupWhitening, batch or group normalization")
    if names is None:
        return dict(found)
    if isinstance(names, str):
        raise TypeError(f"layers={names!r} must be a sequence of names, such as [{names!r}]")
    for name in names:
        if name not in found:
            raise ValueError(f"layers has {name!r}, which can't be tracked: use names of {', '.join(map(repr, found))}")
    return {name: found[name] for name in names}


def check_square(cov: Array) -> None:
    if cov.ndim < 2 or cov.shape[-1] != cov.shape[-2]:
        raise ValueError(f"cov has shape {tuple(cov.shape)}: square matrices (..., d, d) are needed")


def _number(name: str, value: float) -> float:
    if isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a number")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be a number") from None


def check_integer(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer") from None
