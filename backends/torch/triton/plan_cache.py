"""A cache for what follows from shapes, strides and dtypes alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_MAX_RESULTS = 1024  # of each function
_CACHED: dict[Callable[..., object], Callable[..., object]] = {}


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with a cache; without one while PyTorch compiles, which can't trace a cache."""
    if torch.compiler.is_compiling():
        return function
    found = _CACHED.get(function)
    if found is None:
        found = _CACHED[function] = lru_cache(_MAX_RESULTS)(function)
    return found  # type: ignore[return-value]
