"""Functions of `polywhiten` that convert NumPy's arrays first, for libraries whose own functions do so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

R = TypeVar("R")


def taking_numpy(function: Callable[..., R], convert: Callable[[Any], Any]) -> Callable[..., R]:
    """Return a function whose first argument may also be a NumPy array, which `convert` makes one of its library."""
    first = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def converting(*args: Any, **kwargs: Any) -> R:
        if args and isinstance(args[0], np.ndarray):
            args = convert(args[0]), *args[1:]
        elif isinstance(kwargs.get(first), np.ndarray):
            kwargs[first] = convert(kwargs[first])
        return function(*args, **kwargs)

    return converting
